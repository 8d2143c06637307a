"""The former home of :mod:`abiding.engines.vllm.operators`; it goes with 0.2."""
