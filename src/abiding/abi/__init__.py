"""Tools that keep a C++ extension on the LibTorch Stable ABI; they need ``abiding[cli]``."""

from abiding.abi.audit import Report, audit

__all__ = ["Report", "audit"]
