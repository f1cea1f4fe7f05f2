"""One task's rounds as they go on: joins devices, counts reports, closes rounds, opens the next.

Every change goes the same way: a new value of the round, one transaction, then memory. A coordinator that dies in
between is the same as one that never began; what it left in the spool or the blobs, nothing names.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import sqlalchemy as sa

from umbel.clock import Clock
from umbel.descriptor import TWO_AGGREGATORS
from umbel.digests import Digest, digest_of
from umbel.errors import BadInput, Conflict, NotAllowed, NotFound, RoundClosed, SealBroken, WrongState
from umbel.identity import DeviceId
from umbel.manifest import Manifest
from umbel.plan import Kind, Plan
from umbel.release import SignedRelease
from umbel.runtime import Runtime
from umbel.secure_report import largest_report as largest_private_report
from umbel.update import Update
from umbel.visit import Assignment, CheckIn, ReportBegin, RetryWindow
from umbel_server import round_records, selection
from umbel_server.aggregation import LeaderKey
from umbel_server.blobs import Blobs
from umbel_server.events import ServerEvent
from umbel_server.folding import Fold, largest_report
from umbel_server.private_rounds import PrivateRounds
from umbel_server.registry import Registry
from umbel_server.round import Base, Round, RoundKey, Session, SessionState, require_same_report
from umbel_server.secure_aggregation import PrivateRound, Reread, SecureSum
from umbel_server.selection import Pace
from umbel_server.store import Store
from umbel_server.surroundings import Offload
from umbel_server.task import Task
from umbel_server.task_records import TaskRecord
from umbel_server.versions import Version

TYPICAL_SECONDS = 10.0
"""What a session is taken to last until sessions have been measured."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What every task's runner works with."""

    store: Store
    blobs: Blobs
    registry: Registry
    leader: LeaderKey
    runtime: Runtime
    clock: Clock
    offload: Offload
    chance: Callable[[int], bytes]
    tell: Callable[[ServerEvent], None]
    publish: Callable[[sa.Connection, Version, str, float], None]
    """Gives an accepted version to a task's own channel, in the caller's transaction."""
    private: PrivateRounds
    at_helper: asyncio.Semaphore
    """Held by who asks the helper for something; see `umbel_server.turns`."""
    pace: Pace


@dataclass(frozen=True, slots=True)
class Order:
    """One cohort that a program has asked for."""

    task: Task
    """The driven task, with the plan and the bounds of this cohort."""
    devices: frozenset[DeviceId]
    done: asyncio.Future[list[tuple[DeviceId, Update]]] = field(repr=False)
    """Cancelled when the program doesn't wait any more."""

    @property
    def is_wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return not self.done.done()


class TaskRunner:
    """A task that may have open rounds: none, one, or a TRAIN round and the EVALUATE round of its candidate."""

    def __init__(self, tools: Tools, record: TaskRecord) -> None:
        self.record = record
        self.tools = tools
        self.rounds: dict[Kind, Round] = {}
        self.fold = Fold(tools.leader, tools.registry, tools.blobs, self._secure_sum)
        self.order: Order | None = None
        """What a program has asked of the open round, if the task is driven; gone with the process."""
        self.ordering = asyncio.Lock()
        """Held by the program whose cohort is under way."""
        self.typical_seconds = TYPICAL_SECONDS
        self.agreed: dict[RoundKey, PrivateRound] = {}
        """Of open private rounds, those that the helper has countersigned."""
        self.bytes_down = 0
        """Fetched for the active round, and not yet written."""
        self.lock = asyncio.Lock()
        """Held while reports are counted and rounds are closed; joining goes on meanwhile."""
        with tools.store.reading() as connection:
            for held in round_records.load_open(connection, self.task.name):
                self._enter(connection, held)

    @property
    def task(self) -> Task:
        """The task as it is now."""
        return self.record.task

    @property
    def asked(self) -> Task:
        """The task as the open round has it: its own words, or what a program's order makes of them."""
        return self.order.task if self.order else self.task

    @property
    def active(self) -> Round | None:
        """The round that devices can work for: an evaluation goes before the training that waits for it."""
        return self.rounds.get(Kind.EVALUATE) or self.rounds.get(Kind.TRAIN)

    # Devices join.

    def why_not(self, device: DeviceId, check_in: CheckIn) -> str:
        """Why a device can't work for this task now; empty if it can."""
        if self.active is None or self.active.deadline <= self.tools.clock.now():
            return f"task {self.task.name} has no open round"
        if self.task.driven and (self.order is None or device not in self.order.devices):
            return f"task {self.task.name} asks other devices"
        if self.waits_for_helper:
            return f"task {self.task.name} waits for its helper"
        return selection.why_not(device, check_in, self.asked, self.active, self._manifest) or self._used_up(device)

    def _used_up(self, device: DeviceId) -> str:
        """Why the helper would leave the device's report out, and a round of such devices would come to nothing."""
        if not (cap := self.task.privacy.rounds_per_device):
            return ""
        with self.tools.store.reading() as connection:
            summed = round_records.times_summed(connection, self.task.name, device)
        return f"task {self.task.name} has had the device in as many sums as one may be in" if summed >= cap else ""

    def join(self, device: DeviceId, again: RetryWindow) -> Assignment:
        """Give a device a session of the active round; durable when it returns.

        Raises:
            RoundClosed: there is no room.
        """
        held, now = self._active(), self.tools.clock.now()
        session_id, token = self.tools.chance(16).hex(), self.tools.chance(32)
        after = held.assign(session_id, device, digest_of(token), now)
        self.save(held, after, now)
        sealing, agreed = self.tools.leader.sealing, self.agreed.get(held.key)
        return Assignment(
            session_id=session_id,
            task=self.task.name,
            round=held.key.number,
            plan=self.asked.plan_for(held.key.kind),
            base=self._base_release,
            # A device that goes by this alone doesn't seal for the leader what is to be split.
            sealing=replace(sealing, suite=TWO_AGGREGATORS) if agreed else sealing,
            private_round=agreed.signed if agreed else None,
            upload_token=token,
            deadline=after.session(session_id).deadline,
            if_accepted=again,
            if_rejected=again,
        )

    def abort_sessions_of(self, device: DeviceId) -> None:
        """End a device's open session here, because it has begun another one elsewhere."""
        for held in list(self.rounds.values()):
            now = self.tools.clock.now()
            for session in held.sessions_of(device):
                if session.state is SessionState.ASSIGNED:
                    self.save(held, held.abort(session.id, "superseded", now), now)

    # Devices report.

    def round_of(self, session_id: str) -> Round:
        """The open round that a session is of; raises `RoundClosed` once it has ended."""
        for held in self.rounds.values():
            if session_id in held.sessions:
                return held
        raise RoundClosed("the session's round is over; check in again")

    def admit(self, begin: ReportBegin) -> Session:
        """The session, if this report may be uploaded now.

        Raises:
            RoundClosed, AlreadyReported, NotAllowed, Conflict: it may not.
        """
        held = self.round_of(begin.session_id)
        session = held.session(begin.session_id)
        require_token(session, begin.upload_token)
        if session.state is SessionState.REPORTED:
            require_same_report(session, begin.report_id)
        admitted = held.admit(begin.session_id, self.tools.clock.now())
        with self.tools.store.reading() as connection:
            if round_records.session_of_report(connection, begin.report_id) not in (None, begin.session_id):
                raise Conflict("the report id is in use; draw another one")
        return admitted

    def largest_report(self, session_id: str) -> int:
        """How many sealed bytes a report of this session may have."""
        held = self.round_of(session_id)
        if (agreed := self.agreed.get(held.key)) is not None:
            return largest_private_report(agreed.descriptor)
        return largest_report(self._manifest.shared_numbers if held.key.kind is Kind.TRAIN else 0)

    async def count(self, begin: ReportBegin) -> None:
        """Count one report, all of whose bytes are here; when it returns, it is durable and counted once.

        Raises:
            RoundClosed, AlreadyReported: it isn't wanted, or not any more.
            DigestMismatch: its bytes changed on their way; the device may send them again.
            BadInput, SealBroken: it can't be counted; its session is over, the round goes on without it.
        """
        # To its end, also where the device hangs up: the thread that adds the report up can't be called back, and the
        # next one would add to a sum that holds what nobody has counted.
        await asyncio.shield(self._count(begin))

    async def _count(self, begin: ReportBegin) -> None:
        async with self.lock:
            held = self.round_of(begin.session_id)
            if self._received(held, begin) is held:
                return
            await self._check(held, begin)
            try:
                # Devices may have joined, or this one begun anew, while the report was opened.
                held = self.round_of(begin.session_id)
                self.save(held, self._received(held, begin), self.tools.clock.now())
            except BaseException as error:
                self.fold.forget()
                if isinstance(error, RoundClosed):
                    self.tools.blobs.drop_report(begin.report_id, begin.sealed_digest)
                raise

    async def _check(self, held: Round, begin: ReportBegin) -> None:
        report = (begin.report_id, begin.sealed_digest)
        session = held.session(begin.session_id)
        await self.tools.offload(self.tools.blobs.settle_report, *report)
        try:
            await self.tools.offload(self.fold.add, self.asked, held, session, *report)
        except (BadInput, SealBroken) as error:
            self._fail(begin, error.code)
            raise

    def _received(self, held: Round, begin: ReportBegin) -> Round:
        now = self.tools.clock.now()
        return held.receive(begin.session_id, begin.report_id, begin.sealed_digest, begin.sealed_size, now)

    def _fail(self, begin: ReportBegin, kind: str) -> None:
        held, now = self.round_of(begin.session_id), self.tools.clock.now()
        if held.session(begin.session_id).state is SessionState.ASSIGNED:
            self.save(held, held.fail(begin.session_id, kind, now), now)
        self.tools.blobs.drop_report(begin.report_id, begin.sealed_digest)

    # Figures.

    def hands_out(self, digest: Digest) -> bool:
        """Whether a file is part of the version that the active round's devices start from."""
        listed = {ref.digest for ref in self._manifest.files.values()}
        return self.active is not None and (digest in listed or digest == self.active.base.bundle)

    def open_sessions(self) -> list[str]:
        """Sessions that may still report."""
        sessions = [session for held in self.rounds.values() for session in held.sessions.values()]
        return [session.id for session in sessions if session.state is SessionState.ASSIGNED]

    def flush(self) -> None:
        """Write what devices have fetched for the active round."""
        if self.bytes_down and self.active is not None:
            with self.tools.store.transaction() as connection:
                round_records.count_fetched(connection, self.active.key, self.bytes_down)
            self.bytes_down = 0

    # Rounds open and change.

    def save(self, before: Round, after: Round, now: float) -> None:
        """One change of one round, durable when it returns."""
        with self.tools.store.transaction() as connection:
            round_records.save(connection, before, after, now)
        self.rounds[after.key.kind] = after
        self.tell_of(before, after, now)

    def tell_of(self, before: Round, after: Round, now: float) -> None:
        """Tell watchers of a change that is committed."""
        reports = len(after.reports)
        if reports > len(before.reports):
            self.tools.tell(ServerEvent(now, "report.accepted", str(after.key), {"reports": reports}))
        if after.state is not before.state:
            detail = {"reports": reports, "reason": after.reason, "version": after.version}
            self.tools.tell(ServerEvent(now, f"round.{after.state.value}", str(after.key), detail))

    def open_next(self, connection: sa.Connection, record: TaskRecord, now: float) -> Round | None:
        """Write the task's next round, if it is to have one, into the caller's transaction."""
        if not record.wants_a_round:
            return None
        task, registry = record.task, self.tools.registry
        version = registry.newest_accepted(connection, task.model)
        release = registry.training_release(connection, version)
        number = round_records.last_number(connection, task.name) + 1
        key = RoundKey(task.name, number, task.plan.kind)
        return self.open(connection, key, Base(version.number, release.number, version.bundle), now)

    def open(self, connection: sa.Connection, key: RoundKey, base: Base, now: float) -> Round:
        """Write a new round into the caller's transaction."""
        task = self.asked
        times = round_records.session_times(connection, task.name, key.kind)
        delays = round_records.report_delays(connection, task.name, key.kind)
        longest, pace = task.deadline_seconds, self.tools.pace
        opened = Round(
            key=key,
            base=base,
            goal=task.goal,
            minimum=task.minimum,
            slots=task.slots,
            session_seconds=selection.adapted(pace, times, selection.SESSION_FACTOR, longest),
            opened_at=now,
            due=now + selection.adapted(pace, delays, selection.ROUND_FACTOR, longest),
            deadline=now + longest,
            weights=self.tools.registry.bundle(base.bundle).manifest.shared_numbers if key.kind is Kind.TRAIN else 0,
        )
        round_records.open_round(connection, opened)
        return opened

    def enter(self, opened: Round) -> None:
        """Take up a round whose opening is committed."""
        with self.tools.store.reading() as connection:
            self._enter(connection, opened)
        detail = {"base": opened.base.version, "goal": opened.goal}
        self.tools.tell(ServerEvent(opened.opened_at, "round.open", str(opened.key), detail))

    def leave(self, over: Round) -> None:
        """Forget a round whose end is committed, and the sealed reports it had."""
        if self.active is over:
            self.flush()
        self.rounds.pop(over.key.kind, None)
        self.agreed.pop(over.key, None)
        self.fold.forget()
        for session in over.reports:
            if session.report_id and session.sealed_digest:
                self.tools.blobs.drop_report(session.report_id, session.sealed_digest)
        if (active := self.active) is not None:
            with self.tools.store.reading() as connection:
                self._enter(connection, active)

    def _enter(self, connection: sa.Connection, held: Round) -> None:
        self.rounds[held.key.kind] = held
        if self.task.updates_private and held.key not in self.agreed:
            self._recall(held.key)
        active = self._active()
        self._base_release: SignedRelease = self.tools.registry.signed_release(
            connection, self.task.model, active.base.release
        )
        self._manifest: Manifest = self.tools.registry.bundle(active.base.bundle).manifest
        times = sorted(round_records.session_times(connection, self.task.name, held.key.kind))
        if times:
            self.typical_seconds = times[len(times) // 2]

    @property
    def waits_for_helper(self) -> bool:
        """Whether the active round is private and not countersigned yet."""
        held = self.active
        return self.task.updates_private and held is not None and held.key not in self.agreed

    async def agree(self) -> None:
        """Have the active round countersigned by the helper; raises what `PrivateRounds.ask` raises."""
        held, private = self._active(), self.tools.private
        past = private.spent(self.task.name)
        async with self.tools.at_helper:
            agreed = await self.tools.offload(private.ask, self.record, held, self._manifest, past)
        private.remember(held.key, agreed)
        private.answered(self.task.name)
        self.agreed[held.key] = agreed

    def _secure_sum(self, held: Round, plan: Plan, reread: Reread) -> SecureSum:
        agreed = self.agreed.get(held.key)
        if agreed is None:
            raise WrongState(f"round {held.key} isn't agreed with the helper yet")
        shapes = self._manifest.shared_shapes if held.key.kind is Kind.TRAIN else {}
        unit = plan.max_weight / agreed.descriptor.max_weight
        return SecureSum(agreed, self.tools.leader, self.tools.private.helper, shapes, unit, reread)

    def _recall(self, key: RoundKey) -> None:
        agreed = self.tools.private.find(key)
        if agreed is not None:
            self.agreed[key] = agreed

    def _active(self) -> Round:
        if self.active is None:
            raise NotFound(f"task {self.task.name!r} has no open round")
        return self.active


def require_token(session: Session, token: bytes) -> None:
    """Raise `NotAllowed` unless this is the secret that the session was handed."""
    if not hmac.compare_digest(digest_of(token), session.token_digest):
        raise NotAllowed("the upload token isn't this session's; check in again")
