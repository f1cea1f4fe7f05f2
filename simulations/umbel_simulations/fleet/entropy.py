"""Bytes and keys that look random and are the same in every telling of a run.

A simulated device's id follows from its key, and what it draws follows from its id; so its key must be told again too.
"""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

_SECRET: Final = 32


class Told:
    """A source of bytes for one purpose."""

    def __init__(self, seed: int, purpose: str) -> None:
        self._prefix = f"{seed}/{purpose}/"
        self._count = 0

    def __call__(self, size: int) -> bytes:
        """The next `size` bytes."""
        self._count += 1
        return hashlib.shake_256(f"{self._prefix}{self._count}".encode()).digest(size)


def device_key(seed: int, device: int) -> bytes:
    """A device's key: EC P-256, PEM."""
    # 1 to 2**255: below the curve's order, whatever the digest is.
    secret = int.from_bytes(Told(seed, f"device/{device}")(_SECRET), "big") >> 1
    key = ec.derive_private_key(secret + 1, ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def signing_key(seed: int, whose: str) -> Ed25519PrivateKey:
    """A signing key for one purpose."""
    return Ed25519PrivateKey.from_private_bytes(Told(seed, whose)(_SECRET))
