"""Whole models inside vLLM and transformers, with our kernels and without."""
