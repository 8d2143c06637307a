"""Calls of operators, well-formed and spoiled: what the malformed-call tests of every group share.

A group's module here has `well_formed(op, device, rng)`, which makes an accepted call, and `SPOILS`: for each operator
and argument the values that must be refused, by what is wrong with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from abiding.testing.comparison import assert_bitwise_equal
from abiding.testing.guarded import GuardedTensor, guarded


@dataclass
class Call:
    """One call of an operator: its arguments by name, and the guards of their memory.

    `op` may name a namespace other than abiding's (`abiding_custom_ar::fault`), an overload (`round.out`) and, after a
    space, a variant of the call (`grouped_mm of bfloat16`).
    """

    op: str
    args: dict[str, Any]
    guards: dict[str, GuardedTensor]
    before: dict[str, Tensor] = field(default_factory=dict)
    costly: Mapping[str, Container[int]] = field(default_factory=dict)
    """By argument: numbers that would be accepted, and take too long or too much memory for a test."""
    strangers: Sequence[int] = (1, 4096, 1 << 46)
    """Addresses and handles that none of the arguments may be."""
    close: Callable[[Any], None] = lambda result: None
    """Gives back what was made for the call, and its result, which is None if it was refused."""

    @property
    def name(self) -> str:
        return self.op.partition(" ")[0].rpartition("::")[2].partition(".")[0]

    def raw(self) -> Any:
        namespace, _, op = self.op.partition(" ")[0].rpartition("::")
        overload = op.partition(".")[2]
        packet = getattr(getattr(torch.ops, namespace or "abiding"), self.name)
        return getattr(packet, overload or "default")(**self.args)

    def remember(self) -> Call:
        self.before = {name: guard.storage.clone() for name, guard in self.guards.items()}
        return self

    def spoiled(self, name: str, spoil: Spoil) -> Call:
        self.remember()
        self.args[name] = spoil(self, name)
        return self

    def assert_untouched(self, names: Iterable[str] | None = None) -> None:
        for name in self.guards if names is None else names:
            if not torch.equal(self.guards[name].storage, self.before[name]):  # bytes; the other says where
                assert_bitwise_equal(self.guards[name].storage, self.before[name], name)

    def check(self) -> None:
        for guard in self.guards.values():
            guard.check()


# --- values that must be refused --------------------------------------------------------------------------------------

Spoil = Callable[[Call, str], Any]
"""Takes a call and the name of an argument, and returns a value for it that must be refused."""

Spoils = dict[str, dict[str, dict[str, Spoil]]]
"""By operator, by argument, by what is wrong."""


def changed(change: Callable[[Any], Any]) -> Spoil:
    return lambda call, name: change(call.args[name])


def scalar(value: Any) -> Spoil:
    return changed(lambda _: value)


def other_dtype(dtype: torch.dtype) -> Spoil:
    return changed(lambda x: x.view(dtype) if dtype.itemsize == x.element_size() else x.float().to(dtype))


def resized(**sizes: int) -> Spoil:
    """The argument with other sizes (d0=5: five rows), in fresh memory."""

    def change(x: Tensor) -> Tensor:
        return x.new_zeros([sizes.get(f"d{dim}", size) for dim, size in enumerate(x.shape)])

    return changed(change)


def grown(dim: int, by: int) -> Spoil:
    """The argument with more elements in one dimension, or fewer, in fresh memory."""
    return changed(lambda x: x.new_zeros([size + by * (d == dim % x.dim()) for d, size in enumerate(x.shape)]))


def strided(*strides: int) -> Spoil:
    def change(x: Tensor) -> Tensor:
        span = 1 + sum((n - 1) * step for n, step in zip(x.shape, strides, strict=True))
        return x.new_zeros(span).as_strided(x.shape, strides)

    return changed(change)


def misaligned(by: int) -> Spoil:
    return changed(lambda x: guarded(x.shape, x.dtype, x.device, strides=x.stride(), offset_bytes=by).tensor)


FLAT = changed(lambda x: x.flatten())
DEEPER = changed(lambda x: x[None])
META = changed(lambda x: x.to("meta"))


def every(spoils: Spoils, prefix: str = "") -> Iterator[Any]:
    """A test's parameters: operator, argument, spoil; ids without the prefix of operators."""
    for op, arguments in spoils.items():
        for name, wrong in arguments.items():
            for what, spoil in wrong.items():
                yield pytest.param(op, name, spoil, id=f"{op.removeprefix(prefix)}-{name}-{what}")


# --- refusals ---------------------------------------------------------------------------------------------------------


def refusal(call: Callable[[], Any], error: type[Exception] | tuple[type[Exception], ...], pattern: str = "") -> str:
    """The error of a call that must be refused: one line that says what was given and what is expected."""
    with pytest.raises(error) as caught:
        call()
    lines = str(caught.value).splitlines()
    if caught.type is RuntimeError:  # of an operator; torch adds lines of its own
        lines = [line for line in lines if line.startswith("abiding::")][:1]
    assert len(lines) == 1, caught.value
    assert "; expected" in lines[0], lines[0]
    assert re.search(pattern, lines[0]), f"{lines[0]}\nis not: {pattern}"
    return lines[0]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


def assert_operator_refuses(call: Call, name: str, spoil: Spoil, blamed: Iterable[str] = ()) -> None:
    """`blamed` are other arguments that the error may name instead: sizes that must match."""
    before = call.args[name]
    call.spoiled(name, spoil)
    text = refusal(call.raw, RuntimeError, rf"^abiding::{call.name}(\.out)?: .+; expected .+")
    assert {name, *blamed} & words(text), text
    if not isinstance(before, Tensor) or "has dtype" in text or "bytes past a multiple" in text:
        assert name in words(text), text
    call.assert_untouched()


def assert_function_refuses(
    call: Call,
    name: str,
    spoil: Spoil,
    function: Callable[..., Any],
    run: Callable[[Call], Any],
    blamed: Iterable[str] = (),
) -> None:
    """The same of a public function that `run` calls; `blamed` are the argument's own name there, and others."""
    before = call.args[name]
    call.spoiled(name, spoil)
    wrong_dtype = isinstance(before, Tensor) and before.dtype != call.args[name].dtype
    text = refusal(lambda: run(call), TypeError if wrong_dtype else ValueError)
    assert {call.name, function.__name__} & words(text), f"neither operator nor function is named: {text}"
    assert set(blamed) & words(text), text
    call.assert_untouched()


OURS = r"abiding::\w+: .+; expected .+"
TORCHS = (
    r"Could not run 'abiding|attempted to run this operator with Meta|There were no tensor arguments to this function"
    r"|abiding\w*::\w+\(\) .*(argument '|argument\(s\))|abiding\w*::.*Overflow"
)
"""The dispatcher's and the parser's own: a backend that no operator has, an argument that is no tensor or number."""


def is_refused(call: Call, *, spoiled: bool, step: int) -> bool:
    """Make one call of a fuzz test; whether it was refused, in words of ours that name operator and argument and with
    no byte changed. A call that is not spoiled must be accepted."""
    call.remember()
    try:
        result = call.raw()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        text = str(error)
        ours = re.search(OURS, text)
        named = call.name in text and (not ours or set(call.args) & words(ours[0].partition(": ")[2]))
        if not spoiled or not named or not (ours or re.search(TORCHS, text)):
            pytest.fail(f"step {step}: {call.op}: {text}")
        call.assert_untouched()
        call.close(None)
        return True
    call.check()
    call.close(result)
    return False
