"""Python packages in archives, as some peers come."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path


def unpacked(archive: Path) -> Path:
    """The folder that a wheel or another zip archive is unpacked into, in the temporary folder."""
    folder = Path(tempfile.gettempdir()) / f"{archive.stem}-unpacked"
    if not folder.is_dir():
        zipfile.ZipFile(archive).extractall(folder)
    return folder
