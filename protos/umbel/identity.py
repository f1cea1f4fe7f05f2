"""Who a machine is: an id derived from its key, whatever name it asks for."""

from __future__ import annotations

from typing import NewType

from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from umbel.digests import digest_of

DeviceId = NewType("DeviceId", str)
"""32 hex digits of the SHA-256 of the public key (SubjectPublicKeyInfo, DER)."""


def id_of_key(public_key: PublicKeyTypes) -> DeviceId:
    """The id that belongs to a key, for devices and operators alike."""
    spki = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return DeviceId(digest_of(spki)[:32])
