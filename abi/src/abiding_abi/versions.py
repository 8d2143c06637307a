"""Torch releases as pairs of numbers."""

from __future__ import annotations

import re

from abiding_abi.errors import UserError

Version = tuple[int, int]

OLDEST: Version = (2, 10)
"""The oldest release that a stable binary can target."""
NEWEST: Version = (2, 15)
"""The newest release whose headers the rule table was checked against."""


def parse(text: str) -> Version:
    """Read ``2.10`` or ``2.10.1``; the patch level does not matter to the stable ABI."""
    match = re.fullmatch(r"(\d+)\.(\d+)(?:\.\d+.*)?", text.strip())
    if not match:
        raise UserError(f"'{text}' is not a torch version such as 2.10")
    return int(match[1]), int(match[2])


def dotted(version: Version) -> str:
    """Write a version as people read it."""
    return f"{version[0]}.{version[1]}"
