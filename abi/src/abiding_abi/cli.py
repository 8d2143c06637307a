"""The command line; every command imports what it needs, so that ``lint`` of a few files starts at once."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from abiding_abi.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """Move PyTorch extensions to the LibTorch Stable ABI and keep them there."""


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
    from abiding_abi.versions import parse

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


def main() -> None:
    """Run the command line; what the user can repair is one line and exit status 2."""
    try:
        app()
    except UserError as error:
        print(f"abiding-abi: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        raise SystemExit(1) from None
