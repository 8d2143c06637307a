"""Shared by tests, benchmarks and the demo: comparison, guarded tensors, timing, ranks, the cases of groups."""

from abiding.testing.comparison import assert_bitwise_equal, assert_close, max_error, max_ulps, round_once, ulp_distance
from abiding.testing.guarded import POISON, GuardedTensor, guarded
from abiding.testing.timing import (
    Roofline,
    Timing,
    call_us,
    copy_gbps,
    eager_us,
    graph_us,
    matmul_tflops,
    rotations,
)

__all__ = [
    "POISON",
    "GuardedTensor",
    "Roofline",
    "Timing",
    "assert_bitwise_equal",
    "assert_close",
    "call_us",
    "copy_gbps",
    "eager_us",
    "graph_us",
    "guarded",
    "matmul_tflops",
    "max_error",
    "max_ulps",
    "rotations",
    "round_once",
    "ulp_distance",
]
