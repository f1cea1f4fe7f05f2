"""Small durable steps on disk: whatever a device must not lose is written through here.

A file is replaced whole or not at all: written beside its place and moved over. A process that dies between any two
steps leaves the old file or the new one. Durable writes are flushed to the medium too, file and folder, and hold when
the power goes; they cost milliseconds, so what a device can do without is written the quick way.

A visit reads and writes a dozen of them, each of a few hundred bytes: they go by the system's own calls, since `Path`
and buffered files would cost several times what the work itself does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

PRIVATE = 0o600
BESIDE = ".new"
"""What a file is called while it is being written; a leftover of a crash is removed by the next try."""


def _go_on(step: str) -> None:
    del step


class Disk:
    """Writes whole files; `on_step` hears of each step before it is taken, so that tests can die there."""

    def __init__(self, on_step: Callable[[str], None] = _go_on) -> None:
        self._on_step = on_step

    def write(self, path: Path, data: bytes, mode: int = PRIVATE, *, durable: bool = True) -> None:
        """Put `data` at `path`, whole or not at all."""
        place, name = str(path), path.name
        beside = place + BESIDE
        self._on_step(f"create {name}")
        descriptor = _create(beside, mode)
        try:
            self._on_step(f"write {name}")
            _write_all(descriptor, data)
            if durable:
                self._on_step(f"flush {name}")
                os.fsync(descriptor)
        except OSError:
            # What found no room must not take what little there is.
            os.unlink(beside)  # noqa: PTH108 - see above
            raise
        finally:
            os.close(descriptor)
        self._on_step(f"replace {name}")
        os.replace(beside, place)  # noqa: PTH105 - see above
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


def read(path: Path) -> bytes:
    """All of a small file; raises `OSError` if there is none."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        data = os.read(descriptor, size)
        while len(data) < size and (more := os.read(descriptor, size - len(data))):
            data += more
        return data
    finally:
        os.close(descriptor)


def read_any(path: Path) -> bytes | None:
    """All of a small file; None if there is none, which costs less to ask than to be told by an error."""
    if not os.access(path, os.F_OK):
        return None
    try:
        return read(path)
    except FileNotFoundError:
        return None


@lru_cache(maxsize=4096)
def within(folder: Path, name: str) -> Path:
    """`folder / name`, kept: a visit asks for the same dozen, and to join one costs more than to read what is there."""
    return folder / name


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder and those above it, unless it is there: which it nearly always is."""
    if not os.path.isdir(path):  # noqa: PTH112 - see above
        path.mkdir(mode, parents=True, exist_ok=True)


def _create(place: str, mode: int) -> int:
    """A new file, whatever goes by its name: what a crash has left, or a link that somebody put there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        return os.open(place, flags, mode)
    except FileExistsError:
        os.unlink(place)  # noqa: PTH108 - see above
        return os.open(place, flags, mode)


def _write_all(descriptor: int, data: bytes) -> None:
    written = os.write(descriptor, data)
    while written < len(data):
        written += os.write(descriptor, memoryview(data)[written:])


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
