"""Releases: which version of a model a device may run, and the rules by which it believes that.

A signature covers the statement's bytes as they travelled (`umbel.v1.Release`), under a label of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.digests import Digest, digest_of
from umbel.errors import MalformedMessage, OutOfBounds, RollbackRefused, SignatureInvalid
from umbel.manifest import MAX_MANIFEST_BYTES
from umbel.signatures import verify_signature

LABEL = b"umbel-release/1\0"
STABLE = "stable"


@dataclass(frozen=True, slots=True)
class Release:
    """A publication of one version. Numbers rise by model, without exception."""

    model: str
    number: int
    version: int
    channel: str
    bundle: Digest
    manifest_size: int
    issued_at: float
    """POSIX seconds, to the millisecond."""


@dataclass(frozen=True, slots=True)
class SignedRelease:
    """A release as it travels: nothing in it may be believed before `verify_release`."""

    statement: bytes
    key_id: str
    signature: bytes


def key_id_of(public_key: bytes) -> str:
    """The short name of a public key: 16 hex digits of its SHA-256."""
    return digest_of(public_key)[:16]


def sign_statement(statement: bytes, key: Ed25519PrivateKey) -> SignedRelease:
    """Sign the bytes of a release."""
    public = key.public_key().public_bytes_raw()
    return SignedRelease(statement, key_id_of(public), key.sign(LABEL + statement))


def verify_statement(signed: SignedRelease, public_key: bytes) -> bytes:
    """The statement's bytes, once its signature has been checked.

    Raises:
        SignatureInvalid: signed by another key, or changed on the way.
    """
    if signed.key_id != key_id_of(public_key):
        raise SignatureInvalid(f"release signed by key {signed.key_id}, this device trusts {key_id_of(public_key)}")
    verify_signature(public_key, signed.signature, LABEL + signed.statement, "the release")
    return signed.statement


def require_newer(release: Release, newest_known: int) -> None:
    """Raise `RollbackRefused` if `release` is older than the newest that this device has trusted."""
    if release.number < newest_known:
        raise RollbackRefused(
            f"release {release.number} of {release.model!r} is older than {newest_known}, which was seen before"
        )


def require_plausible(release: Release) -> None:
    """Raise `MalformedMessage` for a release without a number or a version, `OutOfBounds` for an endless manifest."""
    if release.manifest_size > MAX_MANIFEST_BYTES:
        raise OutOfBounds(
            f"a release whose manifest has {release.manifest_size} bytes; the limit is {MAX_MANIFEST_BYTES}"
        )
    if release.number < 1 or release.version < 1:
        raise MalformedMessage("a release needs a number and a version of 1 or more")
