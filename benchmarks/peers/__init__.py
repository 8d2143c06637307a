"""Other libraries' kernels, loaded from files that the caller names, as far as timing needs them."""
