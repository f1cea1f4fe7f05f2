"""Private rounds on the device: whom it trusts to hide its update in a sum, and under which conditions it takes part.

A device that has pinned a helper sends nothing else than shares: it refuses assignments that the coordinator could
open alone, and descriptors that break its own floors. A device without a helper can't take part in private rounds.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.descriptor import (
    LONGEST_SECONDS,
    RoundDescriptor,
    noise_multiplier,
    plan_digest,
    rd_of,
    require_current,
    verify_descriptor,
    weight_steps,
)
from umbel.digests import Digest
from umbel.errors import CohortTooSmall, MalformedMessage, NotAllowed, OutOfBounds
from umbel.helper_card import HelperCard
from umbel.participants import ParticipantCertificate
from umbel.randomness import generator
from umbel.sealing import SignedDescriptor
from umbel.secure_sum import Fresh, Participant, encode_update, seal_report
from umbel.update import Update
from umbel.visit import Assignment
from umbel_client.files import Disk, read_any, within

FILE: Final = "helper.json"
RENEW_AT: Final = 2 / 3
"""Share of its remaining life, counted from when it was got, after which a certificate is renewed."""


@dataclass(frozen=True, slots=True)
class PrivacyPolicy:
    """What this device asks of every private round, whatever coordinator and helper agreed on."""

    minimum_cohort: int = 5
    minimum_noise_multiplier: float = 0.0
    longest_seconds: float = LONGEST_SECONDS


@dataclass(frozen=True, slots=True)
class Pinned:
    """The helper that this device trusts, and its own key and certificate there."""

    card: HelperCard
    key: bytes
    """Ed25519, raw; used for nothing but reports."""
    certificate: ParticipantCertificate
    renew_after: float

    def __repr__(self) -> str:
        return f"Pinned({self.card.address}, {self.certificate.public_key.hex()[:16]})"

    def renewed(self, certificate: ParticipantCertificate, now: float) -> Pinned:
        """The same, with a newer certificate."""
        return replace(self, certificate=certificate, renew_after=_renew_after(certificate, now))


def pin(card: HelperCard, key: Ed25519PrivateKey, certificate: ParticipantCertificate, now: float) -> Pinned:
    """What a device keeps of its enrolment at a helper."""
    return Pinned(card, key.private_bytes_raw(), certificate, _renew_after(certificate, now))


def _renew_after(certificate: ParticipantCertificate, now: float) -> float:
    return now + RENEW_AT * (certificate.not_after_ms / 1000 - now)


def save_pinned(home: Path, pinned: Pinned, disk: Disk | None = None) -> None:
    """Keep it in the device's home, readable by its user only."""
    tree = {
        "card": json.loads(pinned.card.to_text()),
        "key": pinned.key.hex(),
        "public_key": pinned.certificate.public_key.hex(),
        "not_after_ms": pinned.certificate.not_after_ms,
        "signature": pinned.certificate.signature.hex(),
        "renew_after": pinned.renew_after,
    }
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    (disk or Disk()).write(home / FILE, json.dumps(tree, indent=1).encode())


def load_pinned(home: Path) -> Pinned | None:
    """The helper pinned in a home; None if there is none. A damaged file is refused, not taken for none."""
    try:
        content = read_any(within(home, FILE))
        if content is None:
            return None
        tree = json.loads(content)
        certificate = ParticipantCertificate(
            bytes.fromhex(tree["public_key"]), int(tree["not_after_ms"]), bytes.fromhex(tree["signature"])
        )
        card = HelperCard.from_text(json.dumps(tree["card"]))
        return Pinned(card, bytes.fromhex(tree["key"]), certificate, float(tree["renew_after"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedMessage(f"{home / FILE} is damaged ({error!r}); enrol at the helper again") from error


class Pinning:
    """The pinned helper as it is now: a renewed certificate is used at once."""

    def __init__(self, home: Path, disk: Disk) -> None:
        self._home = home
        self._disk = disk
        self.current = load_pinned(home)

    def keep(self, pinned: Pinned) -> None:
        """Remember a renewed certificate."""
        save_pinned(self._home, pinned, self._disk)
        self.current = pinned


def in_words(pinned: Pinned | None) -> str:
    """Who can read this device's updates, for its owner."""
    if pinned is None:
        return "sealed to the coordinator, which can read each one: no helper is pinned"
    who = pinned.card.operator or "whoever runs the coordinator"
    return f"split between the coordinator and a helper run by {who}: only sums are known"


def require_sealing(assignment: Assignment, pinned: Pinned | None) -> None:
    """Raise `NotAllowed` unless the assignment's privacy is what this device was set up for."""
    if pinned is not None and assignment.private_round is None:
        raise NotAllowed("the coordinator asks for an update that it could read alone; this device sends only shares")
    if pinned is None and assignment.private_round is not None:
        raise NotAllowed("the round is private and this device has pinned no helper; enrol it at one")


def verify_round(
    signed: SignedDescriptor,
    assignment: Assignment,
    base: Digest,
    population: str,
    keys: tuple[bytes, bytes],
    policy: PrivacyPolicy,
    now: float,
) -> RoundDescriptor:
    """Believe a round's descriptor, or refuse to take part.

    Args:
        signed: as it came with the assignment.
        assignment: what it must fit, with its plan.
        base: digest of the bundle that training starts from.
        population: the device's own.
        keys: the coordinator's release key and the pinned helper's identity (Ed25519, raw).
        policy: the device's floors.
        now: POSIX seconds.

    Raises:
        SignatureInvalid: not signed by both.
        NotAllowed: signed for another task, round, model or plan than this device was given.
        CohortTooSmall, OutOfBounds, WrongState, RoundClosed: a round that this device doesn't join.
    """
    descriptor = verify_descriptor(signed, *keys)
    require_current(descriptor, now)
    told = (assignment.task, assignment.round, assignment.plan.kind, base, plan_digest(assignment.plan), population)
    agreed = (
        descriptor.task, descriptor.round, descriptor.kind, descriptor.base, descriptor.plan, descriptor.population
    )  # fmt: skip
    if told != agreed:
        raise NotAllowed("this device was given another task, round, model or plan than the round's other devices")
    if descriptor.minimum < policy.minimum_cohort:
        raise CohortTooSmall(f"a cohort of {descriptor.minimum}; this device asks for {policy.minimum_cohort}")
    if descriptor.not_after - descriptor.not_before > policy.longest_seconds:
        raise OutOfBounds("the round stays open for longer than this device allows")
    if noise_multiplier(descriptor) < policy.minimum_noise_multiplier:
        raise OutOfBounds(f"less noise than the {policy.minimum_noise_multiplier} sensitivities this device asks for")
    return descriptor


def seal_privately(
    descriptor: RoundDescriptor,
    signed: SignedDescriptor,
    assignment: Assignment,
    report_id: str,
    update: Update,
    pinned: Pinned,
    device: str,
) -> bytes:
    """Split an update for the two aggregators: the bytes of one report.

    Raises:
        WeightsMismatch, NotFinite: an update that isn't this round's, or can't be summed.
        MalformedMessage: a key of the round's isn't one.
    """
    # What rounding draws hides nothing; what does is drawn below, by the operating system.
    chance = generator("rounding", assignment.plan.seed, assignment.task, assignment.round, device)
    weight = weight_steps(update.weight, assignment.plan, descriptor)
    cleartext = encode_update(descriptor, update.delta.to_vector(), weight, update.metrics, chance)
    participant = Participant(Ed25519PrivateKey.from_private_bytes(pinned.key), pinned.certificate)
    fresh = Fresh.draw(secrets.token_bytes)
    rd, name = rd_of(signed.statement), bytes.fromhex(report_id)
    return seal_report(descriptor, rd, name, cleartext, participant, fresh).to_bytes()
