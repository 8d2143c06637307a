"""Unpack torch releases into FOLDER/<version>, for the CPU tests to run on a machine without a GPU.

    python tools/torch_matrix.py FOLDER [VERSION ...]
    PYTHONPATH=FOLDER/2.10.0 python -m pytest

The wheels on the package index are built for CUDA and cannot be imported without gigabytes of NVIDIA libraries. This
unpacks a wheel without its CUDA part and generates one small stub library for everything that is absent: it defines
each symbol that the rest of torch needs from elsewhere, and its functions report that there is no device. It needs
Linux with gcc and binutils, and a Python that has torch's Python dependencies.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

OLDEST, NEWEST = "2.10.0", "2.15.0"

CUDA_PART = re.compile(r"torch/(share/|bin/ptxas|lib/lib(torch_cuda|torch_nvshmem|caffe2_nvrtc))")
SYSTEM_LIBRARY = re.compile(r"lib(c|m|dl|rt|pthread|util|stdc\+\+|gcc_s)\.so|ld-linux")
SYSTEM_VERSION = re.compile(r"GLIBC|CXXABI|GCC_")
STAND_IN = "libstand_in.so"

# The kinds of stub, chosen by the mangled name of a symbol below. `nothing` is aligned so that the low bits of its
# address are zero: read as a bool or a small integer it is 0, read as a pointer it points to zeros.
PRELUDE = r"""
static char nothing[1 << 16] __attribute__((aligned(1 << 16)));
static void *do_nothing(void) { return nothing; }
extern char class_typeinfo_vtable[] __asm__("_ZTVN10__cxxabiv117__class_type_infoE");
struct typeinfo { void *vtable; const char *name; };
static struct typeinfo unnamed = {class_typeinfo_vtable + 16, "8stand_in"};
struct vtable { long offset; struct typeinfo *type; void *functions[200]; };
static struct vtable any_vtable = {0, &unnamed, {[0 ... 199] = do_nothing}};
#define TYPEINFO(id, name) struct typeinfo id __asm__(name) = {class_typeinfo_vtable + 16, name + 4};
#define VTABLE(id, name) struct vtable id __asm__(name) = {0, &unnamed, {[0 ... 199] = do_nothing}};
#define CONSTRUCTOR(id, name) void id(void **) __asm__(name); void id(void **self) { *self = any_vtable.functions; }
#define CXX_FUNCTION(id, name) void *id(void) __asm__(name); void *id(void) { return nothing; }
#define STRING_FUNCTION(id, name) char *id(void) __asm__(name); char *id(void) { return "no device"; }
#define C_FUNCTION(id, name) long id(void) __asm__(name); long id(void) { return 100 /* cudaErrorNoDevice */; }
"""
STAND_INS = (
    ("_ZTI", "TYPEINFO"),
    ("_ZT[VT]", "VTABLE"),
    ("_Z.*C[12]E", "CONSTRUCTOR"),
    ("_Z", "CXX_FUNCTION"),
    (".*Get(Error)?(String|Name)", "STRING_FUNCTION"),
    ("", "C_FUNCTION"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("versions", nargs="*", default=[OLDEST, NEWEST])
    arguments = parser.parse_args()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda version: make(version, arguments.folder / version), arguments.versions))


def make(version: str, folder: Path) -> None:
    """Unpack one release, unless an earlier run finished it."""
    finished = folder / "finished"
    if finished.exists():
        return
    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(download(version, Path(scratch))) as wheel:
        wheel.extractall(folder, [name for name in wheel.namelist() if not CUDA_PART.match(name)])
    (folder / "torch/bin/torch_shm_manager").chmod(0o755)
    build_stand_in(folder / "torch/lib")
    edit(folder / "torch/version.py", r"(?m)^cuda\b.*", "cuda = None")
    edit(folder / "torch/backends/cuda/__init__.py", r"return torch\._C\._has_cuda\b", "return False")
    finished.touch()


def download(version: str, folder: Path) -> Path:
    """Download the wheel of a release. pip's configuration may cap torch's version: on failure, retry without it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--dest", str(folder), f"torch=={version}"]
    if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
        unset = {"PIP_CONFIG_FILE": os.devnull, "PIP_CONSTRAINT": ""}
        subprocess.run(command, check=True, env={**os.environ, **unset})
    (wheel,) = folder.glob("*.whl")
    return wheel


def build_stand_in(lib: Path) -> None:
    """Compile the stub library, and link it under the name of every library that is absent."""
    libraries = closure(lib, ["libtorch_global_deps.so", "libtorch_python.so"])
    present = [lib / name for name in libraries if (lib / name).exists()]
    wanted = missing_symbols(present)
    code = [f'{stand_in(name)}(symbol{i}, "{name}")' for i, name in enumerate(wanted)]
    version_map = lib / "stand_in.map"
    version_map.write_text("".join(version_nodes(wanted)))
    command = ["gcc", "-w", "-shared", "-fPIC", "-xc", "-", "-o", str(lib / STAND_IN), "-lstdc++"]
    command += [f"-Wl,--version-script={version_map}"]
    subprocess.run(command, input=PRELUDE + "\n".join(code), text=True, check=True)
    for name in libraries:
        if not (lib / name).exists():
            (lib / name).symlink_to(STAND_IN)


def closure(lib: Path, roots: list[str]) -> list[str]:
    """The names of all libraries that the roots need, except the system's."""
    names = list(roots)
    for name in names:  # grows as it is walked
        if (lib / name).exists():
            names += [n for n in needed(lib / name) if n not in names and not SYSTEM_LIBRARY.match(n)]
    return names


def needed(library: Path) -> list[str]:
    dynamic = subprocess.run(["readelf", "-dW", str(library)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)


def missing_symbols(libraries: Iterable[Path]) -> dict[str, str]:
    """Symbols, with their versions, that these libraries need and that neither they nor the system define."""
    defined: set[str] = set()
    wanted: dict[str, str] = {}
    for library in libraries:
        table = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True, check=True).stdout
        for kind, name, version in re.findall(r"(?m) (\w) ([^@\s]+)@*(\S*)$", table):
            if kind == "U" and not SYSTEM_VERSION.match(version):
                wanted[name] = version or wanted.get(name, "")
            elif kind not in "Uwv":
                defined.add(name)
    system = [ctypes.CDLL("libstdc++.so.6"), ctypes.CDLL(None)]
    return {
        name: version or "STAND_IN"
        for name, version in wanted.items()
        if name not in defined and (version or not any(hasattr(library, name) for library in system))
    }


def stand_in(name: str) -> str:
    return next(macro for pattern, macro in STAND_INS if re.match(pattern, name))


def version_nodes(symbols: dict[str, str]) -> Iterable[str]:
    for version in sorted(set(symbols.values())):
        names = " ".join(f"{name};" for name in symbols if symbols[name] == version)
        yield f"{version} {{ {names} }};\n"


def edit(file: Path, pattern: str, replacement: str) -> None:
    file.write_text(re.sub(pattern, replacement, file.read_text()))


if __name__ == "__main__":
    main()
