"""CPU kernels compute the documented bits in any floating-point environment of a caller's, and leave it as it was."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

# Prints a digest of the outputs of every group. `worker` is the environment in which torch's worker threads are made,
# which inherit it; `caller` is that of the thread that calls. Both are in the default one while inputs are made.
PROGRAM = """
import ctypes, hashlib, sys
import torch
from abiding import mla_prologue, mxfp8_moe, reduce_rms
from abiding.testing.ranks import on_each, virtual_ranks

worker, caller = sys.argv[1:]
libm = ctypes.CDLL("libm.so.6")
modes = {"upward": 0x800, "downward": 0x400, "toward_zero": 0xC00}
tiny = torch.tensor([1e-40])

def enter(name):
    libm.fesetround(modes.get(name, 0))
    torch.set_flush_denormal(name == "flush")

def state():
    return libm.fegetround(), (tiny * 1.0).item()

torch.manual_seed(0)
T, H, page = 96, 16, 64
q = torch.randn(T, H, 512).bfloat16()
kv = torch.randn(T, 512).bfloat16()
kv[:4] *= 1e-39
slots, positions = torch.arange(T), torch.arange(T)
cos_sin = torch.cat([torch.randn(T, 32), torch.randn(T, 32)], dim=1)

tokens, K, I, E = 64, 256, 128, 4
w13 = torch.randn(E, 2 * I, K).clamp(-448, 448).to(torch.float8_e4m3fn)
w2 = torch.randn(E, K, I).clamp(-448, 448).to(torch.float8_e4m3fn)
codes = torch.randint(110, 125, (E, 2 * I, K // 32)).to(torch.uint8)
codes[0, :, 0] = 1  # weights that are subnormal
s13 = mxfp8_moe.swizzle_scales(codes)
s2 = mxfp8_moe.swizzle_scales(torch.randint(110, 125, (E, K, I // 32)).to(torch.uint8))
x = torch.randn(tokens, K).bfloat16()
x[:2] *= 1e-38
weights, experts = torch.randn(tokens, E).softmax(-1).topk(2)

sums = [torch.randn(4096) * 2.0 ** torch.randint(-140, 3, (4096,)) for _ in range(2)]
rows = [torch.randn(64, 96) for _ in range(2)]
rows[0][0], rows[1][0] = 1e-20, 1e-20  # squares that are subnormal
scale = torch.randn(96)

torch.set_num_threads(4)
enter(worker)
torch.randn(1 << 20).sqrt_()  # makes the worker threads
enter("default")
outputs = []

def record(make):
    enter(caller)
    before = state()
    made = make()
    after = state()
    enter("default")
    assert before == after, (before, after)
    outputs.extend(made)

cache = torch.zeros(2, mla_prologue.page_bytes(page), dtype=torch.uint8)
args = (q, kv, cache, slots, positions, cos_sin)
record(lambda: [mla_prologue.qnorm_rope_kv_insert(*args, block_size=page), cache])
record(lambda: [mla_prologue.gather_kv(cache, slots, block_size=page)])
for mode in ("w8a8", "w8a16"):
    record(lambda: [mxfp8_moe.moe(x, w13, s13, w2, s2, experts, weights, mode=mode)])
first, second = mxfp8_moe.rebase(w13, s13), mxfp8_moe.rebase(w2, s2)
record(lambda: [*mxfp8_moe.rebase(w13, s13)[2][2:], *mxfp8_moe.rebase(w13, s13)[:2]])
record(lambda: [mxfp8_moe.moe(x, *first[:2], *second[:2], experts, weights, mode="fp8")])

def collective(call):
    def run(rank, comm):  # in a thread of its own
        enter(caller)
        before = state()
        made = call(comm)
        assert before == state()
        return made
    with virtual_ranks(2, torch.device("cpu")) as comms:
        outputs.extend(on_each(comms, run))

for dtype in (torch.float32, torch.float16, torch.bfloat16):
    sent = [s.to(dtype) for s in sums]
    collective(lambda comm: comm.all_reduce(sent[comm.rank]))
# An eps that no float32 is: its rounding is part of the operator.
collective(lambda comm: reduce_rms.rms_norm(rows[comm.rank], scale, comm, eps=1.1e-40))
outputs = [out.reshape(-1).contiguous().view(torch.uint8) for out in outputs]
print(*(hashlib.sha256(out.numpy().tobytes()).hexdigest()[:12] for out in outputs))
"""

Python = Callable[..., "subprocess.CompletedProcess[str]"]


def digests(python: Python, worker: str, caller: str) -> list[str]:
    return python(f"import sys; sys.argv[1:] = {[worker, caller]!r}\n{PROGRAM}", OMP_NUM_THREADS="4").stdout.split()


def test_bits_and_state(python: Python) -> None:
    expected = digests(python, "default", "default")
    assert len(set(expected)) == len(expected) - 3  # both ranks of an all-reduce have the same bits
    for worker, caller in (("default", "flush"), ("flush", "upward"), ("downward", "default"), ("upward", "flush")):
        assert digests(python, worker, caller) == expected, (worker, caller)
