"""LLM-serving GPU kernels that abide across PyTorch releases.

One wheel, built once, loads in every PyTorch >= 2.10, because it uses libtorch only through the LibTorch Stable ABI.
Each kernel group is a module of this package (:mod:`abiding.mla_prologue`; of ``all_reduce``, the class
:class:`Communicator`). Its operators are ``torch.ops.abiding.*``, and its executable specification in plain PyTorch is
the module of the same name in :mod:`abiding.reference`.
"""

from abiding import _library

_library.load()

from abiding import mla_prologue, mxfp8_moe, reduce_rms, reference  # noqa: E402  (fakes need the loaded operators)
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
