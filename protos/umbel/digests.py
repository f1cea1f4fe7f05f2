"""Content addresses: a blob's name is the SHA-256 of its bytes, in hex."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NewType

from umbel.errors import DigestMismatch, MalformedMessage

Digest = NewType("Digest", str)
"""64 lower-case hex digits: the SHA-256 of some bytes."""

_PIECE = 256 << 10
_FORM = re.compile(r"[0-9a-f]{64}")


def digest_of(data: bytes | memoryview) -> Digest:
    """The name of `data`."""
    return Digest(hashlib.sha256(data).hexdigest())


def digest_of_file(path: Path) -> Digest:
    """The name of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return Digest(digest.hexdigest())


def parse_digest(text: str) -> Digest:
    """Check the form of a digest that came from elsewhere (it may become a file name).

    Raises:
        MalformedMessage: `text` isn't 64 lower-case hex digits.
    """
    if not _FORM.fullmatch(text):
        raise MalformedMessage(f"not a SHA-256 digest: {text[:80]!r}; send 64 lower-case hex digits")
    return Digest(text)


def verify_digest(data: bytes | memoryview, expected: Digest) -> None:
    """Raise `DigestMismatch` unless `data` hashes to `expected`."""
    found = digest_of(data)
    if found != expected:
        raise DigestMismatch(f"expected bytes with digest {expected}, got {found}; fetch them again")
