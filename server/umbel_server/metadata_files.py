"""The folder of metadata that devices and mirrors read: files are written whole, and go once nobody asks for them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from umbel.errors import NotFound
from umbel.holding import alone_in
from umbel_server.files import drop_left, write_file

KEPT_FILES: Final = 16
"""Of each role, for devices that are in the middle of a refresh."""
_FILE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,150}\.json")


class MetadataFiles:
    """Files in `folder`, by name; it is made with the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While it lasts no other process changes these files: keys are rotated beside a coordinator that runs."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with alone_in(self.folder):
            yield

    def read(self, name: str) -> bytes:
        """A file's bytes; raises `NotFound`."""
        path = self.folder / name
        if not _FILE.fullmatch(name) or not path.is_file():
            raise NotFound(f"there is no metadata file {name[:80]!r}")
        return path.read_bytes()

    def names(self) -> list[str]:
        """All of them; none in a folder that isn't there."""
        found = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path.name for path in found if _FILE.fullmatch(path.name))

    def versions(self, role: str) -> list[int]:
        """Those that are here of a role, lowest first."""
        numbered = re.compile(rf"(\d+)\.{re.escape(role)}\.json")
        return sorted(int(match[1]) for name in self.names() if (match := numbered.fullmatch(name)))

    def write(self, name: str, data: bytes) -> None:
        """Write or replace a file; durable when it returns."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(self.folder / name, data)

    def drop_old(self, role: str) -> None:
        """Keep the newest files of a role, and none that was never finished.

        Not for roots: devices go from each to the next, however old theirs is.
        """
        for version in self.versions(role)[:-KEPT_FILES]:
            (self.folder / f"{version}.{role}.json").unlink(missing_ok=True)
        drop_left(self.folder, self.folder / "timestamp.json")
