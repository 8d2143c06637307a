"""Print the C functions of the LibTorch Stable ABI that one torch release declares.

    python tools/list_shims.py FOLDER_OF_TORCH_2_10 > src/abiding/abi/shims_2_10.txt

FOLDER holds the `torch` package. Only the headers that `torch/csrc/stable` is built on count: torch's other C functions
(one per operator of a compiled model) carry no promise of stability.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HEADERS = ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h", "inductor/aoti_torch/generated/c_shim_aten.h")


def shims(torch_package: Path) -> list[str]:
    """The names of all exported functions, sorted."""
    include = torch_package / "include/torch/csrc"
    code = "".join(re.sub(r"//.*", "", (include / header).read_text()) for header in HEADERS)
    return sorted(set(re.findall(r"AOTI_TORCH_EXPORT[\w\s*]+?(\w+)\s*\(", code)))


if __name__ == "__main__":
    print(*shims(Path(sys.argv[1]) / "torch"), sep="\n")
