"""Fail if a line of a source file is longer than 120 columns.

    python tools/check_lines.py [FILE ...]

Without files: all that git tracks or would add. Not sources: JSON, SVG, TSV, the license, and what `make docs` writes
between its markers. Excepted: Markdown tables, and lines that hold a URL.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

COLUMNS = 120
NOT_SOURCES = (".json", ".svg", ".tsv", "LICENSE")
MARKER = re.compile(r"<!-- (?P<end>/?)results:")


def long_lines(name: str, text: str) -> list[str]:
    """A complaint for each line of the file that is too long."""
    complaints = []
    is_markdown, is_generated = name.endswith(".md"), False
    for number, line in enumerate(text.split("\n"), start=1):
        if is_markdown and (marker := MARKER.match(line)):
            is_generated = not marker["end"]
        if is_generated or "://" in line or (is_markdown and line.startswith("|")):
            continue
        if len(line) > COLUMNS:
            complaints.append(f"{name}:{number}: {len(line)} columns; expected at most {COLUMNS}")
    return complaints


def sources() -> list[str]:
    """The source files of the repository; of those that git tracks, the ones that still exist."""
    listed = subprocess.check_output(["git", "ls-files", "--cached", "--others", "--exclude-standard"], text=True)
    return [name for name in listed.splitlines() if not name.endswith(NOT_SOURCES) and Path(name).is_file()]


if __name__ == "__main__":
    files = sys.argv[1:] or sources()
    sys.exit("\n".join(complaint for file in files for complaint in long_lines(file, Path(file).read_text())) or None)
