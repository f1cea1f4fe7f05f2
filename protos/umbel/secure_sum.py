"""The suite `umbel-2agg/1`: one upload, two aggregators, only the sum is ever known.

    device   encode_update -> seal_report     a masked vector sealed to the leader, its seed sealed to the helper
    leader   open_as_leader -> LeaderTotal    adds shares as they come, passes the capsules on
    helper   open_as_helper -> total_of_masks adds up masks and noise, once, for one set
    leader   cohort_sum.combine               the cohort's sum, or an error; never anything smaller

Additive shares after Prio and the additive scheme of Apple's aggregation (arXiv 2307.15017), with HPKE (RFC 9180, base
mode) for the capsules. All that a report belongs to stands in HPKE's `info` or the vector's associated data: round
descriptor, report id, recipient and its key. Secrets are arguments; see `Fresh.draw`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from numpy.typing import NDArray

from umbel.clip_vote import WITHIN_CLIP, vote
from umbel.descriptor import LABEL, RoundDescriptor, bound_of, key_id, layout_of, together
from umbel.discrete_gaussian import Entropy, discrete_gaussian
from umbel.errors import MalformedMessage, NotFinite, OutOfBounds, SealBroken, WeightsMismatch
from umbel.participants import KEY_BYTES, SIGNATURE_BYTES, ParticipantCertificate
from umbel.ring import LANE_FRACTION_BITS, l2_norm, quantise, rounded_norm_bound, signed_norm, to_lane
from umbel.sealing import open_with, seal_to
from umbel.secure_report import REPORT_ID_BYTES, TAG_BYTES, SealedShares
from umbel.shares import SEED_BYTES, Cleartext, HelperTotal, LeaderShare
from umbel.signatures import verify_signature
from umbel.update import Metrics

_NONCE: Final = bytes(12)
"""The content key seals one vector and is then forgotten, so its nonce may be constant."""
_DIGEST_BYTES: Final = 32
_HELPER_PLAIN: Final = SEED_BYTES + _DIGEST_BYTES + KEY_BYTES + 8 + 2 * SIGNATURE_BYTES
_ROUNDING_TRIES: Final = 64
_NOISE_BLOCK: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Fresh:
    """The secrets of one report; used for one and then forgotten."""

    seed: bytes
    content_key: bytes

    @classmethod
    def draw(cls, entropy: Entropy) -> Fresh:
        """Two new ones; in production `entropy` is `secrets.token_bytes`."""
        return cls(entropy(SEED_BYTES), entropy(32))

    def __repr__(self) -> str:
        return f"Fresh({len(self.seed)} + {len(self.content_key)} bytes)"


@dataclass(frozen=True, slots=True)
class Participant:
    """A device's own signing key and the helper's certificate for it."""

    key: Ed25519PrivateKey
    certificate: ParticipantCertificate

    def __repr__(self) -> str:
        return "Participant(a key and its certificate)"


@dataclass(frozen=True, slots=True)
class HelperItem:
    """What the leader passes on for one report: it can't open it."""

    report_id: bytes
    capsule: bytes
    commitment: bytes


@dataclass(frozen=True, slots=True)
class HelperSeed:
    """What the helper finds in one capsule."""

    report_id: bytes
    seed: bytes
    participant: bytes
    """The participant's public key."""

    def __repr__(self) -> str:
        return f"HelperSeed({self.report_id.hex()}, {len(self.seed)} bytes)"


# The device.


def encode_update(
    descriptor: RoundDescriptor,
    delta: NDArray[np.float32],
    weight: int,
    metrics: Metrics,
    chance: np.random.Generator,
    into: Cleartext | None = None,
) -> Cleartext:
    """Clip, select, rotate, round and store a delta of `descriptor.size` numbers in the ring, with its lanes.

    `into` may be a buffer of this round's layout to be used again: fresh memory can cost more than all the arithmetic.

    Raises:
        WeightsMismatch: a delta of another length.
        NotFinite: NaN or infinity anywhere.
        OutOfBounds: a weight outside 1 to `max_weight`.
    """
    if delta.size != descriptor.size or delta.dtype != np.float32:
        raise WeightsMismatch(f"a delta of {delta.size} {delta.dtype}; this round sums {descriptor.size} float32")
    if not 1 <= weight <= descriptor.max_weight:
        raise OutOfBounds(f"a report of weight {weight}; this round takes 1 to {descriptor.max_weight}")
    norm = l2_norm(delta)
    clip = min(1.0, descriptor.clip_norm / norm) if norm else 1.0
    layout = layout_of(descriptor)
    cleartext = Cleartext(layout, np.empty(layout.size, np.uint8)) if into is None else into
    factor = clip * descriptor.scale * weight
    _round(descriptor, delta, factor, weight, chance, cleartext)
    cleartext.lanes[0] = weight
    metrics = _within_bounds(descriptor, metrics)
    for index, lane in enumerate(descriptor.lanes, start=1):
        # The norm before clipping: afterwards all are short enough.
        is_vote = lane.name == WITHIN_CLIP
        value = vote(norm, descriptor.clip_norm) if is_vote else metrics.get(lane.name, 0.0)
        cleartext.lanes[index] = to_lane(value, lane.bound)
    return cleartext


def _within_bounds(descriptor: RoundDescriptor, metrics: Metrics) -> Metrics:
    """Metrics with the bins of a histogram cut down together, and none below zero: noise counts on it, not on a graph.

    They are rounded down, so that their sum isn't rounded over the bound.
    """
    unit, kept = 1 << LANE_FRACTION_BITS, dict(metrics)
    for lanes in together(descriptor.lanes):
        if len(lanes) == 1:
            continue
        counts = np.array([metrics.get(lane.name, 0.0) for lane in lanes])
        if not np.isfinite(counts).all():
            raise NotFinite(f"of {lanes[0].name!r} and the bins after it one is no number; nothing is sent")
        counts = np.maximum(counts, 0.0)
        most = bound_of(lanes)
        counts *= most / max(counts.sum(), most)
        kept |= zip((lane.name for lane in lanes), (np.floor(counts * unit) / unit).tolist(), strict=True)
    return kept


def _round(
    descriptor: RoundDescriptor,
    delta: NDArray[np.float32],
    factor: float,
    weight: int,
    chance: np.random.Generator,
    out: Cleartext,
) -> None:
    # Noise is measured against this bound, so it must hold, not just be likely: round again until it does.
    bound = rounded_norm_bound(descriptor.clip_norm * weight, descriptor.scale, out.numbers.size)
    for _ in range(_ROUNDING_TRIES):
        start = 0
        for piece in descriptor.transform.pieces(delta):
            quantise(piece, factor, descriptor.level * weight, chance, out.numbers[start : start + piece.size])
            start += piece.size
        if not descriptor.noise_variance or signed_norm(out.numbers) <= bound:
            return
    out.numbers[:] = 0  # a delta that won't fit its bound counts as none: 2^-46 for honest rounding


def seal_report(
    descriptor: RoundDescriptor,
    rd: bytes,
    report_id: bytes,
    cleartext: Cleartext,
    participant: Participant,
    fresh: Fresh,
) -> SealedShares:
    """Split an encoded update into a share and a seed and seal each to its aggregator; `cleartext` is used up.

    Raises:
        MalformedMessage: a key in the descriptor isn't one.
    """
    header = header_of(rd, report_id)
    commitment = _commitment(fresh.content_key, header)
    certificate = participant.certificate
    helper_plain = b"".join(
        (
            fresh.seed,
            commitment,
            certificate.public_key,
            certificate.not_after_ms.to_bytes(8, "little", signed=True),
            certificate.signature,
            participant.key.sign(_report_statement(header, commitment)),
        )
    )
    helper_key = descriptor.helper_keys[0]
    leader_key = descriptor.leader_key
    capsule = seal_to(helper_key, helper_plain, _info(header, b"helper", helper_key))
    leader_capsule = seal_to(leader_key, fresh.content_key, _info(header, b"leader", leader_key))
    share = cleartext.mask(fresh.seed, header)
    body = bytearray(share.layout.size + TAG_BYTES)
    AESGCM(fresh.content_key).encrypt_into(_NONCE, share.buffer, _associated(header, capsule), body)
    return SealedShares(rd, report_id, leader_capsule, capsule, memoryview(body))


# The leader.


def open_as_leader(
    descriptor: RoundDescriptor, rd: bytes, report: SealedShares, key: X25519PrivateKey, into: LeaderShare
) -> HelperItem:
    """Open the leader's half into `into` (a pooled buffer; its old content is lost even when this raises).

    Raises:
        SealBroken: for another round or key, or changed on the way.
        WeightsMismatch: a vector of another length.
    """
    if report.rd != rd:
        raise SealBroken("the report is for another round; nothing was counted")
    expected = layout_of(descriptor).size + TAG_BYTES
    if len(report.body) != expected:
        raise WeightsMismatch(f"a masked vector of {len(report.body)} bytes; this round's have {expected}")
    header = header_of(rd, report.report_id)
    content_key = open_with(key, report.leader_capsule, _info(header, b"leader", descriptor.leader_key))
    try:
        aead = AESGCM(content_key)
        aead.decrypt_into(_NONCE, report.body, _associated(header, report.helper_capsule), into.buffer)
    except (InvalidTag, ValueError) as error:
        raise SealBroken("the masked vector doesn't open for this round and report; nothing was counted") from error
    return HelperItem(report.report_id, report.helper_capsule, _commitment(content_key, header))


# The helper.


def open_as_helper(
    descriptor: RoundDescriptor, rd: bytes, item: HelperItem, key: X25519PrivateKey, authority: bytes, now: float
) -> HelperSeed:
    """Open the helper's half and check who made it.

    Raises:
        SealBroken: for another round, report or key; or the two halves are of different reports.
        CertificateRefused: a participant that the helper's authority doesn't vouch for.
        SignatureInvalid: the participant didn't sign this report.
    """
    header = header_of(rd, item.report_id)
    plain = open_with(key, item.capsule, _info(header, b"helper", descriptor.helper_keys[0]))
    if len(plain) != _HELPER_PLAIN:
        raise SealBroken(f"a capsule of {len(plain)} bytes; this suite's hold {_HELPER_PLAIN}")
    seed, commitment, public_key, expiry, certified, signature = _cut(
        plain, SEED_BYTES, _DIGEST_BYTES, KEY_BYTES, 8, SIGNATURE_BYTES, SIGNATURE_BYTES
    )
    if commitment != item.commitment:
        raise SealBroken("the leader's half and the helper's half are of different reports")
    certificate = ParticipantCertificate(public_key, int.from_bytes(expiry, "little", signed=True), certified)
    certificate.verify(descriptor.population, authority, now)
    verify_signature(public_key, signature, _report_statement(header, commitment), "the report")
    return HelperSeed(item.report_id, seed, public_key)


def total_of_masks(
    descriptor: RoundDescriptor, rd: bytes, seeds: Iterable[HelperSeed], entropy: Entropy
) -> HelperTotal:
    """The sum of all masks, and noise if the round has any. Call it once a round; keep the answer."""
    total = HelperTotal(layout_of(descriptor))
    for one in seeds:
        total.add_mask(one.seed, header_of(rd, one.report_id))
    if descriptor.noise_variance:
        for start in range(0, total.numbers.size, _NOISE_BLOCK):
            size = min(_NOISE_BLOCK, total.numbers.size - start)
            total.add_number_noise(discrete_gaussian(descriptor.noise_variance, size, entropy), start)
    for index, lane in enumerate(descriptor.lanes, start=1):
        if lane.noise_variance:
            total.add_noise(index, discrete_gaussian(lane.noise_variance, 1, entropy))
    return total


# What both sides bind and sign.


def header_of(rd: bytes, report_id: bytes) -> bytes:
    """What all keys of a report are bound to."""
    if len(rd) != _DIGEST_BYTES or len(report_id) != REPORT_ID_BYTES:
        raise MalformedMessage(f"a report is named by {_DIGEST_BYTES} bytes of round and {REPORT_ID_BYTES} of its own")
    return LABEL + b"\0" + rd + report_id


def _report_statement(header: bytes, commitment: bytes) -> bytes:
    return b"report\0" + header + commitment


def _commitment(content_key: bytes, header: bytes) -> bytes:
    return hashlib.sha256(LABEL + b"/commitment\0" + content_key + header).digest()


def _info(header: bytes, role: bytes, public_key: bytes) -> bytes:
    return header + role + b"\0" + key_id(public_key)


def _associated(header: bytes, capsule: bytes) -> bytes:
    return header + hashlib.sha256(capsule).digest()


def _cut(data: bytes, *lengths: int) -> list[bytes]:
    parts, start = [], 0
    for length in lengths:
        parts.append(data[start : start + length])
        start += length
    return parts
