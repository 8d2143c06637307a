"""Times of collectives in graph replay on virtual ranks of one GPU: what a change of their kernels costs.

    python -m benchmarks.replay [--ranks 2 4] [--sizes 16 1048576] [--tokens 1 2048]

Run it in turn with the package of each commit (PYTHONPATH). Virtual ranks share the GPU, so only differences between
two packages in one session mean something. The options choose some of the cases; one without values leaves out its
operator.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch

from abiding import reduce_rms
from abiding.communicator import Communicator
from abiding.testing.ranks import prepare_for_virtual_ranks, virtual_ranks

CALLS, REPEATS = 200, 25  # per graph; replays, of which the first three do not count
RANKS = (2, 4)
SIZES = (16, 1024, 4096, 16384, 65536, 262144, 1 << 20, 4 << 20)
TOKENS = (1, 16, 128, 1024, 2048)
Q_WIDTH, K_WIDTH = 6144, 1024  # of all ranks
SLEEP_CYCLES = 3_000_000  # while the host launches the replays

Call = Callable[[Communicator], object]


def replay_us(ranks: int, make: Callable[[], Call], device: torch.device) -> float:
    """The median microseconds of a call, with all ranks' graphs replayed at once."""
    with virtual_ranks(ranks, device) as comms:
        streams = [torch.cuda.Stream(device) for _ in comms]
        graphs = []
        for comm, stream in zip(comms, streams, strict=True):
            call, graph = make(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(CALLS):
                    call(comm)
            graphs.append(graph)
        samples = []
        for _ in range(REPEATS):
            torch.cuda.synchronize(device)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SLEEP_CYCLES)
            begin.record()
            for graph, stream in zip(graphs, streams, strict=True):
                stream.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(stream):
                    graph.replay()
            for stream in streams:
                torch.cuda.current_stream(device).wait_stream(stream)
            end.record()
            torch.cuda.synchronize(device)
            samples.append(begin.elapsed_time(end) * 1e3 / CALLS)
        for comm in comms:
            comm.check()
    return float(statistics.median(samples[3:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="numbers of virtual ranks")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="bytes of an all_reduce")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS, help="tokens of a qk_norm")
    options = parser.parse_args()
    prepare_for_virtual_ranks()
    device = torch.device("cuda", 0)

    def summed(size: int) -> Call:
        x = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
        out = torch.empty_like(x)
        return lambda comm: comm.all_reduce(x, out=out)

    def normed(tokens: int, ranks: int) -> Call:
        q, k = Q_WIDTH // ranks, K_WIDTH // ranks
        x = torch.randn(tokens, q + 2 * k, device=device).bfloat16()
        of_q, of_k = (torch.ones(width, dtype=torch.bfloat16, device=device) for width in (q, k))
        return lambda comm: reduce_rms.qk_norm(x, of_q, of_k, comm)

    for ranks in options.ranks:
        for size in options.sizes:
            us = replay_us(ranks, partial(summed, size), device)
            print(f"{ranks} ranks, all_reduce of {size} bytes: {us:.3f} us", flush=True)
        for tokens in options.tokens:
            us = replay_us(ranks, partial(normed, tokens, ranks), device)
            print(f"{ranks} ranks, qk_norm of {tokens} tokens: {us:.3f} us", flush=True)


if __name__ == "__main__":
    main()
