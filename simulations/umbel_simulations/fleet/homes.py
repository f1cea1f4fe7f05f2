"""Homes of sleeping devices: the bytes of their files, packed; a real folder only while a device is awake.

Nothing of a device lives on but its home, as in the product. Bundle files are the same for all that hold them, so they
lie once in a pool and are linked into a home; what a device wrote itself is kept as bytes.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_BLOBS: Final = "blobs"
_SHARED: Final = "listing"
"""Verified release metadata: equal on most devices."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A home without its folder."""

    files: tuple[tuple[str, bytes], ...] = ()
    """Path within the home, and content."""
    blobs: tuple[str, ...] = ()
    """Paths within the home of files in the pool, by the digest that each is named by."""

    @property
    def size(self) -> int:
        """Bytes of memory that it takes, all told but for what devices share."""
        own = sum(sys.getsizeof(content) + sys.getsizeof((1, 2)) for _, content in self.files)
        return sys.getsizeof(self) + sys.getsizeof(self.files) + sys.getsizeof(self.blobs) + own


EMPTY: Final = Packed()


class Homes:
    """Folders for devices that are awake.

    Args:
        folder: where they lie; in memory (tmpfs) they cost least.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = folder / "pool"
        self._pool.mkdir(parents=True)
        self._pooled: set[str] = set()
        self._free: list[Path] = []
        self._made = 0
        self._folders: dict[str, bool] = {}
        """Paths within homes, each of which is a folder in all of them or in none."""
        self._shared: dict[bytes, bytes] = {}

    @contextmanager
    def awake(self, home: Packed) -> Iterator[tuple[Path, list[Packed]]]:
        """A folder with a home's files; when it is left, what lies there is packed into the list."""
        place = self._free.pop() if self._free else self._new()
        packed: list[Packed] = []
        self._unpack(home, place)
        try:
            yield place, packed
        finally:
            packed.append(self._pack(place))
            self._free.append(place)

    def close(self) -> None:
        """Remove all folders."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _new(self) -> Path:
        self._made += 1
        place = self._folder / f"awake-{self._made}"
        place.mkdir()
        return place

    def _unpack(self, home: Packed, place: Path) -> None:
        root, pool = f"{place}/", f"{self._pool}/"
        for name, content in home.files:
            try:
                _write(root + name, content)
            except FileNotFoundError:
                (place / name).parent.mkdir(parents=True)
                _write(root + name, content)
        for name in home.blobs:
            pooled = pool + name.rpartition("/")[2]
            try:
                os.link(pooled, root + name)
            except FileNotFoundError:
                (place / name).parent.mkdir(parents=True)
                os.link(pooled, root + name)

    def _pack(self, place: Path) -> Packed:
        files: list[tuple[str, bytes]] = []
        blobs: list[str] = []
        self._gather(str(place), "", files, blobs)
        return Packed(tuple(files), tuple(blobs))

    def _gather(self, place: str, prefix: str, files: list[tuple[str, bytes]], blobs: list[str]) -> None:
        in_pool, shared = prefix.endswith(f"{_BLOBS}/"), prefix.startswith(_SHARED)
        for entry in sorted(os.listdir(place)):  # noqa: PTH208 - see below
            path, name = f"{place}/{entry}", sys.intern(prefix + entry)
            if self._is_folder(path, name):
                self._gather(path, f"{name}/", files, blobs)
                continue
            if in_pool and "." not in entry:
                if entry not in self._pooled:
                    os.link(path, f"{self._pool}/{entry}")
                    self._pooled.add(entry)
                blobs.append(name)
            elif content := _read(path):
                files.append((name, self._shared.setdefault(content, content) if shared else content))
            os.unlink(path)  # noqa: PTH108 - see below

    def _is_folder(self, path: str, name: str) -> bool:
        known = self._folders.get(name)
        if known is None:
            known = self._folders[name] = os.path.isdir(path)  # noqa: PTH112 - see below
        return known


# Strings and the system's own calls: with `Path` a visit's files would cost more than its work.


def _write(path: str, content: bytes) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(file, content)
    finally:
        os.close(file)


def _read(path: str) -> bytes:
    file = os.open(path, os.O_RDONLY)
    try:
        return os.read(file, os.fstat(file).st_size)
    finally:
        os.close(file)
