"""Answer pip's build hooks with what the sdist's PKG-INFO says, so that `pip download` runs no code of the package.

pip asks a source archive's build backend for metadata even when it only downloads. This file, first on PYTHONPATH,
puts itself in the place of whichever backend the archive names.
"""

from __future__ import annotations

import os
import sys
from email import message_from_string
from pathlib import Path
from types import ModuleType


def prepare_metadata_for_build_wheel(folder: str, settings: object = None) -> str:
    """Write a minimal METADATA from the archive's own PKG-INFO, in whose folder pip runs this."""
    info = message_from_string(Path("PKG-INFO").read_text(encoding="utf-8", errors="replace"))
    name, version = str(info["Name"]), str(info["Version"])
    target = Path(folder) / f"{name.replace('-', '_')}-{version}.dist-info"
    target.mkdir()
    (target / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    return target.name


backend = os.environ.get("_PYPROJECT_HOOKS_BUILD_BACKEND") or os.environ.get("PEP517_BUILD_BACKEND")
if backend:
    name = backend.partition(":")[0]
    module = ModuleType(name)
    module.prepare_metadata_for_build_wheel = prepare_metadata_for_build_wheel  # type: ignore[attr-defined]
    for attribute in filter(None, backend.partition(":")[2].split(".")):
        setattr(module, attribute, module)
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = ".".join(parts[:depth])
        package = sys.modules.setdefault(parent, ModuleType(parent))
        package.__path__ = []
    sys.modules[name] = module
