"""How edits of one file go together."""

from __future__ import annotations

import random
import re

from abiding_abi.lexical import Span
from abiding_abi.migrate.edits import consistent, render, replace

INCLUDE = re.compile(r"^#include[^\n]*\n", re.MULTILINE)


def test_edits_nest_in_any_order() -> None:
    text = "abcdefghij"
    outer = replace(1, 9, "<", Span(2, 8), ">")
    inner = [replace(2, 4, "X"), replace(6, 8, "(", Span(6, 8), ")")]
    edits = [*inner, outer]
    random.Random(0).shuffle(edits)
    kept, crossing = consistent(edits)
    assert (render(text, kept), crossing) == ("a<Xef(gh)>j", [])


def test_crossing_edits_are_not_applied_together() -> None:
    kept, crossing = consistent([replace(0, 4, "x"), replace(2, 6, "y")])
    assert (len(kept), len(crossing)) == (1, 1)
