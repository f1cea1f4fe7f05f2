"""Small durable steps on disk: whatever a device must not lose is written through here.

A file is replaced whole or not at all: written beside its place and moved over. A process that dies between any two
steps leaves the old file or the new one. Durable writes are flushed to the medium too, file and folder, and hold when
the power goes; they cost milliseconds, so what a device can do without is written the quick way.
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
    """Writes whole files; `on_step` hears of each step before it is taken, so that tests can die there."""

    def __init__(self, on_step: Callable[[str], None] = _go_on) -> None:
        self._on_step = on_step

    def write(self, path: Path, data: bytes, mode: int = PRIVATE, *, durable: bool = True) -> None:
        """Put `data` at `path`, whole or not at all."""
        beside = path.with_name(path.name + BESIDE)
        self._on_step(f"create {path.name}")
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            self._on_step(f"write {path.name}")
            file.write(data)
            file.flush()
            if durable:
                self._on_step(f"flush {path.name}")
                os.fsync(file.fileno())
        self.move(beside, path)
        if durable:
            self.flush_folder(path.parent)

    def move(self, source: Path, target: Path) -> None:
        """Move a file over `target`, in one step."""
        self._on_step(f"replace {target.name}")
        source.replace(target)

    def remove(self, path: Path) -> None:
        """Remove a file; it may be gone already."""
        self._on_step(f"remove {path.name}")
        path.unlink(missing_ok=True)

    def flush_folder(self, folder: Path) -> None:
        """Bring the names in a folder to the medium."""
        self._on_step(f"flush folder {folder.name}")
        _flush(folder)

    def flush_file(self, path: Path) -> None:
        """Bring a file's bytes to the medium."""
        self._on_step(f"flush {path.name}")
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
