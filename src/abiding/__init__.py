"""LLM-serving GPU kernels that abide across PyTorch releases.

One binary, built once, loads in every PyTorch >= 2.10, because it touches libtorch only through the LibTorch Stable
ABI. Each kernel group is a module here (:mod:`abiding.mla_prologue`); its operators are ``torch.ops.abiding.*``, and
its executable specification in plain PyTorch is the module of the same name in :mod:`abiding.reference`.
"""

from abiding import _library

_library.load()

from abiding import mla_prologue, mxfp8_moe, reduce_rms, reference  # noqa: E402  (their fakes need the operators)
from abiding._library import binaries, cuda_unavailable_reason, has_cuda_kernels  # noqa: E402
from abiding.communicator import Communicator, Route  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Communicator",
    "Route",
    "binaries",
    "cuda_unavailable_reason",
    "has_cuda_kernels",
    "mla_prologue",
    "mxfp8_moe",
    "reduce_rms",
    "reference",
]
