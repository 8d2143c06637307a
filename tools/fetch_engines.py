"""Unpack the Python of the engines' releases that we test against: fetch_engines.py FOLDER

FOLDER/vllm-VERSION and FOLDER/transformers-VERSION for the oldest and the newest release of each, and FOLDER/site with
what these import and .venv lacks. Wheels are kept in FOLDER/cache. Exits with 3 where the package index has no such
wheel, which is no fault of ours.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.version import Version

OLDEST = {"vllm": "0.26.0", "transformers": "5.17.0"}
UNAVAILABLE = 3
PLATFORMS = [f"manylinux{name}_x86_64" for name in ("_2_35", "_2_34", "_2_31", "_2_28", "_2_17", "2014", "1")]
# Without the packages of .venv, and without what tests/helpers/pretend.py answers for.
SITE = (
    *("huggingface-hub>=1.31,<2", "tokenizers>=0.23.1,<0.24", "safetensors>=0.8", "regex", "pyyaml", "tqdm"),
    *("accelerate", "requests", "psutil", "pyzmq", "cloudpickle", "msgspec", "einops", "cachetools"),
    "compressed-tensors",
)
KEPT = (".py", ".json", ".txt", "METADATA")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    cache = folder / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    for name, oldest in OLDEST.items():
        if not download(f"{name}=={oldest}", cache) or not download(name, cache):
            print(f"the package index has no wheel of {name} for x86-64 Linux")
            return UNAVAILABLE
        wheels = {version_of(wheel): wheel for wheel in cache.glob(f"{name}-*.whl")}
        wanted = {Version(oldest), max(wheels)}
        for stale in folder.glob(f"{name}-*"):
            if version_of(stale) not in wanted:
                shutil.rmtree(stale)
        for version in wanted:
            unpack(wheels[version], folder)
    return 0 if install_site(folder / "site") else UNAVAILABLE


def pip(*arguments: object) -> bool:
    return subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)]).returncode == 0


def version_of(path: Path) -> Version:
    return Version(path.name.split("-")[1].removesuffix(".partial"))


def download(requirement: str, cache: Path) -> bool:
    """Bring a wheel into the cache; what is there is good enough where the index does not answer."""
    found = bool(list(cache.glob(f"{requirement.replace('==', '-')}-*.whl")))
    if found and "==" in requirement:
        return True
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    return pip("download", *options, *(f"--platform={one}" for one in PLATFORMS), "-d", cache, requirement) or found


def unpack(wheel: Path, folder: Path) -> None:
    """The Python files of a wheel; libraries are of no use without a GPU."""
    target = folder / "-".join(wheel.name.split("-")[:2])
    if target.exists():
        return
    partial = target.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(KEPT) and "/configs/E=" not in name:
                archive.extract(name, partial)
    partial.rename(target)


def install_site(site: Path) -> bool:
    """Packages beside .venv's: their dependencies too, but none that .venv has, torch above all."""
    if site.exists():
        return True
    partial = site.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", partial], check=True)
    (packages,) = partial.glob("lib/python*/site-packages")
    (packages / "beside.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    if not pip("--python", partial / "bin" / "python", "install", "--quiet", "--no-compile", *SITE):
        return False
    packages.rename(site)
    shutil.rmtree(partial)
    return True


if __name__ == "__main__":
    sys.exit(main())
