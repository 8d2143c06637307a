"""What compiles after migrate and could mean something else: the migrated code is built, loaded and compared."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from abiding_abi import headers, migrate
from abiding_abi.compilers import find_cxx
from abiding_abi.lint import Config
from extension import build

SOURCE = """#include <torch/extension.h>
// Autograd followed what calls torch's functions alone.
at::Tensor scaled(at::Tensor x, double by) { return x * by; }
at::Tensor composed(at::Tensor x, at::Tensor y) { return at::cat({scaled(x, 2).matmul(y), y}, 0); }
// A double does not hold every int64.
at::Tensor filled(at::Tensor x, int64_t n) {
  auto all = torch::full({2}, n, x.options().dtype(at::kLong));
  auto most = torch::full({1}, std::numeric_limits<int64_t>::max(), x.options().dtype(at::kLong));
  auto late = torch::zeros({2}, x.options().dtype(at::kLong));
  late.fill_(n);
  auto rows = torch::zeros({2, 1}, x.options().dtype(at::kLong));
  rows[1] = n;
  return at::cat({all, most, late, rows.reshape({2})}, 0);
}
// The accessor asks how many dimensions there are.
double corner(at::Tensor x) { return x.accessor<double, 2>()[0][0]; }
double packed(at::Tensor x) { return x.packed_accessor32<double, 1>()[0]; }
// zeros_like keeps strides, and t() takes vectors.
at::Tensor zeros(at::Tensor x) { return torch::zeros_like(x); }
at::Tensor turned(at::Tensor x) { return x.t(); }
// Release builds leave this out.
bool lenient(int64_t n) { TORCH_INTERNAL_ASSERT_DEBUG_ONLY(n > 0); return true; }
// Integers stay integers, and a number does not widen a tensor.
at::Tensor halves(at::Tensor x) { return x / 2 - 1; }
int narrow(int n) { return n; }
at::Tensor maybe(at::Tensor x) { return x.defined() ? x + 1 : at::zeros({1}); }
PYBIND11_MODULE(traps, m) {
  m.def("composed", &composed);
  m.def("filled", &filled);
  m.def("corner", &corner);
  m.def("packed", &packed);
  m.def("zeros", &zeros);
  m.def("turned", &turned);
  m.def("lenient", &lenient);
  m.def("halves", &halves);
  m.def("narrow", &narrow);
  m.def("maybe", &maybe);
}
"""
COMPARE = """
import torch, traps

def refuses(text, call, *arguments):
    try:
        call(*arguments)
    except RuntimeError as error:
        assert text in str(error), error
        return
    raise AssertionError(f"{call} accepted {arguments}")

x, y = (torch.rand(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
ours, theirs = traps.composed(x, y), torch.cat([(x * 2) @ y, y])
assert torch.equal(ours, theirs)
weight = torch.rand_like(theirs)
for a, b in zip(*(torch.autograd.grad((out * weight).sum(), (x, y)) for out in (ours, theirs))):
    torch.testing.assert_close(a, b)
n = 2**53 + 1
assert traps.filled(x.detach(), n).tolist() == [n, n, 2**63 - 1, n, n, 0, n]
x = torch.rand(2, 3, dtype=torch.float64)
assert (traps.corner(x), traps.packed(x[0])) == (x[0, 0].item(),) * 2
refuses("expected 2 dimensions", traps.corner, x[0])
refuses("expected 1 dimensions", traps.packed, x)
refuses("", traps.corner, x.float())
refuses("too many", traps.packed, torch.zeros(1, dtype=torch.float64).expand(1 << 31))
assert traps.zeros(x.t()).stride() == x.t().stride()
assert traps.turned(x[0]).shape == (3,)
assert traps.lenient(-1)
for t in (torch.arange(4), torch.arange(4).half(), torch.tensor(3.0), torch.tensor(3)):
    assert torch.equal(traps.halves(t), t / 2 - 1) and traps.halves(t).dtype == (t / 2 - 1).dtype
assert traps.narrow(-7) == -7
refuses("does not fit into int", traps.narrow, 2**31)
assert torch.equal(traps.maybe(None), torch.zeros(1)) and torch.equal(traps.maybe(x), x + 1)
print("same")
"""


@pytest.mark.compile
@pytest.mark.skipif(
    not find_cxx() or not headers.cached() or not importlib.util.find_spec("torch"),
    reason="needs a C++ compiler, torch and cached headers: abiding-abi verify --fetch-headers 2.15.0",
)
def test_nothing_means_something_else(tmp_path: Path) -> None:
    source = tmp_path / "traps.cpp"
    source.write_text(SOURCE)
    result = migrate.run([source], Config(root=tmp_path))
    assert result.todos == 0
    migrate.write(result)
    build(source, tmp_path / "libtraps.so", max(headers.cached()).include)
    done = subprocess.run([sys.executable, "-c", COMPARE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "same"), done.stderr[-2000:]
