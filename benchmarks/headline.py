"""The README's results: a table with a row per job and card, and the jobs of its plot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from benchmarks.result_file import CaseResult, Results
from benchmarks.tables import table, us_text


@dataclass(frozen=True)
class Headline:
    """A row of the README's table: one case of a job, chosen by its parameters."""

    job: str
    group: str
    op: str
    params: Mapping[str, object]

    def at(self, size: str, **params: object) -> Headline:
        return replace(self, job=f"{self.job}, {size}", params={**self.params, **params})

    def cases(self, found: Iterable[Results]) -> Iterator[tuple[Results, CaseResult]]:
        """The matching cases of all GPUs, L2-cold ones where there are both."""
        for results in found:
            if results.group == self.group:
                cases = [case for case in results.cases if case.op == self.op and case.peers]
                cases = [case for case in cases if self.params.items() <= case.params.items()]
                cold = [case for case in cases if not case.l2_warm]
                yield from ((results, case) for case in cold or cases)


PROLOGUE = Headline("DeepSeek V4 MLA prologue, 64 heads", "mla_prologue", "qnorm_rope_kv_insert", {"heads": 64})
ALL_REDUCE = Headline("all-reduce, CUDA graph", "multi_gpu", "graph", {})
QK_NORM = Headline("MiniMax M2 QK norm, CUDA graph", "multi_gpu", "qk_norm graph", {})
MOE_SHAPES = Headline("MXFP8 MoE layer, w8a16", "mxfp8_moe", "moe_w8a16", {"routing": "uniform"})
MOE_M2 = replace(MOE_SHAPES, job="MXFP8 MoE layer, MiniMax M2", params={**MOE_SHAPES.params, "shape": "minimax-m2"})
HEADLINES = (
    PROLOGUE.at("256 tokens", tokens=256),
    ALL_REDUCE.at("64 KiB", bytes=65536),
    QK_NORM.at("64 tokens", tokens=64),
    *(MOE_M2.at("1 token" if tokens == 1 else f"{tokens} tokens", tokens=tokens) for tokens in (1, 8, 100, 512, 8192)),
)


def headline(found: Iterable[Results]) -> str:
    """The README's table: a row per job and card, with the best peer's time and the ratio to it."""
    every, rows = list(found), []
    for one in HEADLINES:
        for results, case in one.cases(every):
            best = case.best_peer or ""
            ratio = f"**{case.ratio:.2f}**"
            rows.append([one.job, us_text(case.us), us_text(case.peers[best]), best, ratio, results.gpu])
    return table(["job", "Abiding, µs", "best peer, µs", "which", "ratio", "card"], rows)
