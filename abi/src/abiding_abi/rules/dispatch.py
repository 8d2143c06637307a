"""Dispatch on dtype."""

from abiding_abi.rules.model import Check, Macro, Rule

TYPE_GROUPS = {
    "FLOATING_TYPES": ("AT_FLOATING_TYPES",),
    "ALL_TYPES": ("AT_ALL_TYPES",),
    "INTEGRAL_TYPES": ("AT_INTEGRAL_TYPES",),
    "COMPLEX_TYPES": ("AT_COMPLEX_TYPES",),
    "FLOATING_AND_COMPLEX_TYPES": ("AT_FLOATING_TYPES", "AT_COMPLEX_TYPES"),
    "ALL_TYPES_AND_COMPLEX": ("AT_ALL_TYPES_AND_COMPLEX",),
    "REDUCED_FLOATING_TYPES": (),
    "QINT_TYPES": ("AT_QINT_TYPES",),
}
"""What stands after AT_DISPATCH_, and the type lists of Dispatch_v2.h that mean the same."""
FIXED_TYPES = {"REDUCED_FLOATING_TYPES": ("Half", "BFloat16")}
"""Types that a group has beside its lists."""

_COMMA = (
    "The lambda goes in parentheses, not into AT_WRAP, which does not protect the commas of f<scalar_t, 2> or "
    "<<<a, b>>> in THO_DISPATCH_V2."
)

RULES = (
    Rule(
        "DIS001",
        "AT_DISPATCH_FLOATING_TYPES(type, name, [&] {..})",
        "THO_DISPATCH_V2(type, name, ([&] {..}), AT_EXPAND(AT_FLOATING_TYPES))",
        (Macro(("AT_DISPATCH_FLOATING_TYPES", "AT_DISPATCH_FLOATING_AND_COMPLEX_TYPES", "AT_DISPATCH_COMPLEX_TYPES")),),
        edit="dispatch",
        pitfall=_COMMA,
        before='AT_DISPATCH_FLOATING_TYPES(t.scalar_type(), "f", [&] { scalar_t a = 0; (void)a; });',
        after='THO_DISPATCH_V2(t.scalar_type(), "f", ([&] { scalar_t a = 0; (void)a; }), '
        "AT_EXPAND(AT_FLOATING_TYPES));",
    ),
    Rule(
        "DIS002",
        "AT_DISPATCH_FLOATING_TYPES_AND_HALF(type, name, [&] {..})",
        "THO_DISPATCH_V2(.., AT_EXPAND(AT_FLOATING_TYPES), torch::headeronly::ScalarType::Half)",
        (Macro(("AT_DISPATCH_FLOATING_TYPES_AND_HALF", "AT_DISPATCH_REDUCED_FLOATING_TYPES")),),
        edit="dispatch",
        pitfall="The type in the case is torch::headeronly::Half. " + _COMMA,
        before='AT_DISPATCH_FLOATING_TYPES_AND_HALF(t.scalar_type(), "f", [&] { scalar_t a = 0; (void)a; });',
        after='THO_DISPATCH_V2(t.scalar_type(), "f", ([&] { scalar_t a = 0; (void)a; }), '
        "AT_EXPAND(AT_FLOATING_TYPES), torch::headeronly::ScalarType::Half);",
    ),
    Rule(
        "DIS003",
        "AT_DISPATCH_FLOATING_TYPES_AND(type1, type, name, [&] {..}), _AND2, _AND3",
        "THO_DISPATCH_V2(type, name, ([&] {..}), AT_EXPAND(AT_FLOATING_TYPES), type1)",
        (Macro(("AT_DISPATCH_FLOATING_TYPES_AND*", "AT_DISPATCH_FLOATING_AND_COMPLEX_TYPES_AND*")),),
        edit="dispatch",
        pitfall="The extra types come last. " + _COMMA,
        before='AT_DISPATCH_FLOATING_TYPES_AND(at::ScalarType::Half, t.scalar_type(), "f", [&] { scalar_t a = 0; '
        "(void)a; });",
        after='THO_DISPATCH_V2(t.scalar_type(), "f", ([&] { scalar_t a = 0; (void)a; }), '
        "AT_EXPAND(AT_FLOATING_TYPES), torch::headeronly::ScalarType::Half);",
    ),
    Rule(
        "DIS004",
        "AT_DISPATCH_ALL_TYPES, _AND, _AND2, _AND_COMPLEX",
        "THO_DISPATCH_V2(.., AT_EXPAND(AT_ALL_TYPES))",
        (Macro(("AT_DISPATCH_ALL_TYPES", "AT_DISPATCH_ALL_TYPES_AND*")),),
        edit="dispatch",
        pitfall=_COMMA,
        before='AT_DISPATCH_ALL_TYPES(t.scalar_type(), "f", [&] { scalar_t a = 0; (void)a; });',
        after='THO_DISPATCH_V2(t.scalar_type(), "f", ([&] { scalar_t a = 0; (void)a; }), AT_EXPAND(AT_ALL_TYPES));',
    ),
    Rule(
        "DIS005",
        "AT_DISPATCH_INTEGRAL_TYPES, _AND",
        "THO_DISPATCH_V2(.., AT_EXPAND(AT_INTEGRAL_TYPES))",
        (Macro(("AT_DISPATCH_INTEGRAL_TYPES", "AT_DISPATCH_INTEGRAL_TYPES_AND*")),),
        edit="dispatch",
        pitfall=_COMMA,
        before='AT_DISPATCH_INTEGRAL_TYPES(t.scalar_type(), "f", [&] { scalar_t a = 0; (void)a; });',
        after='THO_DISPATCH_V2(t.scalar_type(), "f", ([&] { scalar_t a = 0; (void)a; }), '
        "AT_EXPAND(AT_INTEGRAL_TYPES));",
    ),
    Rule(
        "DIS006",
        "AT_DISPATCH_SWITCH, AT_DISPATCH_CASE",
        "THO_DISPATCH_SWITCH, THO_DISPATCH_CASE",
        (
            Macro(("AT_DISPATCH_SWITCH",), to="THO_DISPATCH_SWITCH"),
            Macro(("AT_DISPATCH_CASE",), to="THO_DISPATCH_CASE"),
        ),
        before='AT_DISPATCH_SWITCH(t.scalar_type(), "f", AT_DISPATCH_CASE(at::ScalarType::Float, [&] { scalar_t a = 0; '
        "(void)a; }));",
        after='THO_DISPATCH_SWITCH(t.scalar_type(), "f", THO_DISPATCH_CASE(torch::headeronly::ScalarType::Float, '
        "[&] { scalar_t a = 0; (void)a; }));",
    ),
    Rule(
        "DIS007",
        "AT_DISPATCH_CASE_FLOATING_TYPES(lambda) and other cases of a group",
        "one THO_DISPATCH_CASE per type",
        (Macro(("AT_DISPATCH_CASE_*",)),),
        edit="dispatch_case",
        before='AT_DISPATCH_SWITCH(t.scalar_type(), "f", AT_DISPATCH_CASE_FLOATING_TYPES([&] { scalar_t a = 0; '
        "(void)a; }));",
        after='THO_DISPATCH_SWITCH(t.scalar_type(), "f", THO_DISPATCH_CASE(torch::headeronly::ScalarType::Double, '
        "[&] { scalar_t a = 0; (void)a; }) THO_DISPATCH_CASE(torch::headeronly::ScalarType::Float, "
        "[&] { scalar_t a = 0; (void)a; }));",
    ),
    Rule(
        "DIS008",
        "AT_DISPATCH_INDEX_TYPES(type, name, [&] {..})",
        "THO_DISPATCH_V2 over Int and Long with index_t = scalar_t",
        (Macro(("AT_DISPATCH_INDEX_TYPES",)),),
        edit="dispatch_index",
        before='AT_DISPATCH_INDEX_TYPES(t.scalar_type(), "f", [&] { index_t a = 0; (void)a; });',
        after='THO_DISPATCH_V2(t.scalar_type(), "f", ([&] { using index_t = scalar_t; index_t a = 0; (void)a; }), '
        "torch::headeronly::ScalarType::Int, torch::headeronly::ScalarType::Long);",
        pitfall="Inside another dispatch, index_t hides the scalar_t of the outer one: dispatch it outside.",
    ),
    Rule(
        "DIS009",
        "AT_DISPATCH_V2(type, name, AT_WRAP([&] {..}), types...)",
        "THO_DISPATCH_V2(type, name, ([&] {..}), types...)",
        (Macro(("AT_DISPATCH_V2",)),),
        edit="dispatch_v2",
        pitfall=_COMMA,
        before='AT_DISPATCH_V2(t.scalar_type(), "f", AT_WRAP([&] { scalar_t a = 0; (void)a; }), '
        "AT_EXPAND(AT_FLOATING_TYPES));",
        after='THO_DISPATCH_V2(t.scalar_type(), "f", ([&] { scalar_t a = 0; (void)a; }), '
        "AT_EXPAND(AT_FLOATING_TYPES));",
    ),
    Rule(
        "DIS099",
        "any other AT_DISPATCH macro, AT_PRIVATE_CASE_TYPE and project macros around them",
        "THO_DISPATCH_SWITCH and THO_DISPATCH_CASE",
        (Macro(("AT_DISPATCH_*", "AT_PRIVATE_*", "AT_QINT_*", "AT_TYPE_DEFAULT*")),),
        kind="decide",
        before='AT_DISPATCH_QINT_AND_SUB_BYTE_TYPES(t.scalar_type(), "f", [&] {});',
        after="",
    ),
    Rule(
        "DIS101",
        "AT_WRAP around a lambda in THO_DISPATCH_V2",
        "the lambda in parentheses",
        (Check("wrapped_lambda"),),
        level="wrong",
        edit="dispatch_v2",
        why="AT_WRAP does not protect commas there: the error message names something else.",
        before='THO_DISPATCH_V2(t.scalar_type(), "f", AT_WRAP([&] { std::array<scalar_t, 2> a; (void)a; }), '
        "AT_EXPAND(AT_FLOATING_TYPES));",
        after='THO_DISPATCH_V2(t.scalar_type(), "f", ([&] { std::array<scalar_t, 2> a; (void)a; }), '
        "AT_EXPAND(AT_FLOATING_TYPES));",
    ),
)
