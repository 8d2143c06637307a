"""The pages say what the result files say; no page is more than half tables, and no link leads nowhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY = [*PAGES, *sorted((ROOT / "docs/results").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
IS_TABLE = {"glossary.md"}
"""A page that is a table by what it is."""


def share_of_tables(text: str) -> float:
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(line.startswith("|") for line in lines) / len(lines)


def anchors(text: str) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        if "://" in target:
            continue
        if not path.exists() or (anchor and anchor not in anchors(path.read_text())):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_is_more_than_half_tables(page: Path) -> None:
    assert page.name in IS_TABLE or share_of_tables(page.read_text()) <= 0.5


@pytest.mark.parametrize("page", EVERY, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_and_a_page_of_tables_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = "# A `b_c`: d\n[a](#a-b_c-d) [b](#nothing) [c](page.md#a-b_c-d) [d](nowhere.md) [e](https://nowhere)\n"
    page.write_text(text)
    assert broken_links(page, text) == ["#nothing", "nowhere.md"]
    assert share_of_tables("a\n\n| b |\n|---|\n| c |\n") == 0.75


def test_each_plot_stands_on_a_page() -> None:
    shown = {name for page in EVERY for name in re.findall(r"plots/([\w.-]+\.svg)", page.read_text())}
    assert shown == {path.name for path in (ROOT / "docs/plots").iterdir()}


def test_the_pages_are_what_make_docs_writes() -> None:
    report.main(["--root", str(ROOT), "--check"])


def test_a_page_that_differs_is_named(tmp_path: Path) -> None:
    for part in ("docs", "benchmarks/results", "README.md"):
        source = ROOT / part
        copy = shutil.copytree if source.is_dir() else shutil.copy
        (tmp_path / part).parent.mkdir(exist_ok=True)
        copy(source, tmp_path / part)
    page = tmp_path / "docs/results/all_reduce.md"
    page.write_text(re.sub(r"\*\*\d+\.\d+\*\*", "**0.01**", page.read_text(), count=1))
    (tmp_path / "docs/results/reduce_rms.md").unlink()
    with pytest.raises(SystemExit, match=r"would change .*results/all_reduce\.md, .*results/reduce_rms\.md$"):
        report.main(["--root", str(tmp_path), "--check"])
    for file in (tmp_path / "benchmarks/results").glob("*.json"):
        file.unlink()
    with pytest.raises(ValueError, match="holds no result files; `make bench` on a machine with a GPU makes some"):
        report.texts(tmp_path)
