"""All parties of a private round in one process: devices, leader, helper, each with keys of its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from umbel.clock import DAY
from umbel.descriptor import Lane, RoundDescriptor, SignedDescriptor, plan_digest, sign_as_leader
from umbel.digests import digest_of
from umbel.plan import Kind, Plan
from umbel.ring import largest_level
from umbel.sealing import Binding
from umbel.secure_report import SealedShares
from umbel.secure_sum import Fresh, Participant, encode_update, seal_report
from umbel.shares import Cleartext, LeaderTotal
from umbel.transform import Transform
from umbel_server.aggregation import LeaderKey, SealedReport
from umbel_server.helper.core import Helper, HelperPolicy
from umbel_server.helper.local import LocalHelper
from umbel_server.helper.people import People
from umbel_server.helper.port import LeaderSigner
from umbel_server.helper.records import Records
from umbel_server.secure_aggregation import PrivateRound, SecureSum

POPULATION, TASK = "wrists", "learn"
PLAN = Plan(clip_norm=1.0, max_weight=64.0)
BASE = digest_of(b"bundle")
NOW = 1_000_000.0


@dataclass
class Hands:
    """Time stands still until a test moves it."""

    instant: float = NOW

    def now(self) -> float:
        return self.instant


class Entropy:
    """Bytes that look random and are told again in every run."""

    def __init__(self, seed: str) -> None:
        self._seed, self._count = seed, 0

    def __call__(self, size: int) -> bytes:
        self._count += 1
        return hashlib.shake_256(f"{self._seed}/{self._count}".encode()).digest(size)


@dataclass
class Party:
    """One federation: a leader, a helper, and devices that the helper vouches for."""

    policy: dict[str, Any] = field(default_factory=dict)
    records: Records = field(default_factory=Records)

    def __post_init__(self) -> None:
        self.clock = Hands()
        self.sign = LeaderSigner(Ed25519PrivateKey.generate())
        self.leader = LeaderKey.generate()
        self.identity, self.authority = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        self.restart_helper()

    def restart_helper(self) -> None:
        """The helper's process ends, and another begins on the same store."""
        self.people = People(self.records, self.authority, self.clock, certificate_days=90.0)
        policy = HelperPolicy(self.sign.public, **({"minimum_cohort": 2} | self.policy))
        self.helper = Helper(
            self.records, self.identity, self.people.authority, policy, self.clock, Entropy(f"noise {id(self)}")
        )
        self.port = LocalHelper(self.helper, self.sign)

    def device(self, population: str = POPULATION) -> Participant:
        key = Ed25519PrivateKey.generate()
        token = self.people.new_token(population)
        return Participant(key, self.people.enrol(token, population, key.public_key().public_bytes_raw(), _proof(key)))

    def devices(self, count: int) -> list[Participant]:
        return [self.device() for _ in range(count)]

    def describe(self, number: int = 1, **changes: Any) -> RoundDescriptor:
        """A round's descriptor with a key that the helper offered; `changes` go into it."""
        kind = changes.pop("kind", Kind.TRAIN)
        helper_key = changes.pop("helper_key", None) or self.port.offer_key(TASK, number, kind)
        size, bits = changes.pop("size", 300), changes.pop("ring_bits", 32)
        minimum, maximum = changes.pop("minimum", 4), changes.pop("maximum", 16)
        weight, noise = changes.pop("max_weight", 8), changes.pop("noise_variance", 0)
        level = changes.pop("level", 0) or largest_level(bits, weight, maximum, noise)
        sent, rotated = changes.pop("sent", size), changes.pop("rotated", False)
        scale = Transform(size, sent, rotated, bytes(16)).scale_for(level, PLAN.clip_norm)
        values: dict[str, Any] = {
            "population": POPULATION,
            "task": TASK,
            "base": BASE,
            "plan": plan_digest(PLAN),
            "public_seed": hashlib.sha256(str(number).encode()).digest()[:16],
            "clip_norm": PLAN.clip_norm,
            "not_before": self.clock.now(),
            "not_after": self.clock.now() + 3600,
            "leader_key": self.leader.public_key,
            "lanes": (Lane("loss", 1000.0), Lane("correct", 1000.0)),
        }
        return RoundDescriptor(
            round=number, kind=kind, size=size, sent=sent, rotated=rotated, ring_bits=bits, level=level, scale=scale,
            max_weight=weight, minimum=minimum, maximum=maximum, helper_keys=(helper_key,), noise_variance=noise,
            **(values | changes),
        )  # fmt: skip

    def agree(self, descriptor: RoundDescriptor | None = None) -> PrivateRound:
        statement = (descriptor or self.describe()).to_bytes()
        signature = sign_as_leader(statement, self.sign.key)
        signed = SignedDescriptor(statement, signature, self.port.countersign(statement, signature))
        return PrivateRound.verified(signed, self.sign.public, self.helper.identity)

    def open(self, **changes: Any) -> Cohort:
        return Cohort(self, self.agree(self.describe(**changes)))


def _proof(key: Ed25519PrivateKey) -> bytes:
    from umbel.participants import prove

    return prove(POPULATION, key)


def delta(seed: int, size: int = 300, norm: float = 0.9) -> NDArray[np.float32]:
    """A delta of this norm."""
    vector = np.random.Generator(np.random.PCG64(seed)).standard_normal(size)
    return (vector * norm / np.linalg.norm(vector)).astype(np.float32)


class Cohort:
    """One round under way: reports go in, a sum may come out."""

    def __init__(self, party: Party, agreed: PrivateRound) -> None:
        self.party, self.agreed = party, agreed
        self.spool: dict[bytes, bytes] = {}
        self.sum = self.fresh()

    @property
    def descriptor(self) -> RoundDescriptor:
        return self.agreed.descriptor

    def fresh(self) -> SecureSum:
        """A leader that has just been started: it has its keys and its spool, nothing else."""
        shapes = {"w": (self.descriptor.size,)} if self.descriptor.size else {}
        return SecureSum(self.agreed, self.party.leader, self.party.port, shapes, 1.0, self.spool.__getitem__)

    def restart_leader(self) -> None:
        self.sum = self.fresh()
        for sequence, (report_id, data) in enumerate(self.spool.items()):
            self.sum.accept(self.sealed(data, report_id, sequence))

    def encoded(self, vector: NDArray[np.float32], weight: int = 1, seed: int = 0, **metrics: float) -> Cleartext:
        chance = np.random.Generator(np.random.PCG64(seed))
        return encode_update(self.descriptor, vector, weight, metrics, chance)

    def report(self, device: Participant, cleartext: Cleartext, report_id: bytes | None = None) -> SealedShares:
        entropy = Entropy(device.certificate.public_key.hex() + repr(report_id))
        name = report_id or hashlib.sha256(device.certificate.public_key + self.agreed.rd).digest()[:16]
        return seal_report(self.descriptor, self.agreed.rd, name, cleartext, device, Fresh.draw(entropy))

    def sealed(self, data: bytes, report_id: bytes, sequence: int) -> SealedReport:
        binding = Binding(TASK, self.descriptor.round, "session", report_id.hex(), BASE)
        return SealedReport(binding, data, sequence)

    def take(self, shares: SealedShares, report_id: bytes | None = None) -> None:
        """The leader accepts a report; only then is it in the spool."""
        name, data = report_id or shares.report_id, shares.to_bytes()
        self.sum.accept(self.sealed(data, name, len(self.spool)))
        self.spool[name] = data

    def fill(self, devices: list[Participant], weight: int = 1) -> NDArray[np.float64]:
        """Every device reports honestly; returns the weighted sum of their deltas."""
        total = np.zeros(self.descriptor.size)
        for seed, device in enumerate(devices):
            vector = delta(seed, self.descriptor.size)
            total += vector.astype(np.float64) * weight
            self.take(self.report(device, self.encoded(vector, weight, seed, loss=2.5, correct=3.0)))
        return total

    def fresh_total(self) -> LeaderTotal:
        """The leader's total as it stands, copied: combining uses one up."""
        return LeaderTotal.from_bytes(self.sum._total.layout, self.sum._total.to_bytes())

    def items(self) -> list[Any]:
        return list(self.sum._items.values())


class Spool(dict[bytes, bytes]):
    """A spool on the disk: reports by their ids, read each time."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def write(self, shares: SealedShares) -> None:
        """A report has come."""
        (self._folder / shares.report_id.hex()).write_bytes(shares.to_bytes())

    def __missing__(self, report_id: bytes) -> bytes:
        return (self._folder / report_id.hex()).read_bytes()


def changed(shares: SealedShares, **parts: bytes) -> SealedShares:
    """The same report with parts exchanged."""
    if "body" in parts:
        parts["body"] = memoryview(parts["body"])  # type: ignore[assignment]
    return replace(shares, **parts)  # type: ignore[arg-type]


def flipped(data: bytes | memoryview, position: int = 0, bit: int = 1) -> bytes:
    """One bit other than before."""
    spoilt = bytearray(data)
    spoilt[position] ^= bit
    return bytes(spoilt)


__all__ = ["DAY", "Cohort", "Party", "changed", "delta", "flipped"]
