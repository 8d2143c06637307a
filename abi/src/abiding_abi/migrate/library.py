"""TORCH_LIBRARY blocks and RegisterOperators on the stable ABI."""

from __future__ import annotations

import re
from collections import defaultdict

from abiding_abi import boxing, lexical
from abiding_abi.composition import is_composed
from abiding_abi.lint.engine import Hit
from abiding_abi.migrate.edits import Edit, replace
from abiding_abi.migrate.schema import Operator, operator
from abiding_abi.migrate.simple import whole_line
from abiding_abi.migrate.work import Answer, Handler, Work
from abiding_abi.registrations import Block, Call, blocks
from abiding_abi.signatures import best

_KEY = re.compile(
    r"(?:c10|torch|at)\s*::\s*(?:k(\w+)|(?:DispatchKey|DeviceType)\s*::\s*(\w+))\Z"
    r"|torch::headeronly::DeviceType::(\w+)\Z"
)
GENERIC, COMPOSED = "CompositeExplicitAutograd", "CompositeImplicitAutograd"
"""Keys of what runs on every device: below autograd, and where autograd follows the functions that are called."""


def library(work: Work, hit: Hit) -> Answer:
    """A TORCH_LIBRARY_IMPL block's name, and a def or impl with a function."""
    if hit.name == "TORCH_LIBRARY_IMPL":
        block = next((b for b in blocks(work.source) if b.start == hit.start), None)
        if block is None:
            return "the block is not readable"
        if block.key in (
            "Autograd",
            "AutogradCPU",
            "AutogradCUDA",
            "CatchAll",
            "Autocast",
        ):
            return f"kernels under {block.key} need autograd or tracing, which has no stable C++ form"
        return replace(hit.start, hit.end, "STABLE_TORCH_LIBRARY_IMPL", rule=hit.rule.code)
    if hit.name == "library_def":
        return _call(work, hit)
    if hit.name in ("TORCH_SELECTIVE_NAME", "TORCH_SELECTIVE_SCHEMA"):
        read = work.call(hit.end)
        return replace(hit.start, read[2], read[0][0], rule=hit.rule.code) if read and read[0] else "not a call"
    if hit.name in ("TORCH_FN", "TORCH_EXTENSION_NAME"):
        inside = any(b.start <= hit.start < b.end for b in blocks(work.source))
        name = "TORCH_EXTENSION_NAME"
        return None if inside and hit.name != name else f"{hit.name} has no counterpart"
    return "no counterpart"


def _call(work: Work, hit: Hit) -> Answer:
    for block in blocks(work.source):
        for call in block.calls:
            if call.start == hit.start:
                return _impl(work, hit, block, call) if call.method == "impl" else _definition(work, hit, block, call)
    return "the call is not readable"


def _key(work: Work, call: Call) -> str | None:
    """The dispatch key between an impl's name and its function, where there is one."""
    if len(call.arguments) != 3:
        return None
    found = _KEY.match(work.plain(call.arguments[1]))
    return (found[1] or found[2] or found[3]) if found else ""


def _function(work: Work, call: Call) -> str | None:
    text = work.word(call.arguments[-1])
    found = re.fullmatch(r"(?:TORCH_FN|TORCH_BOX)?\s*\(?\s*&?\s*((?:\w+\s*::\s*)*\w+)\s*\)?", text)
    return re.sub(r"\s", "", found[1]) if found else None


def _impl(work: Work, hit: Hit, block: Block, call: Call) -> Answer:
    function = _function(work, call)
    if function is None:
        return "TORCH_BOX needs the name of a function: lambdas, casts and templates have to get one"
    key = _key(work, call)
    if key is None:
        span = call.arguments[-1]
        return replace(*span, f"TORCH_BOX(&{function})", rule=hit.rule.code)
    if not key:
        return "the dispatch key is not readable"
    return _move(work, hit, block, call, key, work.text[slice(*call.arguments[0])], function)


def _definition(work: Work, hit: Hit, block: Block, call: Call) -> Answer:
    """``m.def(schema, &f)``: the schema stays, the function goes into a block with a key."""
    function = _function(work, call)
    if call.literal is None or function is None:
        return "the schema or the function is not readable"
    schema = boxing.parse_schema(call.literal)
    name = schema.name if schema else call.literal
    found = best(work.usage.functions(function))
    if schema is None:
        if found is None:
            return f"{function} is not found: write its schema"
        made = operator(call.literal, found, work.usage, callee=function, pybind=False)
        if isinstance(made, str):
            return made
        if made.wrapper:
            work.scratch.setdefault("widening", {}).setdefault(block.start, []).extend([*made.wrapper, ""])
            function = made.function
        head = f'{block.variable}.def("{made.schema}")'
    else:
        opened = work.code.index("(", call.start)
        head = work.text[call.start : opened + 1] + work.text[slice(*call.arguments[0])] + ")"
    key = COMPOSED if found and is_composed(found, work.usage) else GENERIC
    return _move(work, hit, block, call, key, f'"{name.rpartition("::")[2]}"', function, head)


def _move(
    work: Work, hit: Hit, block: Block, call: Call, key: str, name: str, function: str, head: str | None = None
) -> list[Edit]:
    """Take an impl out of its block, and put it into one of a key behind it."""
    moved = work.scratch.setdefault("impls", {})
    moved.setdefault((block.end, block.namespace, block.variable, key), []).append((name, function, hit.rule.code))
    if head is not None:
        return [replace(call.start, call.end, head, rule=hit.rule.code)]
    end = lexical.skip_space(work.code, call.end)
    stop = end + 1 if work.code[end : end + 1] == ";" else call.end
    return [replace(*whole_line(work, call.start, stop), rule=hit.rule.code)]


def moved_blocks(work: Work) -> list[Edit]:
    """Blocks for the impls that were taken out."""
    by_end: dict[int, list[str]] = defaultdict(list)
    rules: dict[int, str] = {}
    for (end, namespace, variable, key), entries in work.scratch.get("impls", {}).items():
        rules[end] = entries[0][2]
        lines = [
            f"m.impl({name}, TORCH_BOX(&{function}));".replace("m.", f"{variable}.", 1) for name, function, _ in entries
        ]
        head = f"STABLE_TORCH_LIBRARY_IMPL({namespace}, {key}, {variable}) {{"
        if len(lines) == 1 and "\n" not in work.text[work.text.rfind("TORCH_LIBRARY", 0, end) : end]:
            by_end[end].append(f"{head} {lines[0]} }}")
        else:
            by_end[end].append(work.newline.join([head, *(f"  {line}" for line in lines), "}"]))
    behind = [
        replace(end, end, *(2 * work.newline + text for text in texts), rule=rules[end])
        for end, texts in by_end.items()
    ]
    # In front of the line end before the block, whose own name another edit replaces.
    wrappers = work.scratch.get("widening", {}).items()
    return behind + [
        replace(start - 1, start - 1, *(work.newline + line for line in lines[:-1]), work.newline, rule="REG004")
        for start, lines in wrappers
    ]


def block_lines(namespace: str, operators: list[Operator], keys: list[str], *, fragment: bool) -> list[str]:
    """The lines that define and implement operators."""
    kind = "STABLE_TORCH_LIBRARY_FRAGMENT" if fragment else "STABLE_TORCH_LIBRARY"
    lines: list[str] = []
    for op in operators:
        if op.wrapper:
            lines += [*_conditional(op, op.wrapper), ""]
    lines.append(f"{kind}({namespace}, m) {{")
    for op in operators:
        notes = [f"  // ABI-TODO({rule}):{text}" for rule, _, text in (note.partition(":") for note in op.notes)]
        lines += _conditional(op, [*notes, f'  m.def("{op.schema}");'])
    lines.append("}")
    for key in [*keys, GENERIC, COMPOSED]:
        chosen = [op for op in operators if key in _keys_of(op, keys)]
        if chosen:
            lines += ["", f"STABLE_TORCH_LIBRARY_IMPL({namespace}, {key}, m) {{"]
            for op in chosen:
                lines += _conditional(op, [f'  m.impl("{op.name}", TORCH_BOX(&{op.function}));'])
            lines.append("}")
    return lines


def _keys_of(op: Operator, devices: list[str]) -> list[str]:
    return [COMPOSED] if op.composed else devices if op.tensors else [GENERIC]


def _conditional(op: Operator, lines: list[str]) -> list[str]:
    return [f"#if {op.condition}", *lines, "#endif"] if op.condition else lines


def device_keys(work: Work, functions: list[str]) -> list[str]:
    """CPU, and CUDA where the project has any."""
    cuda = any(
        s.path.suffix in (".cu", ".cuh")
        or re.search(r"\bis_cuda\b|\bkCUDA\b|\bcudaStream_t\b|DeviceType::CUDA", s.code)
        for s in work.usage.sources
    )
    return ["CPU", "CUDA"] if cuda else ["CPU"]


def register_operators(work: Work, hit: Hit) -> Answer:
    """``static auto registry = torch::RegisterOperators().op(name, &f)...;``"""
    code = work.code
    begin = code.rfind(";", 0, hit.start) + 1
    brace = max(code.rfind("}", 0, hit.start), code.rfind("{", 0, hit.start)) + 1
    begin = lexical.skip_space(code, max(begin, brace, _line_after_directive(code, hit.start)))
    end = code.find(";", hit.end)
    if end < 0 or not re.fullmatch(
        r"(?:static\s+)?(?:const\s+)?(?:auto|(?:torch|c10)(?:::jit)?::RegisterOperators)\s+\w+\s*=?\s*",
        code[begin : hit.start],
    ):
        return "the registration is not one declaration"
    operators: list[Operator] = []
    namespace = ""
    at = hit.end
    for match in re.compile(r"\bop\s*(?=\()").finditer(code, hit.end, end):
        read = lexical.arguments(code, match.end())
        if not read or len(read[0]) != 2:
            return "an operator's options are not readable"
        spans, at = read
        text = boxing.joined_literal(work.text[slice(*spans[0])])
        function = re.fullmatch(r"&?\s*((?:\w+::)*\w+)", work.word(spans[1]))
        if text is None or function is None or "::" not in text:
            return "an operator's name or function is not readable"
        schema = boxing.parse_schema(text)
        namespace, _, name = (schema.name if schema else text).partition("::")
        found = best(work.usage.functions(function[1]))
        if found is None:
            return f"{function[1]} is not found: write its schema"
        made = operator(name, found, work.usage, callee=function[1], pybind=False)
        if isinstance(made, str):
            return made
        if schema:
            made.schema, made.notes = text.partition("::")[2], []
        operators.append(made)
    if code[at:end].strip() or not operators:
        return "the registration is not readable"
    keys = device_keys(work, [op.function for op in operators])
    lines = block_lines(namespace, operators, keys, fragment=True)
    return replace(begin, end + 1, work.newline.join(lines), rule=hit.rule.code)


def _line_after_directive(code: str, at: int) -> int:
    found = 0
    for match in re.compile(r"^[ \t]*#[^\n]*\n", re.MULTILINE).finditer(code, max(0, at - 2000), at):
        found = match.end()
    return found


HANDLERS: dict[str, Handler] = {"library": library, "register_operators": register_operators}
