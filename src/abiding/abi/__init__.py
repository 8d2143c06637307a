"""Tools that check whether a C++ extension keeps to the LibTorch Stable ABI; they need ``abiding[cli]``."""

from abiding.abi.audit import Report, audit

__all__ = ["Report", "audit"]
