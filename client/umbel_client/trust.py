"""Bytes in, verified release out. No IO: what the device has seen so far goes in and comes out as a value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from umbel.digests import Digest
from umbel.errors import NotAllowed, RollbackRefused
from umbel.messages import release_from_bytes
from umbel.release import STABLE, Release, SignedRelease, require_newer, verify_statement


@dataclass(frozen=True, slots=True)
class Seen:
    """The newest release of one model and channel that this device has trusted."""

    number: int
    bundle: Digest


@dataclass(frozen=True, slots=True)
class Trust:
    """The pinned key, the channel that the device follows, and what it has seen."""

    release_key: bytes
    """Ed25519, raw, pinned at enrolment."""
    channel: str = STABLE
    model: str = ""
    """The model that the device answers with; empty until its first release."""
    seen: Mapping[str, Seen] = field(default_factory=dict)
    """By "model/channel"."""

    def verify_newest(self, signed: SignedRelease) -> Release:
        """The release inside, once it is shown to be authentic, meant for this device, and not a step back.

        Raises:
            SignatureInvalid: not signed by the pinned key, or changed on the way.
            MalformedMessage: signed, but not a release.
            NotAllowed: of another channel or model than this device follows.
            RollbackRefused: older than the newest release seen before, or another one of the same number.
        """
        release = self.verify_base(signed)
        if release.channel != self.channel:
            raise NotAllowed(f"a release of channel {release.channel!r}; this device follows {self.channel!r}")
        if self.model and release.model != self.model:
            raise NotAllowed(f"a release of model {release.model!r}; this device answers with {self.model!r}")
        seen = self.seen.get(_key(release))
        if seen is not None:
            require_newer(release, seen.number)
            if release.number == seen.number and release.bundle != seen.bundle:
                raise RollbackRefused(f"release {release.number} of {release.model!r} was seen with another content")
        return release

    def verify_base(self, signed: SignedRelease) -> Release:
        """The release that an assignment starts from: authentic, and of any channel and age.

        A round may start from a candidate, or have begun before the newest release; nothing is adopted by it.

        Raises:
            SignatureInvalid: not signed by the pinned key, or changed on the way.
            MalformedMessage: signed, but not a release.
        """
        return release_from_bytes(verify_statement(signed, self.release_key))

    def remember(self, release: Release) -> Trust:
        """The trust of a device that has seen `release`, which `verify_newest` gave."""
        seen = {**self.seen, _key(release): Seen(release.number, release.bundle)}
        return replace(self, model=self.model or release.model, seen=seen)


def _key(release: Release) -> str:
    return f"{release.model}/{release.channel}"
