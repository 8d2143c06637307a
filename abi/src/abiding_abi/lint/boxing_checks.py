"""Registrations that compile and are wrong: types that do not box, schemas that do not fit, namespaces taken twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from abiding_abi import boxing, signatures
from abiding_abi.registrations import Block, Call, blocks
from abiding_abi.signatures import Function, bare
from abiding_abi.usage import Usage, Use

if TYPE_CHECKING:
    from abiding_abi.lint.engine import Context

Hit = tuple[int, int, str]


def _registered(context: Context) -> Iterator[tuple[Block, Call, Function]]:
    """Functions that this file registers, with their definition if the project's files here have it."""
    for block in blocks(context.source):
        if not block.stable:
            continue
        for call in block.calls:
            if call.method == "impl" and call.function:
                function = definition(context, call.function)
                if function:
                    yield block, call, function


def definition(context: Context, name: str) -> Function | None:
    """The definition of a function, or else its declaration, in the file or its headers."""
    last = name.rpartition("::")[2]
    found = [f for source in context.project.closure(context.source) for f in signatures.find(source, last)]
    return signatures.best(found)


def _types(context: Context) -> Iterator[tuple[Call, str, str]]:
    """Call, type and parameter's name of everything that is boxed."""
    for _, call, function in _registered(context):
        if function.template:
            continue
        for parameter in function.parameters:
            yield call, parameter.type, parameter.name
        yield call, function.result, "the result"


def _function_span(call: Call) -> tuple[int, int]:
    return call.arguments[1].start, call.arguments[1].end


def narrow_type(context: Context) -> Iterator[Hit]:
    """A type that boxes without conversion."""
    for call, kind, name in _types(context):
        boxed = boxing.box(kind)
        if boxed and not boxed.exact and "char*" not in bare(kind):
            yield (*_function_span(call), f"{name}: {kind} has to be {boxed.wide}")


def char_pointer(context: Context) -> Iterator[Hit]:
    """``const char*``"""
    for call, kind, name in _types(context):
        if "char*" in bare(kind):
            yield (*_function_span(call), f"{name}: {kind} has to be std::string")


def unboxable_type(context: Context) -> Iterator[Hit]:
    """A type that nothing carries."""
    for call, kind, name in _types(context):
        if boxing.box(kind) is None and (_is_class(context, bare(kind)) or not _unknown(bare(kind))):
            yield (*_function_span(call), f"{name}: {kind} does not box")


def _is_class(context: Context, kind: str) -> bool:
    definition = re.compile(rf"\b(?:struct|class)\s+{re.escape(kind)}\b\s*[:{{]")
    return any(definition.search(source.code) for source in context.project.closure(context.source))


def _unknown(kind: str) -> bool:
    """Names that may be aliases of types that box, and auto."""
    return (
        kind in ("auto", "")
        or bool(re.search(r"Generator|StableIValue|Tensor", kind))
        or (bool(re.fullmatch(r"[\w:]+_t|[A-Z_]+", kind)) and kind not in ("uint64_t",))
    )


def _schemas(context: Context) -> dict[str, boxing.Schema]:
    found: dict[str, boxing.Schema] = {}
    for source in context.project.closure(context.source):
        for block in blocks(source):
            for call in block.calls:
                if call.method == "def" and call.literal:
                    schema = boxing.parse_schema(call.literal)
                    if schema:
                        found[schema.name.rpartition("::")[2]] = schema
    return found


def schema_mismatch(context: Context) -> Iterator[Hit]:
    """A schema against the signature behind it."""
    schemas = None
    for _, call, function in _registered(context):
        schemas = _schemas(context) if schemas is None else schemas
        schema = schemas.get((call.literal or "").rpartition("::")[2])
        if schema is None or function.template:
            continue
        given, wanted = len(function.parameters), len(schema.arguments)
        if given != wanted:
            yield (*_function_span(call), f"the schema has {wanted} arguments, {function.name} takes {given}")
            continue
        for argument, parameter in zip(schema.arguments, function.parameters, strict=True):
            boxed = boxing.box(parameter.type)
            if boxed and not boxing.same_type(argument.type, boxed.schema):
                yield (
                    *_function_span(call),
                    f"{argument.name}: {argument.type} in the schema, {parameter.type} in C++",
                )
        results = boxing.box(function.result)
        if results:
            said = "(" + ", ".join(schema.results) + ")" if len(schema.results) != 1 else schema.results[0]
            if not boxing.same_type(said, results.schema) and not (said in ("", "()") and results.schema == "()"):
                yield (*_function_span(call), f"the schema returns {said}, {function.name} returns {function.result}")


def unmarked_mutation(context: Context) -> Iterator[Hit]:
    """A parameter that the body writes, and whose argument has no mark."""
    schemas = None
    usage: Usage | None = None
    for _, call, function in _registered(context):
        schemas = _schemas(context) if schemas is None else schemas
        schema = schemas.get((call.literal or "").rpartition("::")[2])
        if schema is None or function.body is None or len(schema.arguments) != len(function.parameters):
            continue
        for argument, parameter in zip(schema.arguments, function.parameters, strict=True):
            if argument.mutated or not argument.type.startswith("Tensor") or not parameter.name:
                continue
            usage = usage or Usage(context.project, context.project.closure(context.source))
            if usage.tensor(function.source, function.body, parameter.name) == Use.WRITTEN:
                yield (
                    *_function_span(call),
                    f"{function.name} writes {parameter.name}, which has no (a!) in the schema",
                )


def second_library(context: Context) -> Iterator[Hit]:
    """STABLE_TORCH_LIBRARY of a namespace that an earlier block, here or in another file of the run, has taken."""
    taken = context.project.libraries
    for block in blocks(context.source):
        if block.kind == "library" and block.stable:
            place = (str(context.source.path), block.start)
            first = taken.setdefault(block.namespace, place)
            if first != place:
                yield block.start, block.name_end, f"{block.namespace} is already defined in {first[0]}"


def composite_tensor(context: Context) -> Iterator[Hit]:
    """A kernel on tensors under CompositeExplicitAutograd."""
    for block, call, function in _registered(context):
        if block.key == "CompositeExplicitAutograd" and any("Tensor" in p.type for p in function.parameters):
            yield call.start, call.end, function.name


def library_def(context: Context) -> Iterator[Hit]:
    """``m.def(schema, &f)`` and ``m.impl(name, &f)`` without TORCH_BOX."""
    for block in blocks(context.source):
        for call in block.calls:
            if len(call.arguments) < 2:
                continue
            second = context.code[slice(*call.arguments[1])]
            if second.startswith(("TORCH_BOX", "{")) or "Tag" in second:
                continue
            if call.method == "def" or (call.method == "impl" and not block.stable):
                yield call.start, call.end, call.function or ""


CHECKS: dict[str, Callable[[Context], Iterator[Hit]]] = {
    "narrow_type": narrow_type,
    "char_pointer": char_pointer,
    "unboxable_type": unboxable_type,
    "schema_mismatch": schema_mismatch,
    "unmarked_mutation": unmarked_mutation,
    "second_library": second_library,
    "composite_tensor": composite_tensor,
    "library_def": library_def,
}
