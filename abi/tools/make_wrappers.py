"""Write `src/abiding_abi/wrappers/schemas.tsv`: the schemas of the wrapped operators, the same in every torch given.

    python tools/make_wrappers.py FOLDER [--check]

FOLDER holds one torch per subfolder, named by its release, as the repository's tools/torch_matrix.py makes them. An
operator whose schema differs between them, or which takes a Scalar (the dispatcher's C interface has none), is an
error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from abiding_abi.wrappers import parse

TARGET = Path(__file__).resolve().parents[1] / "src/abiding_abi/wrappers/schemas.tsv"
OPERATORS = """
abs all all.dim amax amin any any.dim argmax argmin argsort atan2 bincount bitwise_and.Tensor bitwise_not
bitwise_or.Tensor bitwise_xor.Tensor bmm broadcast_tensors broadcast_to can_cast cat ceil chunk clamp.Tensor conj cos
cross count_nonzero cumprod cumsum detach diagonal diff div.Tensor div_.Tensor dot eq.Tensor erf erfc exp expand
expand_as expm1 flip floor floor_divide gather ge.Tensor gt.Tensor hstack imag index.Tensor index_copy_ index_put
index_put_ index_select is_complex is_floating_point is_nonzero isfinite isinf isnan le.Tensor linalg_inv log log1p
log2 log_softmax.int logical_and logical_not logical_or logical_xor logsumexp lt.Tensor masked_fill.Tensor
masked_fill_.Tensor masked_scatter_ masked_select matmul max max.dim maximum mean mean.dim min min.dim minimum mm
movedim.intlist mul.Tensor mul_.Tensor mv nan_to_num ne.Tensor neg nonzero one_hot outer permute pow.Tensor_Tensor
prod real reciprocal relu remainder.Tensor repeat repeat_interleave.self_Tensor repeat_interleave.self_int reshape_as
result_type.Tensor roll rsqrt scatter.src scatter_.src scatter_add scatter_add_ searchsorted.Tensor
sigmoid sign sin slice.Tensor softmax.int sort split.Tensor split_with_sizes sqrt square squeeze stack std.dim
sum sum.dim_IntList swapaxes t take tanh topk trace tril triu trunc tile transpose_ squeeze_ unsqueeze_ t_ mm.out
matmul.out bmm.out cat.out multinomial resize_ type_as unbind.int unfold unique_dim view_as
view_as_complex view_as_real vstack where.self round tan sinh cosh asin acos atan log10 exp2 sgn lgamma erfinv frac abs_
exp_ sqrt_ neg_ sigmoid_ tanh_ relu_ log_ sin_ cos_ floor_ ceil_ round_ reciprocal_ rsqrt_ median median.dim fmod.Tensor
tensor_split.sections lerp.Tensor cdist equal inverse cummax cummin kthvalue uniform_ normal_ random_ exponential_
bernoulli_.float as_strided vdot cumsum_ unique_consecutive bucketize.Tensor argwhere
"""
ASK = """
import json, sys, torch
ask = json.loads(sys.argv[1])
print(json.dumps({o: str(torch._C._get_schema("aten::" + o.partition(".")[0], o.partition(".")[2])) for o in ask}))
"""


def schemas(folder: Path) -> dict[str, str]:
    """The operators' schemas in one torch."""
    command = [sys.executable, "-c", ASK, json.dumps(OPERATORS.split())]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, str] = json.loads(done.stdout)
    return found


def make(root: Path) -> str:
    """The whole file."""
    folders = sorted(p for p in root.iterdir() if (p / "torch").is_dir())
    if len(folders) < 2:
        raise SystemExit(f"{root}: holds no two torch releases")
    known = {folder.name: schemas(folder) for folder in folders}
    oldest = known[folders[0].name]
    lines = []
    for operator in OPERATORS.split():
        for release, found in known.items():
            if found[operator] != oldest[operator]:
                raise SystemExit(f"{operator}: torch {release} has {found[operator]}, not {oldest[operator]}")
        if re.search(r"\bScalar\b", oldest[operator]):
            raise SystemExit(f"{oldest[operator]}: takes a Scalar, which the dispatcher's C interface does not")
        lines.append(parse(oldest[operator]).schema)
    return "# by tools/make_wrappers.py; the same in every torch release that it was given\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="fail if the file would change")
    arguments = parser.parse_args()
    text = make(arguments.folder)
    if arguments.check and TARGET.read_text() != text:
        raise SystemExit(f"{TARGET} differs from what these releases have; run tools/make_wrappers.py")
    if not arguments.check:
        TARGET.write_text(text)


if __name__ == "__main__":
    main()
