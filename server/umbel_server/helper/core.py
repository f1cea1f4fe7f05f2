"""The helper's decisions. It sees capsules and never an update; it answers once a round, over one set.

offer_key    -> a key pair for one round; rounds of a task only rise
countersign  -> one descriptor a round, and only one that keeps to this helper's own policy
prepare      -> opens capsules, checks who made them; says which may be summed
commit       -> the sum of masks and noise: durable before it is given, the same again to the same set,
                refused to any other; the round's key is deleted with it
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from umbel.clock import DAY, Clock
from umbel.cohort_sum import HelperAnswer, answer_statement, require_set, set_digest
from umbel.descriptor import (
    LONGEST_SECONDS,
    RoundDescriptor,
    descriptor_from_bytes,
    noise_multiplier,
    rd_of,
    require_current,
    sign_as_helper,
    verify_leader,
)
from umbel.discrete_gaussian import Entropy
from umbel.errors import (
    AlreadyExists,
    AlreadyReported,
    CertificateRefused,
    CohortTooSmall,
    NotAllowed,
    NotFound,
    OutOfBounds,
    SetRefused,
    UmbelError,
    WrongState,
)
from umbel.plan import Kind
from umbel.secure_report import REPORT_ID_BYTES
from umbel.secure_sum import HelperItem, HelperSeed, open_as_helper, total_of_masks
from umbel.signatures import verify_signature
from umbel_server.helper.port import Prepared, commit_statement, offer_statement, prepare_statement
from umbel_server.helper.records import HelperRound, Records


@dataclass(frozen=True, slots=True)
class HelperPolicy:
    """What this helper asks of every round, whatever the leader would like."""

    leader: bytes
    """The leader's key (Ed25519, raw)."""
    populations: tuple[str, ...] = ()
    """Whose rounds it helps with; none named: any that it vouches for devices of."""
    minimum_cohort: int = 5
    max_reports_per_day: int = 1000
    """In how many sums one participant may be within a day."""
    max_reports_per_task: int = 0
    """And in all of one task, whatever the round's descriptor says; 0: as often as that says."""
    minimum_noise_multiplier: float = 0.0
    longest_seconds: float = LONGEST_SECONDS


@dataclass(slots=True)
class _Open:
    """What is known of a prepared round; in memory only, a restarted helper is shown the capsules again."""

    seeds: Mapping[bytes, HelperSeed]
    shown: list[bytes] = field(default_factory=list)


class Helper:
    """One helper for one leader."""

    def __init__(
        self,
        records: Records,
        identity: Ed25519PrivateKey,
        authority: bytes,
        policy: HelperPolicy,
        clock: Clock,
        entropy: Entropy = secrets.token_bytes,
    ) -> None:
        self._records = records
        self._identity = identity
        self._authority = authority
        self.policy = policy
        self._clock = clock
        self._entropy = entropy
        self._prepared: dict[bytes, _Open] = {}
        self._lock = threading.Lock()

    @property
    def identity(self) -> bytes:
        """The key that devices pin (Ed25519, raw)."""
        return self._identity.public_key().public_bytes_raw()

    def offer_key(self, task: str, number: int, kind: Kind, signature: bytes) -> bytes:
        """A public key for one round; the same one when asked again.

        Raises:
            SignatureInvalid: it isn't the leader who asks.
            WrongState: the task has come further already.
        """
        verify_signature(self.policy.leader, signature, offer_statement(task, number, kind), "the request for a key")
        with self._lock:
            held = self._records.round(task, number, kind)
            if held is None:
                order = (number, 0 if kind is Kind.TRAIN else 1)
                latest = self._records.latest(task)
                if latest is not None and order <= tuple(latest):
                    raise WrongState(f"rounds of {task!r} only rise: {number}/{kind.value} comes after {latest}")
                key = X25519PrivateKey.generate().private_bytes_raw()
                self._records.offer(task, order, kind, key, self._clock.now() + LONGEST_SECONDS)
                held = self._require(self._records.round(task, number, kind))
            return _public(_key(held))

    def countersign(self, statement: bytes, leader_signature: bytes) -> bytes:
        """The signature over a descriptor that keeps to the policy; the same one when asked again.

        Raises:
            SignatureInvalid: not the leader's descriptor.
            BadInput, CohortTooSmall: a descriptor that breaks the suite's rules or this helper's.
            NotAllowed: another population's.
            AlreadyExists: the round has another descriptor.
            NotFound, WrongState, RoundClosed: no key was offered for it; too early; too late.
        """
        descriptor = verify_leader(statement, leader_signature, self.policy.leader)
        self._require_policy(descriptor)
        require_current(descriptor, self._clock.now())
        with self._lock:
            held = self._require(self._records.round(descriptor.task, descriptor.round, descriptor.kind))
            if held.rd is not None and held.rd != rd_of(statement):
                raise AlreadyExists("this round has another descriptor; one a round, for all of its devices")
            if held.rd is None:
                if descriptor.helper_keys[0] != _public(_key(held)):
                    raise OutOfBounds("the descriptor names another key than the one offered for this round")
                self._records.countersign(held, rd_of(statement), statement, descriptor.not_after)
        return sign_as_helper(statement, self._identity)

    def most_reports(self, rd: bytes) -> int:
        """How many reports a round takes at most.

        A request's signature can be checked only once all of it has come. Until then a stranger may be asking, who gets
        no more room than this, and none for a round that isn't there.

        Raises:
            NotFound, RoundClosed: no such round, or no more.
        """
        return self._countersigned(rd)[1].maximum

    def prepare(self, rd: bytes, items: Sequence[HelperItem], signature: bytes) -> Prepared:
        """Which reports may be summed; for a round that is summed already, those that were.

        Raises:
            SignatureInvalid: it isn't the leader who asks.
            NotFound, RoundClosed: no such round, or no more.
            OutOfBounds: more reports than were agreed.
            CohortTooSmall: fewer good ones than were agreed; nothing can be summed.
        """
        verify_signature(self.policy.leader, signature, prepare_statement(rd, items), "the showing of capsules")
        with self._lock:
            held, descriptor = self._countersigned(rd)
            if held.ids is not None:
                return Prepared(_split(held.ids), {})
            if len(items) > descriptor.maximum:
                raise OutOfBounds(f"{len(items)} reports; at most {descriptor.maximum} were agreed")
            seeds, refused = self._examine(descriptor, rd, _key(held), items)
            if len(seeds) < descriptor.minimum:
                reasons = ", ".join(sorted(set(refused.values()))) or "no others came"
                raise CohortTooSmall(
                    f"{len(seeds)} of {len(items)} reports are good, {descriptor.minimum} were agreed ({reasons})"
                )
            self._prepared[rd] = _Open(seeds, [item.report_id for item in items])
            return Prepared(tuple(sorted(seeds)), refused)

    def commit(self, rd: bytes, ids: Sequence[bytes], signature: bytes) -> HelperAnswer:
        """The sum of masks over one set, with noise; irrevocable, and the same bytes when asked again.

        Raises:
            SignatureInvalid: it isn't the leader who asks.
            NotFound, RoundClosed: no such round, or no more.
            SetRefused: another set than the one summed, or one with reports that may not be summed.
            CohortTooSmall: a set that was made smaller than agreed.
            WrongState: not prepared, or since then the helper was restarted or a device came to its cap: prepare it
                again.
        """
        verify_signature(self.policy.leader, signature, commit_statement(rd, ids), "the order to sum")
        with self._lock:
            held, descriptor = self._countersigned(rd)
            if held.ids is not None:
                return _given_before(held, ids)
            opened = self._prepared.get(rd)
            if opened is None:
                raise WrongState("this round isn't prepared here; show its capsules (again) first")
            require_set(descriptor, ids)
            if not set(ids) <= set(opened.seeds):
                raise SetRefused("the set names reports that may not be summed")
            self._require_still_welcome(descriptor, rd, [opened.seeds[one].participant for one in ids])
            return self._sum(descriptor, rd, ids, opened)

    def sweep(self) -> None:
        """Delete what expired rounds have left."""
        with self._lock:
            now = self._clock.now()
            self._records.sweep(now, LONGEST_SECONDS)
            for rd in [rd for rd in self._prepared if self._records.round_by_rd(rd) is None]:
                del self._prepared[rd]

    # Inside.

    def _require_policy(self, descriptor: RoundDescriptor) -> None:
        policy = self.policy
        if policy.populations and descriptor.population not in policy.populations:
            raise NotAllowed(f"this helper doesn't help population {descriptor.population!r}")
        if descriptor.minimum < policy.minimum_cohort:
            raise CohortTooSmall(f"a minimum of {descriptor.minimum}; this helper asks for {policy.minimum_cohort}")
        if descriptor.not_after - descriptor.not_before > policy.longest_seconds:
            raise OutOfBounds(f"this helper keeps a round open for {policy.longest_seconds:.0f} seconds at most")
        noise = noise_multiplier(descriptor)
        if noise < policy.minimum_noise_multiplier:
            raise OutOfBounds(
                f"noise of {noise:.3g} sensitivities; this helper asks for {policy.minimum_noise_multiplier}"
            )

    def _examine(
        self, descriptor: RoundDescriptor, rd: bytes, key: X25519PrivateKey, items: Sequence[HelperItem]
    ) -> tuple[dict[bytes, HelperSeed], dict[bytes, str]]:
        seeds: dict[bytes, HelperSeed] = {}
        refused: dict[bytes, str] = {}
        people: set[bytes] = set()
        for item in items:
            try:
                if item.report_id in seeds or self._records.is_spent(item.report_id):
                    raise AlreadyReported("the report was shown before")
                found = open_as_helper(descriptor, rd, item, key, self._authority, self._clock.now())
                if found.participant in people:
                    raise AlreadyReported("one device, one report a round")
                self._require_welcome(descriptor, found.participant)
            except UmbelError as error:
                refused.setdefault(item.report_id, error.code)
                continue
            seeds[item.report_id] = found
            people.add(found.participant)
        return seeds, refused

    def _require_welcome(self, descriptor: RoundDescriptor, participant: bytes) -> None:
        now, policy = self._clock.now(), self.policy
        if not self._records.is_participant(participant):
            raise CertificateRefused("the participant was revoked")
        if self._records.lately(participant, now - DAY) >= policy.max_reports_per_day:
            raise NotAllowed("the device has been in as many sums as one may be within a day")
        # What the coordinator's ledger reckons with, and what this helper's operator allows.
        caps = [cap for cap in (descriptor.rounds_per_device, policy.max_reports_per_task) if cap]
        if caps and self._records.participations(participant, descriptor.task) >= min(caps):
            raise NotAllowed("the device has been in as many sums of this task as one may be")

    def _require_still_welcome(self, descriptor: RoundDescriptor, rd: bytes, participants: Sequence[bytes]) -> None:
        """Another round may have been summed since this one was prepared, or a device revoked."""
        try:
            for participant in participants:
                self._require_welcome(descriptor, participant)
        except UmbelError as error:
            del self._prepared[rd]
            raise WrongState(f"since the round was prepared here, {error}; show its capsules again") from error

    def _sum(self, descriptor: RoundDescriptor, rd: bytes, ids: Sequence[bytes], opened: _Open) -> HelperAnswer:
        seeds = [opened.seeds[one] for one in ids]
        total = total_of_masks(descriptor, rd, seeds, self._entropy).to_bytes()
        signature = self._identity.sign(answer_statement(rd, ids, total))
        # Durable before anyone sees it: noise is drawn once, and a set can't be changed by a crash.
        self._records.commit(
            rd, descriptor.task, b"".join(ids), total, signature,
            opened.shown, [seed.participant for seed in seeds], self._clock.now(),
        )  # fmt: skip
        del self._prepared[rd]
        return HelperAnswer(total, signature)

    def _countersigned(self, rd: bytes) -> tuple[HelperRound, RoundDescriptor]:
        held = self._require(self._records.round_by_rd(rd))
        if held.statement is None:
            raise NotFound("this round was never countersigned here")
        descriptor = descriptor_from_bytes(held.statement)
        require_current(descriptor, self._clock.now())
        return held, descriptor

    def _require(self, held: HelperRound | None) -> HelperRound:
        if held is None:
            raise NotFound("this helper has no such round")
        return held


def _key(held: HelperRound) -> X25519PrivateKey:
    if held.private_key is None:
        raise WrongState("the round is summed and its key deleted")
    return X25519PrivateKey.from_private_bytes(held.private_key)


def _public(key: X25519PrivateKey) -> bytes:
    return key.public_key().public_bytes_raw()


def _given_before(held: HelperRound, ids: Sequence[bytes]) -> HelperAnswer:
    assert held.rd is not None and held.ids is not None and held.answer is not None and held.signature is not None  # noqa: S101
    if set_digest(held.rd, ids) != set_digest(held.rd, _split(held.ids)):
        raise SetRefused("the round is summed already, over another set; there is no second sum")
    return HelperAnswer(held.answer, held.signature)


def _split(ids: bytes) -> tuple[bytes, ...]:
    return tuple(ids[start : start + REPORT_ID_BYTES] for start in range(0, len(ids), REPORT_ID_BYTES))
