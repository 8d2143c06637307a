"""Whether a function is made of torch's functions alone, so that autograd followed what it does."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from abiding_abi.wrappers import NAMES

if TYPE_CHECKING:
    from abiding_abi.signatures import Function
    from abiding_abi.usage import Usage

_RAW = re.compile(
    r"\b(?:(?:mutable_|const_)?data_ptr|\w*ccessor\w*|\w*_DISPATCH_\w+|from_blob|item|storage|NoGradGuard|InferenceMode"
    r"|AutoDispatch\w*|detach|data|autograd)\b|<<<"
)
"""What leaves torch's functions, or autograd."""
_CALLED = re.compile(r"(?<![\w.>:])((?:\w+\s*::\s*)*[A-Za-z_]\w*)\s*\(")
_COMPUTES = re.compile(r"(?:\.|->|::)\s*(\w+)\s*\(")
_MAKERS = re.compile(
    r"(?:new_)?(?:empty|zeros|ones|full|rand\w*|arange|eye|options|tensor|TensorOptions|dtype|device)\w*"
)
_COMPUTED = frozenset(
    (
        "matmul",
        "sum",
        "amax",
        "clone",
        "contiguous",
        "reshape",
        "view",
        "transpose",
        "select",
        "narrow",
        "flatten",
        "pad",
    )
)
_SIGN = re.compile(r"[\w)\]]\s*[-+*/]\s*[\w(]")


def is_composed(function: Function, usage: Usage) -> bool:
    """Whether a function computes tensors, by torch's functions and by functions of the project that do the same."""
    if "Tensor" not in function.result or not _torch_alone(function, usage, set()):
        return False
    assert function.body
    code = function.source.code[slice(*function.body)]
    names = {name for name in _COMPUTES.findall(code) if not _MAKERS.fullmatch(name)}
    calls = any(usage.functions(name) for name in _CALLED.findall(code))
    return bool(names & (NAMES | _COMPUTED) or calls or _SIGN.search(code))


def _torch_alone(function: Function, usage: Usage, seen: set[str]) -> bool:
    if function.body is None:
        return False
    code = function.source.code[slice(*function.body)]
    if _RAW.search(code):
        return False
    for name in set(_CALLED.findall(code)):
        last = re.sub(r"\s", "", name).rpartition("::")[2]
        if last in seen or name.startswith(("at::", "torch::", "c10::", "std::")):
            continue
        seen.add(last)
        candidates = usage.functions(last)
        defined = [candidate for candidate in candidates if candidate.body]
        if candidates and (not defined or not all(_torch_alone(f, usage, seen) for f in defined)):
            return False
    return True
