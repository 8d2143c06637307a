"""Whole sources around a rule's examples."""

from __future__ import annotations

from abiding_abi.migrate.cuda import HELPER, HELPER_LINES
from abiding_abi.rules import Rule

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
#include <stdexcept>
"""
CUDA = "#include <torch/csrc/stable/c/shim.h>\n#include <torch/csrc/stable/macros.h>\n#include <cuda_runtime.h>\n"


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
    if HELPER in rule.after:
        head += "\n".join(line for line in HELPER_LINES if not line.startswith("#")) + "\n"
    if rule.scope == "file":
        return head + rule.after + "\n"
    kind = "torch::stable::Tensor"
    return f"{head}void example({kind} t, {kind} u, int64_t n) {{\n{rule.after}\n}}\n"
