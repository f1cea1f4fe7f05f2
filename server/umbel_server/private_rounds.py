"""Agreeing on private rounds with the helper, and remembering what was agreed.

ask        helper's key -> descriptor -> both signatures; the same again after a crash anywhere in between
remember   -> store; only then do devices hear of the round
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import sqlalchemy as sa
import structlog

from umbel.descriptor import LONGEST_SECONDS, RoundDescriptor, SignedDescriptor, descriptor_from_bytes, noise_multiplier
from umbel.errors import AlreadyExists, OutOfBounds, UmbelError, WrongState
from umbel.manifest import Manifest
from umbel.plan import Kind
from umbel_server import privacy_ledger
from umbel_server.adaptive_clip import bounds
from umbel_server.helper.port import HelperPort
from umbel_server.privacy import HELPER_SECONDS, lanes_of, propose
from umbel_server.privacy_ledger import PrivacyReport
from umbel_server.round import Base, Round, RoundKey
from umbel_server.secure_aggregation import PrivateRound
from umbel_server.signing import ReleaseSigner
from umbel_server.store import Store
from umbel_server.tables import PRIVATE_ROUNDS
from umbel_server.task import Task
from umbel_server.task_records import TaskRecord
from umbel_server.trust import Trust

_NO_HELPER = (
    "this coordinator has no helper, so it can't keep updates private: name one by `helper` in its settings "
    "(docs/how-to/run-the-helper.md), or let the coordinator read each device's update (updates_private = false)"
)


_log = structlog.get_logger(__name__)


class PrivateRounds:
    """The private rounds of one coordinator."""

    def __init__(
        self, store: Store, signer: ReleaseSigner, leader_key: bytes, helper: HelperPort | None, trust: Trust
    ) -> None:
        self._store = store
        self._signer = signer
        self._leader_key = leader_key
        self._helper = helper
        self.trust = trust
        self.waits: dict[str, str] = {}
        """Task -> why its round can't go on before the helper does its part, as of the last try."""

    @property
    def helper(self) -> HelperPort:
        """The helper; raises `WrongState` if there is none."""
        if self._helper is None:
            raise WrongState(_NO_HELPER)
        return self._helper

    def watch(self, watched: Callable[[HelperPort], HelperPort]) -> None:
        """Have the helper asked by way of what watches it, if there is one."""
        if self._helper is not None:
            self._helper = watched(self._helper)

    def require_possible(self, task: Task, manifest: Manifest) -> None:
        """Check a private task before it is written down.

        Raises:
            WrongState: there is no helper.
            OutOfBounds, CohortTooSmall: no ring has room for its rounds; the message says what to change.
            BudgetSpent: not even one round fits into its budget.
        """
        _ = self.helper
        longest = LONGEST_SECONDS - HELPER_SECONDS
        if task.deadline_seconds > longest:
            raise OutOfBounds(
                f"deadline_seconds is {task.deadline_seconds:g}; a private round's is at most {longest:g}"
            )
        clips = set(bounds(task.privacy, task.plan)) if task.privacy.clip_quantile else {task.plan.clip_norm}
        for clip in clips:
            privacy_ledger.require_budget((), self._trial(task, clip, manifest), task.privacy)

    def _trial(self, task: Task, clip: float, manifest: Manifest) -> RoundDescriptor:
        """What the task's next round would be, but for names and keys."""
        key, base = RoundKey(task.name, 1, task.plan.kind), Base(1, 1, manifest.digest)
        span = task.deadline_seconds
        trial = Round(key, base, task.goal, task.minimum, task.slots, span, 0.0, span, span)
        return self._describe(task, clip, trial, manifest, bytes(32))

    def spent(self, task: str) -> list[float]:
        """Noise multipliers of a task's rounds so far; 0 where there was no noise."""
        query = sa.select(PRIVATE_ROUNDS.c.statement).where(PRIVATE_ROUNDS.c.task == task)
        with self._store.reading() as connection:
            return [noise_multiplier(descriptor_from_bytes(one)) for one in connection.scalars(query)]

    def ledger(self, record: TaskRecord, manifest: Manifest) -> PrivacyReport:
        """What the task has cost in privacy, and what one more round would cost."""
        task = record.task
        opening = self._trial(task, record.clip, manifest) if task.updates_private else None
        words = self.trust.words if task.updates_private else "the coordinator reads each device's update"
        return privacy_ledger.report(self.spent(task.name), opening, task.privacy, words, task.goal)

    def held_up(self, task: str, error: UmbelError) -> None:
        """The helper didn't do its part for a task; told once, until it has."""
        if task not in self.waits:
            _log.warning("a round waits for the helper", task=task, reason=str(error))
        self.waits[task] = f"waits for the helper: {error}"

    def answered(self, task: str) -> None:
        """The helper did its part."""
        if self.waits.pop(task, ""):
            _log.info("the helper has answered, the round goes on", task=task)

    def ask(self, record: TaskRecord, held: Round, manifest: Manifest, past: Sequence[float] = ()) -> PrivateRound:
        """Have a round countersigned; `past` is what the task has `spent`.

        Raises:
            Unreachable: the helper is away; try again.
            BudgetSpent: it would cost more than the task may spend.
            AlreadyExists: the helper has had a round of this number, or a later one, and never goes back.
            UmbelError: the helper refuses the round; its message says why.
        """
        helper, task = self.helper, record.task
        try:
            helper_key = helper.offer_key(held.key.task, held.key.number, held.key.kind)
        except WrongState as error:
            raise AlreadyExists(f"the helper has come further than this coordinator: {error}") from error
        descriptor = self._describe(task, record.clip, held, manifest, helper_key)
        privacy_ledger.require_budget(past, descriptor, task.privacy)
        statement = descriptor.to_bytes()
        signature = self._signer.sign_descriptor(statement)
        signed = SignedDescriptor(statement, signature, helper.countersign(statement, signature))
        return PrivateRound.verified(signed, self._signer.public_key, helper.identity)

    def remember(self, key: RoundKey, agreed: PrivateRound) -> None:
        """Keep what was agreed; durable when it returns."""
        signed = agreed.signed
        row = {
            "task": key.task,
            "number": key.number,
            "kind": key.kind.value,
            "statement": signed.statement,
            "leader_signature": signed.leader_signature,
            "helper_signature": signed.helper_signature,
        }
        with self._store.transaction() as connection:
            connection.execute(PRIVATE_ROUNDS.insert().values(row))

    def find(self, key: RoundKey) -> PrivateRound | None:
        """What was agreed for a round, if anything was yet."""
        this = (PRIVATE_ROUNDS.c.task == key.task) & (PRIVATE_ROUNDS.c.number == key.number)
        with self._store.reading() as connection:
            query = sa.select(PRIVATE_ROUNDS).where(this & (PRIVATE_ROUNDS.c.kind == key.kind.value))
            row = connection.execute(query).first()
        if row is None:
            return None
        signed = SignedDescriptor(row.statement, row.leader_signature, row.helper_signature)
        return PrivateRound.verified(signed, self._signer.public_key, self.helper.identity)

    def _describe(self, task: Task, clip: float, held: Round, manifest: Manifest, helper_key: bytes) -> RoundDescriptor:
        lanes = lanes_of(manifest, held.key.kind)
        size = manifest.shared_numbers if held.key.kind is Kind.TRAIN else 0
        return propose(task, held, lanes, size, (self._leader_key, helper_key), clip)
