"""The former name of :mod:`abiding.engines.vllm.operators`; it goes with 0.2."""

import sys

from abiding.engines.vllm import operators

sys.modules[__name__] = operators
