"""Small durable steps on disk: whatever a device must not lose is written through here.

A file is replaced whole or not at all: written beside its place, flushed to the medium, moved over, and the folder
flushed too. A process that dies between any two steps leaves the old file or the new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

PRIVATE = 0o600
BESIDE = ".new"
"""What a file is called while it is being written; a leftover of a crash is overwritten by the next try."""


def _go_on(step: str) -> None:
    del step


class Disk:
    """Durable writes; `on_step` hears of each step before it is taken, so that tests can die there."""

    def __init__(self, on_step: Callable[[str], None] = _go_on) -> None:
        self._on_step = on_step

    def write(self, path: Path, data: bytes, mode: int = PRIVATE) -> None:
        """Put `data` at `path`, whole or not at all."""
        beside = path.with_name(path.name + BESIDE)
        self._on_step(f"create {path.name}")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            self._on_step(f"write {path.name}")
            file.write(data)
            file.flush()
            self._on_step(f"flush {path.name}")
            os.fsync(file.fileno())
        self.move(beside, path)

    def move(self, source: Path, target: Path) -> None:
        """Move a flushed file over `target`, in one step."""
        self._on_step(f"replace {target.name}")
        source.replace(target)
        self._on_step(f"flush folder of {target.name}")
        _flush_folder(target.parent)

    def remove(self, path: Path) -> None:
        """Remove a file; it may be gone already."""
        self._on_step(f"remove {path.name}")
        path.unlink(missing_ok=True)
        _flush_folder(path.parent)


def flush_file(path: Path) -> None:
    """Bring a file's bytes to the medium."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
