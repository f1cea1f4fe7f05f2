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
        self._free: list[Path] = []
        self._made = 0
        self._names: dict[str, str] = {}
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
        for name, content in home.files:
            path = place / name
            try:
                path.write_bytes(content)
            except FileNotFoundError:
                path.parent.mkdir(parents=True)
                path.write_bytes(content)
        for name in home.blobs:
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(self._pool / path.name, path)

    def _pack(self, place: Path) -> Packed:
        files: list[tuple[str, bytes]] = []
        blobs: list[str] = []
        self._gather(str(place), "", files, blobs)
        return Packed(tuple(files), tuple(blobs))

    def _gather(self, place: str, prefix: str, files: list[tuple[str, bytes]], blobs: list[str]) -> None:
        with os.scandir(place) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        in_pool, shared = prefix.endswith(f"{_BLOBS}/"), prefix.startswith(_SHARED)
        for entry in entries:
            name = self._name(prefix + entry.name)
            if entry.is_dir(follow_symlinks=False):
                self._gather(entry.path, f"{name}/", files, blobs)
                continue
            path = Path(entry.path)
            if in_pool and "." not in entry.name:
                if not (pooled := self._pool / entry.name).exists():
                    os.link(entry.path, pooled)
                blobs.append(name)
            elif content := path.read_bytes():
                files.append((name, self._shared.setdefault(content, content) if shared else content))
            path.unlink()

    def _name(self, name: str) -> str:
        return self._names.setdefault(name, name)
