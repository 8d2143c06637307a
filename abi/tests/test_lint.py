"""What lint finds, where, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from abiding_abi import lint
from abiding_abi.errors import UserError
from abiding_abi.lint import Config, Finding, report

Lint = Callable[..., list[Finding]]


def places(findings: list[Finding]) -> list[tuple[int, int, str]]:
    return [(f.line, f.column, f.rule.code) for f in findings]


def test_place_rule_and_versions(lint_text: Lint) -> None:
    (finding,) = lint_text("int f();\n  void g(at::Tensor a);\n")
    assert (finding.line, finding.column, finding.end_column, finding.found) == (2, 10, 20, "at::Tensor")
    assert (finding.rule.code, finding.rule.headers, finding.rule.runs) == ("TYP001", "2.9", "2.10")
    assert "torch::stable::Tensor" in finding.message
    assert finding.why


def test_columns_count_characters_behind_bom_and_umlauts(lint_text: Lint) -> None:
    assert places(lint_text("\ufeffat::Tensor a; /* ü */ at::Tensor b;\n")) == [(1, 1, "TYP001"), (1, 23, "TYP001")]


@pytest.mark.parametrize(
    "text",
    [
        "// at::Tensor\n/* TORCH_CHECK(x) */",
        'const char* s = "at::Tensor";',
        'const char* s = R"x(at::Tensor ")x";',
        "#if 0\nat::Tensor a;\n#endif",
        "int at = 1'000; int b = 'a'; bool data = at::x;".replace("at::x", "cat::x"),
        "torch::stable::Tensor a; torch::headeronly::ScalarType b; c10::Half h; at::ScalarType s;",
        "std::vector<float> v; auto p = v.data(); v.sum(); my.view(3);",
        "struct P { int to(int); }; int f(P p) { return p.to(1); }",
        "#define TORCH_CHECK(x) my_check(x)\nvoid f() { TORCH_CHECK(true); }",
        "namespace cute { struct Tensor {}; }\nvoid f(cute::Tensor t) { t.view(1); }",
    ],
)
def test_silent(text: str, lint_text: Lint) -> None:
    assert places(lint_text(text + "\n")) == []


def test_members_count_on_tensors_alone(lint_text: Lint) -> None:
    text = """
void f(const at::Tensor& a, std::optional<at::Tensor> o, std::vector<at::Tensor> v, Other x) {
  auto b = a.contiguous().view({1});
  auto c = b;
  c.sum(0);
  o->cumsum(0); o.value().cumsum(0); (*o).cumsum(0);
  v[0].cumsum(0);
  for (auto& t : v) t.cumsum(0);
  x.cumsum(0); x.view(1);
  { float* c = nullptr; c->cumsum(0); }
}
void g(Other a) { a.contiguous(); }
"""
    found = [(f.line, f.rule.code) for f in lint_text(text) if f.rule.group == "MET"]
    assert found == [(3, "MET013"), (3, "MET014"), (5, "MET023"), *[(6, "MET039")] * 3, (7, "MET039"), (8, "MET039")]


def test_using_directive_makes_names_visible(lint_text: Lint) -> None:
    text = "using namespace torch;\nTensor f(Tensor a) { return zeros({1}); }\nint other::Tensor;\n"
    assert places(lint_text(text)) == [(2, 1, "TYP001"), (2, 10, "TYP001"), (2, 29, "FUN002")]
    assert places(lint_text("Tensor f(Tensor a);\n")) == []


def test_using_declaration_and_alias(lint_text: Lint) -> None:
    text = "using at::Tensor;\nnamespace F = torch::nn::functional;\nTensor f(Tensor a) { return F::pad(a); }\n"
    assert [code for _, _, code in places(lint_text(text))] == ["TYP001", "ABI001", "TYP001", "TYP001", "FUN015"]


def test_project_headers_are_followed(tmp_path: Path) -> None:
    (tmp_path / "inc").mkdir()
    (tmp_path / "inc" / "a.h").write_text('#include "b.h"\n')
    (tmp_path / "inc" / "b.h").write_text("using namespace at;\nat::Tensor g();\n")
    (tmp_path / "a.cpp").write_text('#include "inc/a.h"\nvoid f() { auto x = g(); x.view(1); }\n')
    found = lint.run([tmp_path / "a.cpp"], Config(root=tmp_path)).findings
    assert [(f.path, f.line, f.rule.code) for f in found] == [("a.cpp", 2, "MET014"), ("inc/b.h", 2, "TYP001")]
    alone = lint.run([tmp_path / "a.cpp"], Config(root=tmp_path, follow=False))
    assert {f.path for f in alone.findings} == {"a.cpp"}


def test_allow_on_the_line_and_above(lint_text: Lint) -> None:
    text = (
        "at::Tensor a;  // abi: allow(TYP001) until the caller moves\n// abi: allow(TYP001) generated\nat::Tensor b;\n"
    )
    assert lint_text(text) == []


def test_allow_needs_a_reason_and_a_finding(lint_text: Lint) -> None:
    assert places(lint_text("at::Tensor a;  // abi: allow(TYP001)\n")) == [(1, 16, "ABI901")]
    found = lint_text("int a;  // abi: allow(TYP001, CHK001) no longer\n")
    assert [f.rule.code for f in found] == ["ABI902", "ABI902"]


def test_target_and_headers_are_noticed(lint_text: Lint) -> None:
    text = "void f(at::Tensor t) { t.sort(0); }\nvoid g(at::Generator);\n"
    notices = {f.rule.code: f.notice for f in lint_text(text, headers=(2, 13), target=(2, 10))}
    assert notices["TYP001"] == ""
    assert notices["MET028"] == "the replacement needs the headers of torch 2.15"
    assert notices["TYP018"] == "the replacement runs on torch 2.13 and newer, later than the target"


@pytest.mark.parametrize(
    ("signature", "schema", "code"),
    [
        ("void f(torch::stable::Tensor a, float x)", "f(Tensor a, float x) -> ()", "BOX001"),
        ("void f(torch::stable::Tensor a, int32_t x)", "f(Tensor a, int x) -> ()", "BOX001"),
        ("void f(torch::stable::Tensor a, std::vector<int> x)", "f(Tensor a, int[] x) -> ()", "BOX001"),
        ("void f(torch::stable::Tensor a, std::optional<float> x)", "f(Tensor a, float? x) -> ()", "BOX001"),
        ("void f(torch::stable::Tensor a, const char* x)", "f(Tensor a, str x) -> ()", "BOX002"),
        ("void f(torch::stable::Tensor a, P x)", "f(Tensor a, int x) -> ()", "BOX003"),
        ("void f(torch::stable::Tensor a)", "f(Tensor a, int x) -> ()", "BOX004"),
        ("void f(torch::stable::Tensor a, int64_t x)", "f(Tensor a, float x) -> ()", "BOX004"),
        ("void f(std::optional<torch::stable::Tensor> a)", "f(Tensor a) -> ()", "BOX004"),
        ("int64_t f(torch::stable::Tensor a)", "f(Tensor a) -> Tensor", "BOX004"),
        ("int64_t f(const torch::stable::Tensor& a)", "f(Tensor a) -> int", ""),
        ("std::tuple<torch::stable::Tensor, int64_t> f(double a)", "f(float a) -> (Tensor, int)", ""),
        ("void f(std::vector<int64_t> a, std::string b, bool c)", "f(int[2] a, str b, bool c=True) -> ()", ""),
    ],
)
def test_boxing(signature: str, schema: str, code: str, lint_text: Lint) -> None:
    text = f"""struct P {{ int64_t a[4]; }};
{signature} {{ }}
STABLE_TORCH_LIBRARY(n, m) {{ m.def("{schema}"); }}
STABLE_TORCH_LIBRARY_IMPL(n, CPU, m) {{ m.impl("f", TORCH_BOX(&f)); }}
"""
    assert [f.rule.code for f in lint_text(text)] == ([code] if code else [])


def test_one_library_of_a_namespace_in_two_files(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.cpp").write_text('STABLE_TORCH_LIBRARY(n, m) { m.def("f() -> ()"); }\n')
    found = lint.run([tmp_path], Config(root=tmp_path)).findings
    assert [(f.path, f.rule.code) for f in found] == [("b.cpp", "REG101")]


def test_formats_agree(lint_text: Lint, tmp_path: Path) -> None:
    lint_text("at::Tensor a;\nTORCH_CHECK(true);\n")
    found = lint.run([tmp_path], Config(root=tmp_path))
    data = json.loads(report.as_json(found))
    assert [(f["line"], f["rule"]) for f in data["findings"]] == [(1, "TYP001"), (2, "CHK001")]
    run = json.loads(report.sarif(found))["runs"][0]
    assert [r["ruleId"] for r in run["results"]] == ["TYP001", "CHK001"]
    assert [run["tool"]["driver"]["rules"][r["ruleIndex"]]["id"] for r in run["results"]] == ["TYP001", "CHK001"]
    assert run["results"][0]["locations"][0]["physicalLocation"]["region"]["startLine"] == 1
    lines = report.github(found).splitlines()
    assert lines[0].startswith("::error file=a.cu,line=1,col=1,endLine=1,endColumn=11,title=TYP001::at::Tensor is")
    assert "TYP001" in report.text(found)


def test_settings_of_pyproject(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[tool.abiding-abi]\ntarget = "2.12"\nignore = ["TYP"]\nexclude = ["old/*"]\n'
    )
    (tmp_path / "old").mkdir()
    for path in (tmp_path / "a.cpp", tmp_path / "old" / "b.cpp"):
        path.write_text("at::Tensor a;\nvoid f() { TORCH_CHECK(true); }\n")
    config = lint.load(tmp_path)
    assert config.target == (2, 12)
    assert [(f.path, f.rule.code) for f in lint.run([tmp_path], config).findings] == [("a.cpp", "CHK001")]


@pytest.mark.parametrize(
    "text", ["targets = 1", 'target = "two"', "target = 2.1", 'exclude = "a"', "notes = 1", "x = ["]
)
def test_wrong_settings_are_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(f"[tool.abiding-abi]\n{text}\n")
    with pytest.raises(UserError, match=r"pyproject|version") as error:
        lint.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("module", [["abiding_abi", "lint"], ["abiding_abi.hook"]])
def test_command_and_hook_exit_by_findings(module: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text("at::Tensor a;\n")
    (tmp_path / "b.cpp").write_text("int a;\n")

    def run(*names: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", *module, *names]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run("b.cpp").returncode == 0
    bad = run("a.cpp", "b.cpp")
    assert (bad.returncode, bad.stdout.splitlines()[0][:18]) == (1, "a.cpp:1:1: TYP001 ")
    missing = run("none.cpp")
    assert missing.returncode == 2
    assert missing.stderr.strip().endswith("none.cpp: no such file or folder")
    assert len(missing.stderr.strip().splitlines()) == 1


def test_includes_from_the_top_of_the_project_are_followed(tmp_path: Path) -> None:
    (tmp_path / "pack" / "deep").mkdir(parents=True)
    (tmp_path / "pack" / "t.h").write_text("#include <torch/extension.h>\nat::Tensor g();\n")
    path = tmp_path / "pack" / "deep" / "a.cpp"
    path.write_text("#include <pack/t.h>\nauto a = g().numel();\nauto b = g().is_floating_point();\n")
    findings = lint.run([path], Config(root=tmp_path)).findings
    assert {(f.path, f.rule.code) for f in findings} == {
        ("pack/t.h", "INC001"), ("pack/t.h", "TYP001"), ("pack/deep/a.cpp", "MET047")
    }  # fmt: skip
