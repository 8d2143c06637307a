"""Causal and local products of pytorch-fast-transformers on the CPU against definitions in Python."""

from __future__ import annotations

import torch
from fast_transformers.causal_product import causal_dot_product
from fast_transformers.local_product import local_dot_product, local_weighted_average


def test_causal_product_and_its_gradients() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.rand(2, 3, 17, 5).requires_grad_() for _ in range(3))
    weights = (q @ k.transpose(-1, -2)).tril()
    expected = weights @ v
    got = causal_dot_product(q, k, v)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(got.square().sum(), (q, k, v))
    for mine, theirs in zip(grads, torch.autograd.grad(expected.square().sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_local_products() -> None:
    torch.manual_seed(1)
    length, context = 11, 4
    q, k, v = (torch.rand(2, 3, length, 6) for _ in range(3))
    mask = torch.zeros(length, length)
    lengths = torch.full((2,), length, dtype=torch.long)
    products = local_dot_product(q, k, mask, lengths, context)
    full = q @ k.transpose(-1, -2)
    average = local_weighted_average(products.clamp(min=0), v)
    for i in range(length):
        expected = torch.zeros(2, 3, v.shape[-1])
        for slot in range(context):
            j = i - context // 2 + slot
            if 0 <= j < length:
                torch.testing.assert_close(products[:, :, i, slot], full[:, :, i, j], rtol=1e-4, atol=1e-4)
                expected += products[:, :, i, slot, None].clamp(min=0) * v[:, :, j]
        torch.testing.assert_close(average[:, :, i], expected, rtol=1e-4, atol=1e-4)
