"""Abiding inside transformers: whole models from checkpoints, what is refused, and what is left behind."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from abiding.engines import transformers as engine
from abiding.testing import mxfp8_checkpoint
from tests_engines_models import CONFIGS  # type: ignore[import-not-found]

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
