"""The executable specification: each kernel group in plain PyTorch, on any device, with the names of the public API.

The reference is not optimized and does not depend on the rest of the package. A kernel is correct if it agrees with it.
"""

from abiding.reference import all_reduce, mla_prologue, mxfp8_moe, reduce_rms

__all__ = ["all_reduce", "mla_prologue", "mxfp8_moe", "reduce_rms"]
