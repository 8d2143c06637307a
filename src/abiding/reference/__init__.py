"""The executable specification: each group in plain PyTorch, on any device, under the names of the public face.

Nothing here is fast, and nothing here knows the rest of the package. A kernel is right when it agrees with this.
"""

from abiding.reference import mla_prologue

__all__ = ["mla_prologue"]
