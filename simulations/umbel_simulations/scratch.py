"""A run's own files while it goes on: in memory where the machine has such a place, gone once it is over.

A killed run tidies nothing up. So where its files lie stands in its folder, and whoever comes after deletes them.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_NAME: Final = "umbel-fleet-"
_TOLD: Final = "scratch"
_IN_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - only ever for a folder of our own


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder for a run's own files; `folder` says where, and what a killed run left goes first."""
    forget(folder)
    fits = _IN_MEMORY.is_dir() and shutil.disk_usage(_IN_MEMORY).free > 1 << 30
    try:
        # Told first: a run that is killed in between leaves a word of a folder that isn't there, never the other way.
        place = (_IN_MEMORY if fits else folder) / f"{_NAME}{secrets.token_hex(8)}"
        (folder / _TOLD).write_text(str(place), encoding="utf-8")
        place.mkdir(mode=0o700)
        yield place
    finally:
        forget(folder)


def forget(folder: Path) -> None:
    """Delete what a killed run that had its state in `folder` left elsewhere; nothing if it left nothing."""
    told = folder / _TOLD
    if told.is_file():
        left = Path(told.read_text(encoding="utf-8"))
        if left.name.startswith(_NAME):
            shutil.rmtree(left, ignore_errors=True)
        told.unlink()
