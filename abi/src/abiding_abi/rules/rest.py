"""What no other rule names, and the suppressions themselves."""

from abiding_abi.rules.model import Check, Macro, Name, Rule

RULES = (
    Rule(
        "ABI001",
        "any other name of at::, c10:: or torch:: outside torch::stable and torch::headeronly",
        "none",
        (Name(("*",)),),
        kind="decide",
        edit="wrappers",
        before="auto a = at::nothing(t);",
        after="",
    ),
    Rule(
        "ABI002",
        "any other macro of torch: TORCH_*, AT_*, C10_* that torch/headeronly does not define",
        "none",
        (Macro(("TORCH_*", "AT_*", "C10_*", "TH_*", "THC*")),),
        kind="decide",
        before="int a = AT_SOMETHING_ELSE(n);",
        after="",
    ),
    Rule(
        "ABI003",
        "THC, TH and other names of torch before 1.0",
        "none",
        (Macro(("THCState", "THCudaMalloc", "THCudaFree", "THCCeilDiv", "THCState_getCurrentStream", "THCudaBlas*")),),
        kind="decide",
        before="THCState* f();",
        after="",
        scope="file",
    ),
    Rule(
        "ABI901",
        "// abi: allow(RULE) without a reason",
        "// abi: allow(RULE) because ...",
        (Check("allow_without_reason"),),
        kind="decide",
        level="wrong",
        scope="file",
        why="A suppression is a debt: the next reader has to know why it stands.",
        before="#include <ATen/ATen.h>  // abi: allow(INC001)",
        after="",
    ),
    Rule(
        "ABI902",
        "// abi: allow(RULE) that suppresses nothing",
        "no comment",
        (Check("unused_allow"),),
        kind="decide",
        level="wrong",
        scope="file",
        why="It is stale: what it allowed is gone, or its rule does not exist.",
        before="int f();  // abi: allow(CHK001) the check is gone",
        after="int f();",
    ),
)
