"""The round descriptor: what everybody in a private round agrees to, before anyone sends anything.

The coordinator signs it, the helper countersigns it, and every key that a device derives is bound to its digest `rd`;
so no device can be given another model, plan, cohort size or key than the others without falling out of the sum.
A descriptor that breaks the head-room rule can't be made, so all three parties enforce it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel import fields
from umbel.digests import Digest, digest_of, parse_digest
from umbel.discrete_gaussian import MAX_VARIANCE
from umbel.errors import CohortTooSmall, MalformedMessage, OutOfBounds, RoundClosed, WrongState
from umbel.histograms import counted_in, is_bin
from umbel.messages import parse, plan_to_message
from umbel.plan import Kind, Plan
from umbel.release import key_id_of
from umbel.ring import (
    LANE_BITS,
    LANE_FRACTION_BITS,
    RING_BITS,
    require_headroom,
    ring_dtype,
    rounded_norm_bound,
)
from umbel.sealing import SignedDescriptor as SignedDescriptor
from umbel.signatures import verify_signature
from umbel.transform import Transform
from umbel.v1 import secure_sum_pb2 as pb

TWO_AGGREGATORS: Final = "umbel-2agg/1"
"""The suite: one leader, one helper, additive shares."""
LABEL: Final = b"umbel-2agg/1"
MAX_NUMBERS: Final = 1 << 28
MAX_WEIGHT: Final = 1 << 16
MAX_COHORT: Final = 1 << 20
SEED_BYTES: Final = 16
KEY_BYTES: Final = 32
LONGEST_SECONDS: Final = 48 * 3600.0
"""A round's validity: afterwards its keys and shares are deleted."""
MAX_DESCRIPTOR_BYTES: Final = 1 << 16
ABSOLUTE_MINIMUM: Final = 2
"""A sum over one report is that report."""
_LEADER: Final = LABEL + b"/descriptor/leader\0"
_HELPER: Final = LABEL + b"/descriptor/helper\0"


@dataclass(frozen=True, slots=True)
class Lane:
    """A metric that is summed beside the weight."""

    name: str
    bound: float
    """Largest absolute value of one device's metric, and of all bins of a histogram together; more is cut down to it on
    the device."""
    noise_variance: int = 0
    """Of the helper's noise, in the lane's fixed-point units, squared."""


@dataclass(frozen=True, slots=True)
class RoundDescriptor:
    """One private round; `docs/reference/secure-sum.md` explains each field."""

    population: str
    task: str
    round: int
    kind: Kind
    base: Digest
    plan: Digest
    size: int
    """Numbers of a delta; 0 when only metrics are summed."""
    sent: int
    rotated: bool
    public_seed: bytes
    ring_bits: int
    level: int
    """Largest absolute value of one number, for weight 1, in ring units."""
    clip_norm: float
    scale: float
    """Ring units for 1.0."""
    max_weight: int
    minimum: int
    maximum: int
    not_before: float
    not_after: float
    """POSIX seconds, to the millisecond."""
    leader_key: bytes
    helper_keys: tuple[bytes, ...]
    lanes: tuple[Lane, ...] = ()
    noise_variance: int = 0
    rounds_per_device: int = 0
    """In how many sums of the task one participant may be, as the helper keeps to it; 0: in any number."""

    def __post_init__(self) -> None:
        _check_names(self)
        _check_numbers(self)
        _check_cohort(self)
        _check_headroom(self)

    @property
    def transform(self) -> Transform:
        """The public linear map of this round."""
        return Transform(self.size, self.sent, self.rotated, self.public_seed)

    def to_bytes(self) -> bytes:
        """The statement that is signed."""
        message = pb.RoundDescriptor(
            suite=TWO_AGGREGATORS,
            population=self.population,
            task=self.task,
            round=self.round,
            kind=KIND_TO_WIRE[self.kind],
            base=self.base,
            plan=self.plan,
            size=self.size,
            sent=self.sent,
            rotated=self.rotated,
            public_seed=self.public_seed,
            ring_bits=self.ring_bits,
            level=self.level,
            clip_norm=self.clip_norm,
            scale=self.scale,
            max_weight=self.max_weight,
            minimum=self.minimum,
            maximum=self.maximum,
            not_before_ms=round(self.not_before * 1000),
            not_after_ms=round(self.not_after * 1000),
            leader_key=self.leader_key,
            helper_keys=self.helper_keys,
            lanes=[pb.Lane(name=one.name, bound=one.bound, noise_variance=one.noise_variance) for one in self.lanes],
            noise_variance=self.noise_variance,
            rounds_per_device=self.rounds_per_device,
        )
        return message.SerializeToString(deterministic=True)


KIND_TO_WIRE: Final = {
    Kind.TRAIN: pb.RoundDescriptor.KIND_TRAIN,
    Kind.EVALUATE: pb.RoundDescriptor.KIND_EVALUATE,
}
_KIND_FROM_WIRE = {wire: kind for kind, wire in KIND_TO_WIRE.items()}


def kind_from_wire(value: pb.RoundDescriptor.Kind.ValueType) -> Kind:
    """Decode a kind; an unknown one is refused, not guessed."""
    if value not in _KIND_FROM_WIRE:
        raise MalformedMessage(f"round kind {value} is not known here; update umbel")
    return _KIND_FROM_WIRE[value]


def descriptor_from_bytes(statement: bytes) -> RoundDescriptor:
    """Decode a statement; whoever signed it must be checked apart.

    Raises:
        MalformedMessage: not a descriptor, or one with a suite or fields that aren't known here.
        OutOfBounds: numbers that don't go together.
        CohortTooSmall: a minimum of one.
    """
    if len(statement) > MAX_DESCRIPTOR_BYTES:
        raise OutOfBounds(f"a round descriptor of {len(statement)} bytes; the limit is {MAX_DESCRIPTOR_BYTES}")
    message = parse(pb.RoundDescriptor, statement)
    # Each field is a promise that somebody has to keep: one that isn't known here is refused, not left out.
    size = message.ByteSize()
    message.DiscardUnknownFields()
    if message.ByteSize() != size:
        raise MalformedMessage("the round descriptor has fields that aren't known here; update umbel")
    if message.suite != TWO_AGGREGATORS:
        raise MalformedMessage(f"suite {message.suite[:80]!r} is not known here; update umbel")
    fields.few(message.lanes, "lanes")
    return RoundDescriptor(
        population=message.population,
        task=message.task,
        round=fields.count(message.round, "round"),
        kind=kind_from_wire(message.kind),
        base=parse_digest(message.base),
        plan=parse_digest(message.plan),
        size=message.size,
        sent=message.sent,
        rotated=message.rotated,
        public_seed=message.public_seed,
        ring_bits=message.ring_bits,
        level=message.level,
        clip_norm=message.clip_norm,
        scale=message.scale,
        max_weight=message.max_weight,
        minimum=message.minimum,
        maximum=message.maximum,
        not_before=message.not_before_ms / 1000,
        not_after=message.not_after_ms / 1000,
        leader_key=message.leader_key,
        helper_keys=tuple(message.helper_keys),
        lanes=tuple(Lane(one.name, one.bound, one.noise_variance) for one in message.lanes),
        noise_variance=message.noise_variance,
        rounds_per_device=fields.count(message.rounds_per_device, "rounds_per_device"),
    )


def rd_of(statement: bytes) -> bytes:
    """The name of a round: 32 bytes."""
    return hashlib.sha256(statement).digest()


def plan_digest(plan: Plan) -> Digest:
    """The name of a plan, as a descriptor holds it."""
    return digest_of(plan_to_message(plan).SerializeToString(deterministic=True))


def sign_as_leader(statement: bytes, key: Ed25519PrivateKey) -> bytes:
    """The coordinator's signature."""
    return key.sign(_LEADER + statement)


def sign_as_helper(statement: bytes, identity: Ed25519PrivateKey) -> bytes:
    """The helper's countersignature."""
    return identity.sign(_HELPER + statement)


def verify_leader(statement: bytes, signature: bytes, leader: bytes) -> RoundDescriptor:
    """What the helper checks before it countersigns.

    Raises:
        SignatureInvalid: not signed by the leader's key (Ed25519, raw).
        BadInput, CohortTooSmall: not a descriptor.
    """
    verify_signature(leader, signature, _LEADER + statement, "the round descriptor")
    return descriptor_from_bytes(statement)


def verify_descriptor(signed: SignedDescriptor, leader: bytes, helper: bytes) -> RoundDescriptor:
    """What a device (or a leader) checks: both signatures, under the keys that it pinned (Ed25519, raw).

    Raises:
        SignatureInvalid: one of the two didn't sign these bytes.
        BadInput, CohortTooSmall: not a descriptor.
    """
    verify_signature(helper, signed.helper_signature, _HELPER + signed.statement, "the round descriptor")
    return verify_leader(signed.statement, signed.leader_signature, leader)


def require_current(descriptor: RoundDescriptor, now: float) -> None:
    """Raise `WrongState` before a round's validity and `RoundClosed` after it."""
    if now < descriptor.not_before:
        raise WrongState(f"round {descriptor.round} of {descriptor.task!r} isn't valid yet; check this machine's clock")
    if now > descriptor.not_after:
        raise RoundClosed(f"round {descriptor.round} of {descriptor.task!r} has expired")


def weight_steps(weight: float, plan: Plan, descriptor: RoundDescriptor) -> int:
    """A report's weight (number of examples) in the round's steps, 1 to `max_weight`."""
    return min(max(1, round(weight * descriptor.max_weight / plan.max_weight)), descriptor.max_weight)


def sensitivity(descriptor: RoundDescriptor) -> float:
    """The largest norm of one device's numbers, in ring units: what noise is measured against."""
    numbers = descriptor.transform.numbers
    return rounded_norm_bound(descriptor.clip_norm * descriptor.max_weight, descriptor.scale, numbers)


def together(lanes: Sequence[Lane]) -> list[list[Lane]]:
    """Lanes by what one device can move: the bins of a histogram are one, as an example lies in one of them."""
    # Bins of "loss" have nothing to do with the loss, nor those of "within_clip" with the votes.
    alone = [[lane] for lane in lanes if not is_bin(lane.name)]
    histograms: dict[str | None, list[Lane]] = {}
    for lane in lanes:
        if is_bin(lane.name):
            histograms.setdefault(counted_in(lane.name), []).append(lane)
    return [*alone, *histograms.values()]


def bound_of(lanes: Iterable[Lane]) -> float:
    """How far one device can move lanes that belong together: the largest sum of absolute values, so the norm too."""
    return max(lane.bound for lane in lanes)


def noise_multiplier(descriptor: RoundDescriptor) -> float:
    """Standard deviations of noise per sensitivity, over the numbers and all lanes together; 0 if any is bare.

    Independent Gaussian mechanisms compose by adding inverse squares.
    """
    inverse = 0.0
    if descriptor.size:
        if not descriptor.noise_variance:
            return 0.0
        inverse += sensitivity(descriptor) ** 2 / descriptor.noise_variance
    for lanes in together(descriptor.lanes):
        least = min(lane.noise_variance for lane in lanes)
        if not least:
            return 0.0
        inverse += (bound_of(lanes) * (1 << LANE_FRACTION_BITS)) ** 2 / least
    return 1 / math.sqrt(inverse) if inverse else 0.0


def _check_names(it: RoundDescriptor) -> None:
    fields.name(it.population, "population")
    fields.name(it.task, "task")
    for lane in it.lanes:
        fields.text(lane.name, "lane")
    names = [lane.name for lane in it.lanes]
    if len(set(names)) != len(names) or "" in names:
        raise MalformedMessage(f"lanes must have different names, these don't: {names}")
    if len(it.public_seed) != SEED_BYTES:
        raise MalformedMessage(f"a public seed of {len(it.public_seed)} bytes; it has {SEED_BYTES}")
    if len(it.helper_keys) != 1:
        raise MalformedMessage(f"{len(it.helper_keys)} helpers; the suite {TWO_AGGREGATORS} has one")
    if any(len(key) != KEY_BYTES for key in (it.leader_key, *it.helper_keys)):
        raise MalformedMessage(f"X25519 keys have {KEY_BYTES} bytes")
    if it.leader_key in it.helper_keys:
        raise MalformedMessage("leader and helper have the same key; then nothing is split")


def _check_numbers(it: RoundDescriptor) -> None:
    if it.ring_bits not in RING_BITS:
        raise OutOfBounds(f"a ring of {it.ring_bits} bits; known are {', '.join(map(str, RING_BITS))}")
    if not 0 <= it.size <= MAX_NUMBERS:
        raise OutOfBounds(f"a delta of {it.size} numbers; the limit is {MAX_NUMBERS}")
    if not min(1, it.size) <= it.sent <= it.size:
        raise OutOfBounds(f"{it.sent} of {it.size} numbers are to be sent; at least one and at most all")
    for what, number in (("clip_norm", it.clip_norm), ("scale", it.scale)):
        if not (math.isfinite(number) and number > 0):
            raise OutOfBounds(f"{what} is {number}; a private round needs a number above 0")
    for lane in it.lanes:
        if not (math.isfinite(lane.bound) and lane.bound > 0):
            raise OutOfBounds(f"lane {lane.name!r} is bounded by {lane.bound}; it must be a number above 0")
    if it.kind is Kind.EVALUATE and it.size:
        raise OutOfBounds("an evaluation sums metrics only; its size is 0")


def _check_cohort(it: RoundDescriptor) -> None:
    if it.minimum < ABSOLUTE_MINIMUM:
        raise CohortTooSmall(f"a minimum of {it.minimum}; a sum over fewer than {ABSOLUTE_MINIMUM} hides nothing")
    if not it.minimum <= it.maximum <= MAX_COHORT:
        raise OutOfBounds(f"a cohort of {it.minimum} to {it.maximum}; the limit is {MAX_COHORT}")
    if not 0 < it.not_after - it.not_before <= LONGEST_SECONDS:
        raise OutOfBounds(f"a round is valid for more than 0 and at most {LONGEST_SECONDS:.0f} seconds")
    if not 1 <= it.max_weight <= MAX_WEIGHT:
        raise OutOfBounds(f"max_weight is {it.max_weight}; it must lie between 1 and {MAX_WEIGHT}")


def _check_headroom(it: RoundDescriptor) -> None:
    for variance in (it.noise_variance, *(lane.noise_variance for lane in it.lanes)):
        if not 0 <= variance <= MAX_VARIANCE:
            raise OutOfBounds(f"noise of variance {variance}; at most {MAX_VARIANCE}: lower metric_bound or the noise")
    if it.level < 1:
        raise OutOfBounds(f"level is {it.level}; it must be 1 or more")
    require_headroom(it.ring_bits, it.level, it.max_weight, it.maximum, it.noise_variance)
    unit = 1 << LANE_FRACTION_BITS
    for lane in it.lanes:
        require_headroom(LANE_BITS, lane.bound * unit, 1, it.maximum, lane.noise_variance)


def layout_of(descriptor: RoundDescriptor) -> Layout:
    """How this round's shares are laid out."""
    return Layout(1 + len(descriptor.lanes), descriptor.transform.numbers, descriptor.ring_bits)


@dataclass(frozen=True, slots=True)
class Layout:
    """A share as bytes: lanes of 64 bits first (the weight is lane 0), then the numbers, all little-endian."""

    lanes: int
    numbers: int
    bits: int

    @property
    def size(self) -> int:
        """Bytes of one share."""
        return 8 * self.lanes + self.numbers * ring_dtype(self.bits).itemsize


def key_id(public_key: bytes) -> bytes:
    """The short name of a key, as it goes into HPKE's `info`."""
    return key_id_of(public_key).encode()
