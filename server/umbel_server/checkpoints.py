"""Checkpoints of the audit log: a Merkle root over all rows, signed, and given to witnesses.

The hash chain shows an edit or a deletion in the middle. Cut off at the end, or written anew from some row on, it looks
whole: only who has kept an earlier root can tell. Roots are those of RFC 6962 (section 2.1), checkpoints are signed
notes (C2SP: origin, size, root; a blank line; signatures), signed with a key of its own, and appended to a witness
file that belongs on another machine. The newest one also rides in the release listing's timestamp, so that the whole
fleet has seen it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.errors import DigestMismatch, MalformedMessage, SignatureInvalid
from umbel.signatures import verify_signature
from umbel_server import audit
from umbel_server.store import Store
from umbel_server.tables import AUDIT, CHECKPOINTS

ORIGIN: Final = "umbel/audit"
_ED25519: Final = b"\x01"
_BETWEEN: Final = "\n\n"
"""After each note in a witness file."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """How long the log was, and what was in it."""

    size: int
    root: bytes
    """32 bytes."""

    @property
    def text(self) -> str:
        """What is signed."""
        return f"{ORIGIN}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @property
    def short(self) -> str:
        """One line, for the release listing's timestamp."""
        return f"{self.size} {self.root.hex()}"


class MerkleTree:
    """The Merkle tree hash of RFC 6962, 2.1, over leaves that come one by one; a few hashes for each, and for a root.

    Kept are the roots of the whole subtrees that the leaves make up so far, largest first: one for each 1 in the binary
    number of leaves.
    """

    def __init__(self) -> None:
        self.size = 0
        self._whole: list[bytes] = []

    def add(self, leaf: bytes) -> None:
        """One more leaf, not hashed yet."""
        node, pairs = hashlib.sha256(b"\0" + leaf).digest(), self.size
        while pairs % 2:
            node, pairs = _parent(self._whole.pop(), node), pairs // 2
        self._whole.append(node)
        self.size += 1

    @property
    def root(self) -> bytes:
        """Of the leaves so far."""
        if not self._whole:
            return hashlib.sha256(b"").digest()
        return functools.reduce(lambda right, left: _parent(left, right), reversed(self._whole))


def _parent(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()


def sign(checkpoint: Checkpoint, key: Ed25519PrivateKey) -> str:
    """The checkpoint as a signed note."""
    signature = key.sign(checkpoint.text.encode())
    public = key.public_key().public_bytes_raw()
    line = base64.b64encode(_key_hash(public) + signature).decode()
    return f"{checkpoint.text}\n\N{EM DASH} {ORIGIN} {line}\n"


def open_note(note: str, public_key: bytes) -> Checkpoint:
    """The checkpoint in a signed note.

    Raises:
        MalformedMessage: not a note of this log.
        SignatureInvalid: not signed by this key.
    """
    try:
        body, _, signatures = note.partition("\n\n")
        origin, size, root = body.split("\n")
        checkpoint = Checkpoint(int(size), base64.b64decode(root, validate=True))
        dash, name, blob = signatures.strip().split(" ")
        signed = base64.b64decode(blob, validate=True)
    except ValueError as error:
        raise MalformedMessage(f"not a signed checkpoint: {error}") from error
    if (origin, name, dash) != (ORIGIN, ORIGIN, "\N{EM DASH}") or signed[:4] != _key_hash(public_key):
        raise SignatureInvalid("a checkpoint of another log, or signed with another key")
    verify_signature(public_key, signed[4:], checkpoint.text.encode(), "a checkpoint")
    return checkpoint


def key_to_text(public_key: bytes) -> str:
    """A public key as C2SP's signed notes write it: name, hash, and what verifies."""
    return f"{ORIGIN}+{_key_hash(public_key).hex()}+{base64.b64encode(_ED25519 + public_key).decode()}"


def key_from_text(text: str) -> bytes:
    """Undo `key_to_text`; raises `MalformedMessage`."""
    try:
        origin, found, data = text.strip().split("+", 2)
        key = base64.b64decode(data, validate=True)
    except ValueError as error:
        raise MalformedMessage(f"not a checkpoint's key: {error}; `umbel audit key` prints one") from error
    if origin != ORIGIN or len(key) != 33 or key[:1] != _ED25519 or _key_hash(key[1:]).hex() != found:
        raise MalformedMessage("not a key of this kind of log; `umbel audit key` prints one")
    return key[1:]


def notes_of_text(text: str) -> list[str]:
    """The notes in a witness file, oldest first."""
    return [f"{note.strip()}\n" for note in text.split(f"\n{_BETWEEN}") if note.strip()]


def _key_hash(public_key: bytes) -> bytes:
    return hashlib.sha256(ORIGIN.encode() + b"\n" + _ED25519 + public_key).digest()[:4]


class Witness:
    """Makes checkpoints of a log, and keeps the notes of all of them in a file.

    Args:
        key: signs; it belongs on another machine than the database.
        file: one note after the other; only ever appended to.
    """

    def __init__(self, key: Ed25519PrivateKey, file: Path) -> None:
        self._key = key
        self._file = file
        self._tree = MerkleTree()
        self.newest = self._last()

    @property
    def public_key(self) -> bytes:
        """What verifies its notes: Ed25519, raw."""
        return self._key.public_key().public_bytes_raw()

    def take(self, store: Store, now: float) -> Checkpoint | None:
        """A checkpoint of the log as it is now, if it has grown since the last one."""
        with store.reading() as connection:
            for leaf in _leaves(connection, after=self._tree.size):
                self._tree.add(leaf)
        if not self._tree.size or (self.newest is not None and self._tree.size <= self.newest.size):
            return None
        checkpoint = Checkpoint(self._tree.size, self._tree.root)
        note = sign(checkpoint, self._key)
        self._append(note)
        with store.transaction() as connection:
            connection.execute(CHECKPOINTS.insert().values(size=checkpoint.size, note=note, at=now))
        self.newest = checkpoint
        return checkpoint

    def notes(self) -> list[str]:
        """All notes that were ever made, oldest first."""
        if not self._file.exists():
            return []
        written = self._file.read_bytes()
        return notes_of_text(written[: _whole(written)].decode())

    def verify(self, store: Store) -> int:
        """Walk the log, and hold it against every note; its length.

        Raises:
            DigestMismatch: naming what doesn't fit: an edit, a deletion, a cut, a rewriting.
            SignatureInvalid, MalformedMessage: a note that this witness never made.
        """
        with store.reading() as connection:
            length = audit.verify(connection)
            leaves = list(_leaves(connection))
        require_witnessed(leaves, (open_note(note, self.public_key) for note in self.notes()))
        return length

    def _last(self) -> Checkpoint | None:
        notes = self.notes()
        return open_note(notes[-1], self.public_key) if notes else None

    def _append(self, note: str) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._file.open("ab") as file:
            if file.tell():
                # The process died, or the disk was full, in the middle of the last one: this one says all that it did.
                file.truncate(_whole(self._file.read_bytes()))
            file.write(f"{note}{_BETWEEN}".encode())
            file.flush()
            os.fsync(file.fileno())


def _whole(written: bytes) -> int:
    """How far a witness file goes that may end in a part of a note."""
    end = f"\n{_BETWEEN}".encode()
    last = written.rfind(end)
    return 0 if last < 0 else last + len(end)


def require_witnessed(leaves: Sequence[bytes], checkpoints: Iterable[Checkpoint]) -> None:
    """Raise `DigestMismatch` unless the log still begins with everything that was witnessed."""
    seen = sorted(checkpoints, key=lambda checkpoint: checkpoint.size)
    if seen and len(leaves) < seen[-1].size:
        raise DigestMismatch(
            f"the audit log has {len(leaves)} rows, a witness saw {seen[-1].size}; somebody cut it off"
        )
    tree = MerkleTree()
    for checkpoint in seen:
        for leaf in leaves[tree.size : checkpoint.size]:
            tree.add(leaf)
        if tree.root != checkpoint.root:
            raise DigestMismatch(
                f"the first {checkpoint.size} audit rows aren't those that a witness saw; somebody wrote them anew"
            )


def _leaves(connection: sa.Connection, after: int = 0) -> Iterator[bytes]:
    query = sa.select(AUDIT.c.hash).where(AUDIT.c.sequence > after).order_by(AUDIT.c.sequence)
    return (bytes.fromhex(found) for found in connection.scalars(query))
