"""Prints the handle of shared memory that ends with this process."""

import torch

import abiding  # noqa: F401  (registers the operators)

print(torch.ops.abiding_custom_ar.allocate_shared_memory_and_handle(64)[1].tolist())
