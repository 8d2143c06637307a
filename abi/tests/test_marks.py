"""Mutation marks: what migrate sees a function do with its tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest

MODULE = 'PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {{ m.def("f", &f); }}\n'
WRITTEN, READ, OPEN = "Tensor(a!) x", "(Tensor x", "ABI-TODO(BOX005): does f write x?"


def schema_of(text: str, migrated: Callable[..., str]) -> str:
    """The note and the schema of operator f."""
    lines = migrated(f"#include <torch/extension.h>\n{text}\n{MODULE.format()}").splitlines()
    return "\n".join(line for line in lines if "BOX005" in line or "m.def(" in line)


PARAMS = "struct P { float* ptr; float* __restrict__ other; };\n"


@pytest.mark.parametrize(
    ("before", "body", "wanted"),
    [
        ("", "x.zero_();", WRITTEN),
        ("", "auto y = x.view({-1}); y.add_(1);", WRITTEN),
        ("", "float* p = x.data_ptr<float>(); float s = 0; s += *p; p++; ++p; p += 2; s += (*p);", READ),
        ("", "float* p = x.data_ptr<float>(); *p++ = 1;", WRITTEN),
        ("", "float* p = x.data_ptr<float>(); float v = __ldg(p + 1);", READ),
        ("", "elsewhere(x);", OPEN),
        ("", "(x).zero_();", WRITTEN),
        # cub: scratch memory, its size, what is read, what is written.
        ("", "cub::DeviceScan::InclusiveSum(nullptr, n, x.data_ptr<int>(), out, 3);", READ),
        ("", "cub::DeviceScan::InclusiveSum(nullptr, n, in, x.data_ptr<int>(), 3);", WRITTEN),
        ("", "cub::DeviceRadixSort::SortPairs(s, n, k, l, x.data_ptr<int>(), v, 3);", READ),
        ("", "cub::DeviceRadixSort::SortPairs(s, n, k, l, v, x.data_ptr<int>(), 3);", WRITTEN),
        ("", "float v[4]; BlockLoad(smem).Load(x.data_ptr<float>(), v);", READ),
        ("", "float v[4]; BlockStore(smem).Store(x.data_ptr<float>(), v);", WRITTEN),
        # A pointer in a member: what all functions that use such a member do with it.
        (PARAMS + "void k(P p) { p.ptr[0] = 1; }", "P p; p.ptr = x.data_ptr<float>(); k(p);", WRITTEN),
        (PARAMS + "float k(P p) { return p.ptr[0]; }", "P p; p.ptr = x.data_ptr<float>(); k(p);", READ),
        (PARAMS + "float k(P* p) { return p->ptr[1]; }", "P p; p.ptr = x.data_ptr<float>(); k(&p);", READ),
        (PARAMS, "P p; p.ptr = x.data_ptr<float>(); elsewhere(p);", OPEN),
        (
            PARAMS + "float k(P p) { return p.ptr[0]; }\nvoid l(P p) { p.ptr[0] = 1; }",
            "P p; p.ptr = x.data_ptr<float>(); k(p);",
            OPEN,
        ),
        (PARAMS + "float k(P p) { p.other = p.ptr; return p.other[2]; }", "P p; p.ptr = x.data_ptr<float>();", READ),
        (PARAMS + "void k(P p) { p.other = p.ptr; p.other[2] = 1; }", "P p; p.ptr = x.data_ptr<float>();", WRITTEN),
        ("struct P { float* ptr; void run() { ptr[0] = 1; } };", "P p; p.ptr = x.data_ptr<float>();", WRITTEN),
        ("struct P { const float* ptr; float run() { return *ptr; } };", "P p; p.ptr = x.data_ptr<float>();", READ),
        # Of two tensors, one gets written: which one is not known here.
        ("void k(float* p) { *p = 1; }", "k(n > 0 ? x.data_ptr<float>() : nullptr);", OPEN),
        ("void k(at::Tensor t) { t.zero_(); }", "k(n > 0 ? other : x);", OPEN),
        ("float k(const float* p) { return *p; }", "k(n > 0 ? x.data_ptr<float>() : nullptr);", READ),
    ],
)
def test_mark_follows_the_body(before: str, body: str, wanted: str, migrated: Callable[..., str]) -> None:
    text = schema_of(f"{before}\nvoid f(at::Tensor x, int64_t n) {{ {body} }}", migrated)
    assert wanted in text
    assert ("BOX005" in text) == (wanted == OPEN)


def test_one_note_names_all_tensors_of_an_operator(migrated: Callable[..., str]) -> None:
    text = schema_of("void f(at::Tensor x, at::Tensor y, at::Tensor z) { y.zero_(); elsewhere(x, z); }", migrated)
    assert text.count("ABI-TODO") == 1
    assert "does f write x or z? mark each that it writes, (b!) on" in text
