"""Lets vLLM's real Python be imported without its binaries, most of its dependencies, and a GPU.

``pretend(folder, modules)`` puts an unpacked wheel on the path, answers for what cannot be installed with modules whose
attributes are empty classes, and makes vLLM believe that it runs on a GPU of compute capability 9.0.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import torch

# Packages that vLLM imports at the top of the modules under test, and whose contents these do not use.
PACKAGES = {
    *("aiohttp", "blake3", "cachetools", "cbor2", "cloudpickle", "compressed_tensors", "cpuinfo", "depyf", "einops"),
    *("fastapi", "gguf", "httpx", "ijson", "loguru", "mistral_common", "msgspec", "openai", "openai_harmony"),
    *("partial_json_parser", "prometheus_client", "psutil", "pybase64", "requests", "setproctitle", "starlette"),
    *("tiktoken", "uvloop", "llguidance", "watchfiles", "xgrammar", "zmq"),
}
BINARIES = {"vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C", "vllm._moe_C_stable_libtorch"}
# Parts of vLLM that come between: front ends, which ask much of openai's and fastapi's classes, and attention.
ASIDE = {"vllm.entrypoints", "vllm.parser", "vllm.vllm_flash_attn"}


class _Stub(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        parts = name.split(".")
        is_stub = any(".".join(parts[:count]) in self.names for count in range(1, len(parts) + 1))
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_stub else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


_operators: list[torch.library.Library] = []


def _define(schema: str, value: Any) -> None:
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(schema)
    library.impl(schema.partition("(")[0], lambda *_: value, "CompositeExplicitAutograd")
    _operators.append(library)


def pretend(folder: Path) -> None:
    """Make ``import vllm`` find the unpacked wheel in ``folder``, on a pretended Hopper GPU."""
    sys.path[:0] = [str(folder)]
    sys.path += [str(folder.parent / "transformers-5.17.0"), str(folder.parent / "site")]
    sys.meta_path.insert(0, _Finder(ASIDE))
    sys.meta_path.append(_Finder(PACKAGES | BINARIES))  # last, so that what is installed is used
    for name in (
        "cutlass_scaled_mm_supports_fp8",
        "cutlass_scaled_mm_supports_block_fp8",
        "cutlass_group_gemm_supported",
    ):
        _define(f"{name}(int capability) -> bool", False)
    import vllm.platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class Hopper(CudaPlatformBase):  # type: ignore[misc]
        device_name = "pretended Hopper"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:
            return DeviceCapability(9, 0)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            return "pretended Hopper"

        @classmethod
        def has_device_capability(cls, capability: Any, device_id: int = 0) -> bool:
            number = capability if isinstance(capability, int) else capability[0] * 10 + capability[1]
            return bool(number <= 90)

    vllm.platforms._current_platform = Hopper()
