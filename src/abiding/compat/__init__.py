"""Abiding's kernels under the operator names of other engines."""
