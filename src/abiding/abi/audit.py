"""Audit the dynamic dependencies of shared libraries against what Abiding promises.

A library passes if it runs on every torch >= 2.10 and every Linux of ``manylinux_2_34``: it calls libtorch only through
C functions that torch 2.10 exports, and needs no libraries other than libtorch and the C and C++ run-time libraries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection
from torch_abi_audit import inspect_extension

OLDEST_TORCH = (2, 10, 0)
NEWEST_RUNTIME = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29)}
"""The newest symbol versions of the C and C++ run-time libraries that manylinux_2_34 allows."""

ALLOWED_LIBRARIES = {
    *("libtorch.so", "libstdc++.so.6", "libgcc_s.so.1"),
    *("libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1"),
    *("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
}

Version = tuple[int, ...]


@dataclass(frozen=True)
class Report:
    """The findings about one file; without problems it passes."""

    path: Path
    min_torch: str | None = None
    shims: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()
    runtime: dict[str, Version] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Elf:
    needed: tuple[str, ...]
    search_paths: tuple[str, ...]
    imports: tuple[str, ...]
    versions: tuple[str, ...]


def audit(paths: Iterable[Path]) -> list[Report]:
    """Audit shared libraries, one report each."""
    return [_audit(Path(path)) for path in paths]


def run(paths: Sequence[Path]) -> int:
    """Audit, and print a table and all problems; returns 0 if all passed, 1 if not, 2 if there was nothing to audit."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    reports = audit(paths)
    if not reports:
        console.print("nothing to audit")
        return 2
    table = Table(Column("library", no_wrap=True), "torch", "glibc", "libstdc++", "shims", "foreign", "verdict")
    for report in reports:
        torch = f">={report.min_torch}" if report.min_torch else "-"
        runtime = [_dotted(report.runtime[name]) if name in report.runtime else "-" for name in NEWEST_RUNTIME]
        verdict = "[red]fails[/]" if report.problems else "[green]passes[/]"
        foreign = ", ".join(_foreign(report.needed)) or "none"
        table.add_row(report.path.name, torch, *runtime, str(len(report.shims)), foreign, verdict)
    console.print(table)
    for report in reports:
        for problem in report.problems:
            console.print(f"{report.path}: {problem}", style="red", markup=False, soft_wrap=True)
    return int(any(report.problems for report in reports))


def _audit(path: Path) -> Report:
    try:
        elf = _read(path)
    except (OSError, ELFError) as error:
        return Report(path, problems=(f"cannot be read as a shared library: {error}",))
    verdict = inspect_extension(path)
    if verdict.error:
        return Report(path, problems=(verdict.error,))

    torch = verdict.torch
    shims = tuple(name for name in elf.imports if name.startswith(("aoti_", "torch_")))
    runtime = {name: max(found) for name in NEWEST_RUNTIME if (found := _versions(name, elf.versions))}
    problems: list[str] = []
    if torch.unstable_symbols:
        problems.append(f"unstable symbols of libtorch: {_listed(torch.unstable_symbols)}")
    if torch.min_torch_version and _parse(torch.min_torch_version) > OLDEST_TORCH:
        problems.append(f"needs torch {torch.min_torch_version} for {_listed(torch.version_defining_symbols)}")
    if unknown := [name for name in shims if name not in _known_shims()]:
        problems.append(f"not in the stable ABI of torch {_dotted(OLDEST_TORCH)}: {_listed(unknown)}")
    if foreign := _foreign(elf.needed):
        problems.append(f"needs libraries that neither torch >= 2.10 nor every Linux promises: {_listed(foreign)}")
    if shims and "libtorch.so" not in elf.needed:
        problems.append("calls libtorch without naming libtorch.so as needed")
    if elf.search_paths:
        problems.append(f"has a library search path of its own: {_listed(elf.search_paths)}")
    for name, newest in NEWEST_RUNTIME.items():
        if runtime.get(name, ()) > newest:
            problems.append(f"needs {name}_{_dotted(runtime[name])}; manylinux_2_34 ends at {name}_{_dotted(newest)}")
    return Report(path, torch.min_torch_version, shims, elf.needed, runtime, tuple(problems))


def _foreign(needed: Iterable[str]) -> list[str]:
    return [name for name in needed if name not in ALLOWED_LIBRARIES]


def _known_shims() -> set[str]:
    return set((files(__package__) / "shims_2_10.txt").read_text().split())


def _listed(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _read(path: Path) -> _Elf:
    dynamic: dict[str, list[str]] = {"needed": [], "rpath": [], "runpath": []}
    imports: list[str] = []
    versions: list[str] = []
    with path.open("rb") as file:
        for section in ELFFile(file).iter_sections():
            if isinstance(section, DynamicSection):
                for tag in section.iter_tags():
                    kind = tag.entry.d_tag.removeprefix("DT_").lower()
                    if kind in dynamic:
                        dynamic[kind].append(getattr(tag, kind))
            elif isinstance(section, GNUVerNeedSection):
                versions += [version.name for _, group in section.iter_versions() for version in group]
            elif isinstance(section, SymbolTableSection) and section.name == ".dynsym":
                imports += [s.name for s in section.iter_symbols() if s.name and s.entry.st_shndx == "SHN_UNDEF"]
    search_paths = (*dynamic["rpath"], *dynamic["runpath"])
    return _Elf(tuple(dynamic["needed"]), search_paths, tuple(sorted(imports)), tuple(versions))


def _versions(name: str, symbols: Iterable[str]) -> list[Version]:
    return [_parse(s.removeprefix(name + "_")) for s in symbols if s.startswith(name + "_") and s[-1].isdigit()]


def _parse(version: str) -> Version:
    return tuple(map(int, version.split(".")))


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))
