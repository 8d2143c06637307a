"""Turns what the operators raise into the exceptions that Python users expect, under the names of the public face."""

from __future__ import annotations

import re
from collections.abc import Mapping


def translated(error: RuntimeError, function: str, names: Mapping[str, str]) -> Exception:
    """The TypeError or ValueError that an operator's argument error stands for; other errors come back as they are.

    Args:
        error: what the operator raised.
        function: the public function that called it.
        names: the operator's argument names, mapped to the function's.
    """
    text = next((line for line in str(error).splitlines() if line.startswith("abiding::")), "")
    if match := re.match(r"abiding::\w+: (?P<complaint>\w+.*; expected .*)", text):
        complaint = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), match["complaint"])
        return (TypeError if " has dtype " in text else ValueError)(f"{function}: {complaint}")
    if match := re.search(
        r"Expected a value of type '(.+?)' for argument '(\w+)' but instead found type '(.+?)'", str(error)
    ):
        expected, argument, found = match.groups()
        return TypeError(f"{function}: {names.get(argument, argument)} is a {found}; expected a {expected}")
    return error
