"""SGLang's custom all-reduce, version 2 (PyPI sglang), and its QK norm over the same class; both JIT-compiled.

The class chooses among its kernels by message size. Importing sglang normally imports a whole server. Here its packages
are namespace folders without their `__init__`, and the few modules that would import the server are replaced by stubs.
The stubs confirm what sglang checks before it uses the class: the ranks share a host, and NVLink connects them.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from abiding.testing.cases.reduce_rms import RmsCase

_COMMUNICATORS = "sglang.srt.distributed.device_communicators"
_KERNELS = "sglang.kernels.ops.communication"
_PACKAGES = ("sglang.srt.utils", _COMMUNICATORS, _KERNELS)
"""Packages to import from without running their `__init__` or those of their parents."""


class _NoVirtualMemory:
    """Replaces the class that shares graph inputs which torch maps by itself (expandable segments, off by default)."""

    def __init__(self, **_: Any) -> None:
        pass

    def close(self) -> None:
        pass


_STUBS: Mapping[str, Mapping[str, Any]] = {
    "sglang.srt.distributed.parallel_state": {
        "in_the_same_node_as": lambda group, source_rank: [True] * dist.get_world_size(group)
    },
    f"{_COMMUNICATORS}.custom_all_reduce_utils": {
        "can_use_custom_all_reduce_with_nvlink": lambda **_: True,
        "is_one_nvlink_clique": None,
        "is_weak_contiguous": Tensor.is_contiguous,
    },
    "sglang.srt.model_executor.runner_backend_utils.tc_piecewise_cuda_graph": {
        "is_in_tc_piecewise_cuda_graph": lambda: False
    },
    "sglang.srt.utils.common": {"is_cuda": lambda: True},
    "sglang.srt.utils.cuda_vmm_utils": {
        "VmmGraphInputManager": _NoVirtualMemory,
        "compute_graph_capture_bases": None,
        "is_vmm_pointer": lambda _: False,
    },
}


class SGLang:
    """The imported package."""

    def __init__(self, folder: Path) -> None:
        """Import the package from a folder, which may also hold tvm_ffi and msgspec."""
        sys.path.insert(0, str(folder))
        os.environ.setdefault("SGLANG_JIT_CACHE_DIR", str(Path(tempfile.gettempdir()) / "sglang-jit"))
        for package in _PACKAGES:
            parts = package.split(".")
            for end in range(1, len(parts) + 1):
                name = ".".join(parts[:end])
                sys.modules.setdefault(name, _package(name, folder.joinpath(*parts[:end])))
        for name, content in _STUBS.items():
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(content)
        self._class: Any = importlib.import_module(f"{_COMMUNICATORS}.custom_all_reduce_v2").CustomAllReduceV2
        self._kernels: Any = importlib.import_module(f"{_KERNELS}.all_reduce")

    def communicator(self, device: torch.device) -> AbstractContextManager[Any]:
        """This rank's `CustomAllReduceV2`, for bfloat16."""
        self._compile(partial(self._kernels.get_all_reduce_module, torch.bfloat16, dist.get_world_size()))
        return self._joined(device)

    def norm_communicator(self, device: torch.device, case: RmsCase, tokens: int) -> AbstractContextManager[Any]:
        """The communicator as MiniMax M2's layers construct it for the QK norm of up to `tokens` tokens.

        It has as many push CTAs as are co-resident on the GPU, and no pull buffer.
        """
        ranks = dist.get_world_size()
        widths = (ranks * case.q, ranks * (case.kv or 0))
        module = partial(self._kernels.get_fused_parallel_qknorm_module, torch.bfloat16, ranks, *widths)
        self._compile(module)
        blocks = torch.cuda.get_device_properties(device).multi_processor_count * module().get_max_occupancy()
        sizes = {"max_push_size": 8 * tokens, "max_push_blocks": blocks}
        return self._joined(device, max_pull_size=0, max_pull_blocks=0, **sizes)

    def qk_norm(self, communicator: Any, q: Tensor, k: Tensor, wq: Tensor, wk: Tensor, eps: float) -> None:
        """Normalize Q and K in place."""
        self._kernels.fused_parallel_qknorm(communicator.obj, q, k, wq, wk, eps)

    @contextmanager
    def _joined(self, device: torch.device, **options: int) -> Iterator[Any]:
        """Construct it on all ranks of the default group, and close it when all have finished."""
        communicator = self._class(dist.group.WORLD, device, **options)
        if communicator.disabled:
            raise ValueError(f"SGLang's kernels do not serve {dist.get_world_size()} ranks here")
        try:
            yield communicator
            torch.cuda.synchronize(device)
            dist.barrier()
            communicator.close()
        finally:
            communicator.disabled = True  # otherwise its destructor waits for the other ranks, also after an error

    def _compile(self, kernel: Callable[[], Any]) -> None:
        """Rank 0 compiles the kernels or finds them in the cache; the other ranks then load them from there."""
        if dist.get_rank() == 0:
            self._kernels.is_arch_support_pdl()  # cached here: the threads below may have another current device
            parts = (self._kernels._init_communicator, self._kernels.IPCManager, kernel)
            importlib.import_module("sglang.kernels.jit.utils").parallel_compile(parts)
        dist.barrier()


def _package(name: str, path: Path) -> ModuleType:
    spec = ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(path)]
    return module_from_spec(spec)
