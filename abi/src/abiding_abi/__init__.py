"""Tools that move PyTorch extensions to the LibTorch Stable ABI and keep them there."""

__version__ = "0.1.0"
