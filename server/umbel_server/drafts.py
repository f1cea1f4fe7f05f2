"""Drafts of TUF metadata: numbered and dated, not signed yet; they may travel to where offline keys are kept."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import Any, Final, TypeVar

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Snapshot, Targets, Timestamp
from tuf.api.serialization.json import JSONSerializer

from umbel.errors import MalformedMessage
from umbel_server.keyring import rule_of

_COMPACT: Final = JSONSerializer(compact=True)
S = TypeVar("S", Root, Targets, Snapshot, Timestamp)


def draft(metadata: Metadata[Any], role: str, now: float) -> bytes:
    """The next version of a role's metadata, believed from `now` (POSIX seconds) for as long as its rule says."""
    # What is signed online is numbered by the seconds: a coordinator that was set up from a backup goes on above what
    # devices have seen of the one before it. Drafts that travel follow one another.
    metadata.signed.version = max(metadata.signed.version + 1, 0 if rule_of(role).offline else int(now))
    metadata.signed.expires = _instant(now + rule_of(role).lifetime_seconds)
    metadata.signatures.clear()
    return metadata.to_bytes(_COMPACT)


def unborn(signed: S) -> Metadata[S]:
    """What `draft` turns into version 1."""
    signed.version = 0
    return Metadata(signed)


def sign_draft(unsigned: bytes, signers: Iterable[CryptoSigner]) -> bytes:
    """Add signatures to a draft; what is done on the machine where offline keys live."""
    metadata = parse(unsigned)
    for signer in signers:
        metadata.sign(signer, append=True)
    return metadata.to_bytes(_COMPACT)


def parse(data: bytes) -> Metadata[Any]:
    """Metadata of any role, signed or not; raises `MalformedMessage`."""
    try:
        return Metadata.from_bytes(data)
    except RepositoryError as error:
        raise MalformedMessage(f"not TUF metadata: {error}") from error


def _instant(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
