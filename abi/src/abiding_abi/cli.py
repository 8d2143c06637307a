"""The command line; every command imports what it needs, so that ``lint`` of a few files starts at once."""

from __future__ import annotations

import sys
from enum import Enum
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from abiding_abi import rules
from abiding_abi.errors import UserError
from abiding_abi.progress import progress
from abiding_abi.versions import parse

if TYPE_CHECKING:
    from abiding_abi.ratchet import Ledger

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Move PyTorch extensions to the LibTorch Stable ABI and keep them there."""


class Format(str, Enum):
    """How ``lint`` reports."""

    text = "text"
    json = "json"
    sarif = "sarif"
    github = "github"


@app.command()
def lint(
    paths: Annotated[list[Path], typer.Argument(help="C++ and CUDA sources, or folders of them.")],
    target: Annotated[str | None, typer.Option(help="The oldest torch that the binary has to run on.")] = None,
    headers: Annotated[str | None, typer.Option(help="The torch whose headers it is built with.")] = None,
    format: Annotated[Format, typer.Option("--format", "-f", help="How to report.")] = Format.text,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the report to a file.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Rules, or beginnings of their codes, to leave out.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Patterns of paths to leave out.")] = None,
    notes: Annotated[bool | None, typer.Option("--notes", help="Report legal but legacy spellings too.")] = None,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Leave included project headers alone.")] = False,
) -> None:
    """Find what is outside the stable ABI, and what compiles but is wrong; exit status 1 if there is any."""
    from abiding_abi import lint as linting
    from abiding_abi.lint import report

    config = linting.load(
        Path.cwd(),
        target=parse(target) if target else None,
        headers=parse(headers) if headers else None,
        ignore=tuple(ignore) if ignore else None,
        exclude=tuple(exclude) if exclude else None,
        notes=notes,
        follow=False if no_follow else None,
    )
    with progress("reading") as tell:
        found = linting.run(paths, config, tell)
    text = report.FORMATS[format.value](found)
    if output:
        output.write_text(text + "\n", encoding="utf-8")
        print(report.summary(found))
    else:
        print(text)
    raise SystemExit(int(any(f.level != "note" for f in found.findings)))


@app.command()
def explain(
    rule: Annotated[str | None, typer.Argument(help="A rule's code.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List every rule.")] = False,
) -> None:
    """Explain a rule: why, replacement, both versions, and an example."""
    from abiding_abi import explain as explaining

    if not rule and not list_:
        raise UserError("which rule? 'abiding-abi explain CHK001', or --list")
    print(explaining.explain(rule) if rule else explaining.listing())


@app.command()
def migrate(
    paths: Annotated[list[Path], typer.Argument(help="C++ and CUDA sources, or folders of them.")],
    write: Annotated[bool, typer.Option("--write", help="Write the files instead of a diff.")] = False,
    commit: Annotated[bool, typer.Option("--commit", help="Write, with one git commit per kind of change.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Rules, or beginnings of their codes.")] = None,
    namespace: Annotated[str | None, typer.Option(help="The operators' namespace, for pybind11 modules.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Patterns of paths to leave out.")] = None,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Leave included project headers alone.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Write edits and open places as JSON.")] = False,
) -> None:
    """Rewrite sources for the stable ABI: a diff, or with --write the files; open places get ABI-TODO(RULE)."""
    from abiding_abi import lint as linting
    from abiding_abi import migrate as migration
    from abiding_abi.migrate import commits

    for rule in only or ():
        if not any(r.code.startswith(rule.upper()) for r in rules.table()):
            raise UserError(f"no rule begins with '{rule}'")
    config = linting.load(Path.cwd(), exclude=tuple(exclude) if exclude else None, follow=False if no_follow else None)
    with progress("migrating") as tell:
        result = migration.run(paths, config, tuple(rule.upper() for rule in only or ()), namespace, tell)
    if json:
        print(migration.as_json(result))
    elif not write and not commit:
        print(migration.diff(result), end="")
    if commit:
        done = commits.commit(result)
        print("\n".join(done or ["nothing to commit"]), file=sys.stderr if json else sys.stdout)
    elif write:
        migration.write(result)
    if not json:
        print(migration.summary(result), file=sys.stdout if write or commit else sys.stderr)


ratchet_app = typer.Typer(no_args_is_help=True, help="One committed file of counts that may only fall.")
app.add_typer(ratchet_app, name="ratchet")
_LEDGER = typer.Option("--file", help="The committed file.")
_BINARY = typer.Option("--binary", "-b", help="Shared libraries whose unstable symbols count too.")


@ratchet_app.command("init")
def ratchet_init(
    paths: Annotated[list[Path], typer.Argument(help="Sources, or folders of them.")],
    binary: Annotated[list[Path] | None, _BINARY] = None,
    file: Annotated[Path, _LEDGER] = Path("abi-ratchet.json"),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Count what is there and write it down."""
    from abiding_abi import lint as linting
    from abiding_abi import ratchet

    if file.exists() and not force:
        raise UserError(f"{file} exists; 'ratchet tighten' lowers it, --force starts anew")
    config = linting.load(Path.cwd())
    with progress("reading") as tell:
        ledger = ratchet.measure(paths, binary or [], config, tell)
    ratchet.write(file, ledger)
    print(f"{file}: {ratchet.total(ledger)}")


@ratchet_app.command("check")
def ratchet_check(
    paths: Annotated[list[Path] | None, typer.Argument(help="Other paths than the file names.")] = None,
    binary: Annotated[list[Path] | None, _BINARY] = None,
    file: Annotated[Path, _LEDGER] = Path("abi-ratchet.json"),
) -> None:
    """Fail where a count rose, moved to another file, or fell without being written down."""
    from abiding_abi import ratchet

    allowed, now = _counted(paths, binary, file)
    rises, stale = ratchet.compare(allowed, now)
    for line in rises:
        print(line)
    for line in stale:
        print(f"{line}: run 'abiding-abi ratchet tighten'")
    print(f"{'fails' if rises or stale else 'holds'}: {ratchet.total(now)}")
    raise SystemExit(int(bool(rises or stale)))


@ratchet_app.command("tighten")
def ratchet_tighten(
    paths: Annotated[list[Path] | None, typer.Argument(help="Other paths than the file names.")] = None,
    binary: Annotated[list[Path] | None, _BINARY] = None,
    file: Annotated[Path, _LEDGER] = Path("abi-ratchet.json"),
) -> None:
    """Write lower counts down; refuse where any rose."""
    from abiding_abi import ratchet

    allowed, now = _counted(paths, binary, file)
    rises, stale = ratchet.compare(allowed, now)
    if rises:
        print("\n".join(rises))
        print(f"not tightened: {len(rises)} counts rose")
        raise SystemExit(1)
    ratchet.write(file, now)
    print(f"{len(stale)} entries lowered: {ratchet.total(now)}")


def _counted(paths: list[Path] | None, binary: list[Path] | None, file: Path) -> tuple[Ledger, Ledger]:
    from abiding_abi import lint as linting
    from abiding_abi import ratchet

    allowed = ratchet.read(file)
    config = linting.load(Path.cwd())
    sources = paths or [config.root / path for path in allowed.paths]
    binaries = binary or [config.root / path for path in allowed.binary_paths]
    with progress("reading") as tell:
        now = ratchet.measure(sources, binaries, config, tell)
    now.paths, now.binary_paths = allowed.paths, allowed.binary_paths
    return allowed, now


@app.command()
def verify(
    paths: Annotated[list[Path], typer.Argument(help="C++ and CUDA sources, or folders of them.")],
    headers: Annotated[str | None, typer.Option(help="A cached release, or a folder of torch or its headers.")] = None,
    fetch_headers: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Take this release's headers from the package index.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="Fail if a file needs a newer torch than this.")] = None,
    include: Annotated[list[Path] | None, typer.Option("-I", help="More folders of headers.")] = None,
    define: Annotated[list[str] | None, typer.Option("-D", help="More macros, as NAME or NAME=VALUE.")] = None,
    std: Annotated[str, typer.Option(help="The language's standard.")] = "c++20",
    cxx: Annotated[str, typer.Option(help="The C++ compiler.")] = "",
    nvcc: Annotated[str, typer.Option(help="The CUDA compiler.")] = "",
    no_cuda: Annotated[bool, typer.Option("--no-cuda", help="Leave USE_CUDA undefined.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds for one run of the compiler.")] = 600,
    json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Compile against torch's stable headers alone, and say which torch the result needs and what forces it."""
    from abiding_abi import headers as torch_headers
    from abiding_abi import verify as verifying
    from abiding_abi.compilers import Options

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    wanted = parse(target) if target else None
    chosen = torch_headers.choose(headers, fetch_headers, say)
    options = Options(cxx, nvcc, std, tuple(include or ()), tuple(define or ()), not no_cuda, timeout)
    sources = list(verifying.units(paths))
    results = []
    for number, source in enumerate(sources, 1):
        if sys.stderr.isatty():
            say(f"[{number}/{len(sources)}] {source}")
        results.append(verifying.verify(source, chosen, options))
    if json:
        print(dumps({"headers": chosen.release, "files": [r.as_json() for r in results]}, indent=1))
    else:
        print("\n".join(verifying.report(results, wanted)))
    raise typer.Exit(verifying.exit_status(results, wanted))


@app.command()
def symbols(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern with * and ?.")] = "",
    kind: Annotated[str | None, typer.Option(help="shim, function, overload, member, type, constant or macro.")] = None,
    target: Annotated[str | None, typer.Option(help="Only what runs on this torch.")] = None,
    headers: Annotated[str | None, typer.Option(help="Only what this torch's headers declare.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """List the stable API: the headers that first have a name, and the oldest torch that its use runs on."""
    from abiding_abi import symbols as table
    from abiding_abi.versions import parse

    oldest = parse(target) if target else None
    found = table.search(pattern, kind, oldest, parse(headers) if headers else None)
    if json:
        print(dumps([s.as_json() for s in found], indent=1))
    elif found:
        print("\n".join(table.listing(found)))
    else:
        print(f"nothing stable matches '{pattern}'; 'abiding-abi explain --list' lists what replaces unstable names")
    raise typer.Exit(0 if found else 1)


@app.command()
def wrappers(
    names: Annotated[list[str] | None, typer.Argument(help="Functions to write; all of them without any.")] = None,
    show: Annotated[bool, typer.Option("--list", help="List the functions instead.")] = False,
) -> None:
    """Write a header of functions that the stable API lacks: dispatcher calls by name, checked on several torches."""
    from abiding_abi import wrappers as header

    if show:
        print("\n".join(header.listing()))
    else:
        print(header.header(names or None), end="")


def main() -> None:
    """Run the command line; what the user can repair is one line and exit status 2."""
    try:
        app()
    except UserError as error:
        print(f"abiding-abi: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        raise SystemExit(1) from None
