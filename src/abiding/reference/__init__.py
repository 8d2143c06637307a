"""The executable specification: each group in plain PyTorch, on any device, under the names of the public face.

Nothing here is fast, and nothing here knows the rest of the package. A kernel is right when it agrees with this.
"""

from abiding.reference import all_reduce, mla_prologue, mxfp8_moe, reduce_rms

__all__ = ["all_reduce", "mla_prologue", "mxfp8_moe", "reduce_rms"]
