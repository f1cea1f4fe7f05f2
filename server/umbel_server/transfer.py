"""A bundle on its way to or from an operator: each file as its name and size, then its bytes in chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from umbel.bundle import MANIFEST_FILE, Bundle
from umbel.errors import MalformedMessage, OutOfBounds
from umbel.fields import MAX_ENTRIES, name
from umbel.manifest import MAX_MANIFEST_BYTES

CHUNK_BYTES: Final = 256 << 10
MAX_BUNDLE_BYTES: Final = 16 << 30


@dataclass(frozen=True, slots=True)
class FileStart:
    """The next chunks are of this file."""

    name: str
    size: int


Step = FileStart | bytes


def send_bundle(bundle: Bundle) -> Iterator[Step]:
    """The manifest, then each file that it lists."""
    manifest = bundle.manifest.to_bytes()
    yield FileStart(MANIFEST_FILE, len(manifest))
    yield from (manifest[start : start + CHUNK_BYTES] for start in range(0, len(manifest), CHUNK_BYTES))
    for file_name, reference in bundle.manifest.files.items():
        yield FileStart(file_name, reference.size)
        with bundle.paths[file_name].open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk


class BundleReceiver:
    """Writes what `send_bundle` sends into a folder; trusts nothing of it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: set[str] = set()
        self._file: IO[bytes] | None = None
        self._missing = 0
        self._total = 0

    def take(self, step: Step) -> None:
        """Take the next step.

        Raises:
            MalformedMessage: a name that isn't a file's, twice the same name, or bytes that belong to no file.
            OutOfBounds: more files or bytes than a bundle may have.
        """
        match step:
            case FileStart(file_name, size):
                self._start(name(file_name, "file"), size)
            case bytes():
                self._append(step)

    def finish(self) -> None:
        """Close the last file; whether the folder holds a bundle is for `Bundle.open` to say.

        Raises:
            MalformedMessage: the last file isn't whole.
        """
        self._require_whole()
        self.close()

    def close(self) -> None:
        """Let go of the open file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _start(self, file_name: str, size: int) -> None:
        self._require_whole()
        if file_name in self._names:
            raise MalformedMessage(f"file {file_name!r} comes twice")
        self._total += size
        if self._total > MAX_BUNDLE_BYTES or (file_name == MANIFEST_FILE and size > MAX_MANIFEST_BYTES):
            raise OutOfBounds(f"file {file_name!r} of {size} bytes makes the bundle too large")
        if len(self._names) >= MAX_ENTRIES:
            raise OutOfBounds(f"more than {MAX_ENTRIES} files in a bundle")
        self._names.add(file_name)
        self.close()
        self._file = (self._folder / file_name).open("xb")
        self._missing = size

    def _append(self, chunk: bytes) -> None:
        if self._file is None or not chunk or len(chunk) > self._missing:
            raise MalformedMessage("bytes that belong to no announced file")
        self._file.write(chunk)
        self._missing -= len(chunk)

    def _require_whole(self) -> None:
        if self._missing:
            raise MalformedMessage(f"a file ended {self._missing} bytes short of its announced size; send it again")
