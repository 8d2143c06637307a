"""Whole sources around a rule's examples."""

from __future__ import annotations

from abiding_abi import rules
from abiding_abi.migrate.helpers import HELPERS
from abiding_abi.rules import Rule

REWRITTEN = [
    rule
    for rule in rules.table()
    if rule.after and rule.kind != "decide" and rule.group != "BOX" and rule.level != "note" and rule.code != "CUD002"
]
"""Rules whose examples migrate rewrites into the replacement of the table."""
GENERATED = [
    rule
    for rule in rules.table()
    if not rule.after
    and (rule.kind, rule.level) == ("context", "unstable")
    and rule.code not in ("FUN019", "INC020", "REG015")  # of these, the examples show what stays for a person
]
"""Rules whose replacement is made for the place: schemas, wrappers, calls of the header of wrappers."""
LEGACY = "#include <torch/extension.h>\n"
STABLE = """#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/TensorAccessor.h>
#include <torch/headeronly/util/complex.h>
#include <torch/headeronly/version.h>
#include <array>
#include <cassert>
#include <stdexcept>
"""
CUDA = """#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <cuda_runtime.h>
#include <mutex>
"""


def before(rule: Rule) -> str:
    """A legacy source on which the rule fires."""
    if rule.scope == "file":
        return rule.before + "\n"
    kind = "torch::stable::Tensor" if rule.level == "wrong" else "at::Tensor"
    head = STABLE if rule.level == "wrong" else LEGACY
    return f"{head}void example({kind} t, {kind} u, int64_t n) {{\n{rule.before}\n}}\n"


def after(rule: Rule) -> str:
    """The same on the stable ABI."""
    head = STABLE + (CUDA if rule.cuda else "")
    for name, helper in HELPERS.items():
        head += "".join(f"{line}\n" for line in helper.lines) if name in rule.after else ""
    if "abi_blas_handle" in rule.after:  # as cublas_v2.h has it, which not every toolkit brings
        head = "typedef struct cublasContext* cublasHandle_t;\n" + head
    if rule.scope == "file":
        return head + rule.after + "\n"
    kind = "torch::stable::Tensor"
    return f"{head}void example({kind} t, {kind} u, int64_t n) {{\n{rule.after}\n}}\n"
