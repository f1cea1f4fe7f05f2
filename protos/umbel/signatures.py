"""Whether a statement is signed by whom it should be: Ed25519 over the bytes as they travelled, a label before them."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from umbel.errors import SignatureInvalid


def verify_signature(public_key: bytes, signature: bytes, content: bytes, what: str) -> None:
    """Raise `SignatureInvalid` unless `signature` is Ed25519 by `public_key` (raw) over `content`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, content)
    except (InvalidSignature, ValueError) as error:
        raise SignatureInvalid(f"{what} isn't signed by the key it should be; nothing was done with it") from error
