"""``abiding-abi-hook FILE...``: lint for pre-commit.

The same as ``abiding-abi lint`` with the settings of pyproject.toml, without the command line's imports: those alone
take longer than the linting of a commit.
"""

from __future__ import annotations

import sys
from pathlib import Path

from abiding_abi import lint
from abiding_abi.errors import UserError
from abiding_abi.lint import report


def main() -> None:
    """Lint the files given; exit status 1 if there is a finding, 2 if something is wrong with the call."""
    try:
        if unknown := [argument for argument in sys.argv[1:] if argument.startswith("-")]:
            raise UserError(f"unknown option {unknown[0]}; settings come from [tool.abiding-abi] of pyproject.toml")
        found = lint.run(map(Path, sys.argv[1:]), lint.load(Path.cwd()))
    except UserError as error:
        print(f"abiding-abi-hook: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if found.findings or found.problems:
        print(report.text(found))
    raise SystemExit(int(any(f.level != "note" for f in found.findings)))


if __name__ == "__main__":
    main()
