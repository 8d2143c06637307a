"""Benchmark results: one JSON file per group and GPU, the source of every table and plot."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Callable, Hashable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from abiding.testing.timing import Roofline, Timing

RESULTS = Path("benchmarks/results")
"""The folder of committed results, from the repository's root."""
Param = int | float | str | bool
Device = torch.device


@dataclass(frozen=True)
class CaseResult:
    """The time of one case, its roofline bound, and the peers' times."""

    op: str
    params: Mapping[str, Param]
    us: float
    spread_us: float
    l2_warm: bool
    bound_us: float
    peers: Mapping[str, float] = field(default_factory=dict)
    commit: str = ""
    """The commit of a case that was timed later than the rest of its file."""

    @property
    def best_peer(self) -> str | None:
        """The fastest peer's name; None if no peer was timed."""
        return min(self.peers, key=lambda name: self.peers[name], default=None)

    @property
    def ratio(self) -> float | None:
        """Our time as a part of the best peer's."""
        return None if self.best_peer is None else self.us / self.peers[self.best_peer]

    @property
    def cache_state(self) -> str:
        """Whether the case's inputs are in the L2 cache when a call starts."""
        return "L2-warm" if self.l2_warm else "L2-cold"

    @staticmethod
    def of(
        op: str,
        params: Mapping[str, Param],
        ours: Timing,
        peers: Mapping[str, Timing],
        *,
        l2_warm: bool,
        bound_us: float,
    ) -> CaseResult:
        """A case with its times rounded to the nanosecond, as it is written to a file."""
        return CaseResult(
            op=op,
            params=params,
            us=round(ours.us, 3),
            spread_us=round(ours.spread_us, 3),
            l2_warm=l2_warm,
            bound_us=round(bound_us, 3),
            peers={name: round(timing.us, 3) for name, timing in peers.items()},
        )


@dataclass(frozen=True)
class Results:
    """The results of one run of a group's benchmark on one device."""

    group: str
    gpu: str
    driver: str
    torch: str
    cuda: str
    commit: str
    date: str
    copy_gbps: float
    matmul_tflops: float
    cases: list[CaseResult]

    @staticmethod
    def begin(group: str, device: Device, roofline: Roofline, commit: str | None = None) -> Results:
        """Results of this machine, dated now, still without cases; `commit` defaults to that of the checkout."""
        on_gpu = device.type == "cuda"
        return Results(
            group=group,
            gpu=torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
            driver=_driver() if on_gpu else "none",
            torch=torch.__version__,
            cuda=(torch.version.cuda or "none") if on_gpu else "none",
            commit=commit or _commit(),
            date=datetime.now(timezone.utc).date().isoformat(),
            copy_gbps=round(roofline.copy_gbps, 1),
            matmul_tflops=round(roofline.matmul_tflops, 1),
            cases=[],
        )

    def replaced(self, newer: Results, place: Callable[[CaseResult], Hashable] | None = None) -> Results:
        """These results, with the cases of all operators that `newer` has replaced by its own, each with its commit.
        With `place`, `newer` has only some of an operator's cases: they take the places of those that they share it
        with."""
        cases = [replace(case, commit=newer.commit) for case in newer.cases]
        if place is None:
            ops = {case.op for case in cases}
            return replace(self, cases=[*(case for case in self.cases if case.op not in ops), *cases])
        at = {place(case): case for case in cases}
        kept = [at.pop(place(case), case) for case in self.cases]
        return replace(self, cases=[*kept, *at.values()])

    @property
    def file_name(self) -> str:
        """`<group>-<gpu>.json`, with the GPU's name in lower case and without its vendor."""
        return f"{self.group}-{re.sub(r'[^a-z0-9]+', '-', self.gpu.lower().removeprefix('nvidia ')).strip('-')}.json"

    def path_in(self, place: Path) -> Path:
        """`place`, if that is a JSON file by its name; else the file of :attr:`file_name` in the folder `place`."""
        return place if place.suffix == ".json" else place / self.file_name

    def write(self, place: Path) -> Path:
        """Write to :meth:`path_in` of `place`, whose folder is created if missing; returns the path."""
        validate(asdict(self))
        path = self.path_in(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {key: value for key, value in asdict(self).items() if key != "cases"}
        cases = ",\n".join("    " + json.dumps(_written(case)) for case in self.cases)
        path.write_text(json.dumps(head, indent=2)[:-2] + f',\n  "cases": [\n{cases}\n  ]\n}}\n')
        return path

    @staticmethod
    def read(path: Path) -> Results:
        """Read and validate a file."""
        try:
            return validate(json.loads(path.read_text()))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def validate(data: object) -> Results:
    """Decoded JSON as `Results`; a ValueError names what is missing, unknown or of the wrong type."""
    record = _record(data, Results, "results")
    cases = []
    for index, entry in enumerate(record["cases"]):
        case = _record(entry, CaseResult, f"cases[{index}]")
        for name, us in case["peers"].items():
            _expect(us, float, f"cases[{index}].peers.{name}")
        for name, value in case["params"].items():
            if not isinstance(value, Param):
                raise ValueError(f"cases[{index}].params.{name} is {value!r}; expected a number, a string or a boolean")
        if case["us"] <= 0 or case["bound_us"] < 0:
            raise ValueError(
                f"cases[{index}] has us {case['us']} and bound_us {case['bound_us']}; expected positive times"
            )
        cases.append(CaseResult(**case))
    return Results(**(record | {"cases": cases}))


def _written(case: CaseResult) -> dict[str, Any]:
    entry = asdict(case)
    if not case.commit:
        del entry["commit"]
    return entry


_KINDS: dict[str, type] = {"str": str, "float": float, "bool": bool, "list[CaseResult]": list}


def _record(data: object, kind: type[Any], where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is {data!r}; expected an object")
    known = {entry.name: entry for entry in fields(kind)}
    unknown = sorted(set(data) - set(known))
    needed = [name for name, entry in known.items() if entry.default is MISSING and entry.default_factory is MISSING]
    missing = [name for name in needed if name not in data]
    if unknown or missing:
        raise ValueError(f"{where} lacks {missing} and has unknown {unknown}; expected {list(known)}")
    for name, value in data.items():
        _expect(value, _KINDS.get(str(known[name].type), dict), f"{where}.{name}")
    return dict(data)


def _expect(value: object, kind: type, where: str) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) if kind is float else isinstance(value, kind)
    if not good:
        raise ValueError(f"{where} is {value!r}; expected a {'number' if kind is float else kind.__name__}")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return match[1].strip() if match else platform.machine()


def _commit() -> str:
    """The commit of the checkout, with "-dirty" if it has changes; "unknown" for a copy without its history."""
    tree = Path(__file__).parents[1]
    found = _output("git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return found if found and (tree / ".git").exists() else "unknown"


def _driver() -> str:
    shown = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if shown:
        return shown.splitlines()[0].strip()
    kernel_module = Path("/proc/driver/nvidia/version")
    match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", kernel_module.read_text()) if kernel_module.exists() else None
    return match[1] if match else "unknown"


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
