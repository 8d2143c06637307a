"""The entry point in a process where vLLM does not import, as when its binaries do not fit."""

import os
import sys

sys.modules["vllm"] = None  # type: ignore[assignment]
os.environ["ABIDING_VLLM"] = "all"

from abiding.engines import vllm  # noqa: E402  (after vLLM is out of reach)

print({name: status.state for name, status in vllm.register().items()})
