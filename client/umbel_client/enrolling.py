"""A folder becomes a device: its keys are on the disk before anybody is shown a token.

Coordinator and helper let a token be redeemed again by the key that redeemed it, and by no other. A device whose answer
was lost (its power went, its disk was full, the helper wasn't there yet) so asks again, with the same words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.clock import Clock, SystemClock
from umbel.digests import digest_of
from umbel.enrolment_code import EnrolmentCode
from umbel.errors import AlreadyExists, MalformedMessage, NotFound
from umbel.helper_card import HelperCard
from umbel.release import STABLE
from umbel_client.enrolment import Identity, identity_of, load_identity, new_key, request_enrolment, save_identity
from umbel_client.files import Disk, make_folder, read_any, within
from umbel_client.participation import enrol_at_helper
from umbel_client.private import save_pinned

_FILE: Final = "enrolling.json"


async def enrol(
    home: Path | str,
    code: EnrolmentCode,
    *,
    channel: str = STABLE,
    helper: tuple[HelperCard, str] | None = None,
    attestation: bytes = b"",
    again: bool = False,
    clock: Clock | None = None,
) -> Identity:
    """Redeem an enrolment code for a certificate, and keep it; the same call again finishes what was cut off.

    Args:
        home: the device's folder; made when it doesn't exist. Keys are made in it and stay there.
        code: from the operator; good for one device.
        channel: whose releases it follows.
        helper: a card and a token for this device: from then on it sends shares only, and refuses everything else.
        attestation: evidence of what it is, where the coordinator asks for some.
        again: replace what a folder is enrolled as; its examples and its model stay.
        clock: None means the system's.

    Raises:
        AlreadyExists: the folder is enrolled.
        EnrolmentRefused: a token is unknown, used up or too old.
        CertificateRefused: whoever answers isn't the coordinator that the code names.
        Unreachable: nobody answers; nothing is lost.
        OSError: the folder can't be written to; nothing is lost.
    """
    home = Path(home)
    known = _known(home)
    if known is not None and not again:
        raise AlreadyExists(
            f"{home} is enrolled already, as {known.device_id}; to replace that, enrol it with --again (again=True)"
        )
    pending = _PendingKeys(home)
    key = pending.key(code.token, lambda: new_key().decode()).encode()
    identity = identity_of(await request_enrolment(code, key, attestation), key, channel)
    if helper is not None:
        card, token = helper
        own = pending.key(token, lambda: Ed25519PrivateKey.generate().private_bytes_raw().hex())
        now = (clock or SystemClock()).now()
        pinned = await enrol_at_helper(card, token, identity.population, now, _of_hex(own))
        # First: a device that knows its helper before its coordinator never sends in the clear.
        save_pinned(home, pinned)
    save_identity(home, identity)
    pending.done()
    return identity


def _known(home: Path) -> Identity | None:
    try:
        return load_identity(home)
    except (NotFound, MalformedMessage):
        return None


def _of_hex(key: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(key))


class _PendingKeys:
    """The keys that were made for tokens in a home, until it is enrolled."""

    def __init__(self, home: Path) -> None:
        make_folder(home, 0o700)
        self._file = within(home, _FILE)
        self._disk = Disk()

    def key(self, token: str, make: Callable[[], str]) -> str:
        """The key that goes with a token: the one that was made for it before, or a new one; durable."""
        name, keys = digest_of(token.encode()), self._read()
        if name not in keys:
            keys[name] = make()
            self._disk.write(self._file, json.dumps(keys).encode())
        return keys[name]

    def done(self) -> None:
        """The device is enrolled, and its keys lie where they belong."""
        self._disk.remove(self._file)

    def _read(self) -> dict[str, str]:
        try:
            return {str(name): str(key) for name, key in json.loads(read_any(self._file) or b"{}").items()}
        except (ValueError, AttributeError):
            return {}
