"""The coordinator: devices check in, fetch and report; rounds go on by themselves; all of it survives a restart.

    check_in       -> a session of the emptiest fitting round, or a window to come back in
    begin_report   -> how much of the report is here already; too late is said before a byte is sent
    append         -> bytes into the spool
    finish_report  -> opened, checked, durable, counted once; then acknowledged
    tick           -> deadlines, closing, the next round (`umbel_server.closing`)

Everything runs on one event loop; only opening and adding reports and making candidates is handed to `offload`.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from pathlib import Path

import sqlalchemy as sa
import structlog

from umbel.clock import Clock, is_recent
from umbel.digests import Digest
from umbel.errors import NotFound, RoundClosed, WrongState
from umbel.identity import DeviceId
from umbel.offer import SignedOffer
from umbel.release import SignedRelease
from umbel.visit import CheckIn, CheckInReply, ReportBegin, Retry, RetryWindow
from umbel_server import cohort, fleet, round_records, selection, task_records
from umbel_server.aggregation import LeaderKey
from umbel_server.blobs import Blobs
from umbel_server.checkpoints import Witness
from umbel_server.cohort import Answers, CohortOrder
from umbel_server.deltas import Deltas
from umbel_server.events import ServerEvent, Watchers
from umbel_server.fleet import Fleet
from umbel_server.keyring import Keyring
from umbel_server.offers import Offers
from umbel_server.operations import Operations
from umbel_server.passing import tell
from umbel_server.private_rounds import PrivateRounds
from umbel_server.quantising import Quantising
from umbel_server.registry import Registry
from umbel_server.releases import ReleaseDesk
from umbel_server.releasing import Releasing
from umbel_server.repository import Repository
from umbel_server.rollout_verbs import RolloutVerbs
from umbel_server.round import SessionState
from umbel_server.runner import TaskRunner, Tools
from umbel_server.selection import Pace
from umbel_server.signing import ReleaseSigner
from umbel_server.steering import Steering
from umbel_server.store import Store
from umbel_server.surroundings import Surroundings
from umbel_server.task import TaskState
from umbel_server.trust import Trust
from umbel_server.turns import AT_HELPER, Turns
from umbel_server.uploads import Uploads
from umbel_server.versions import Version

_log = structlog.get_logger(__name__)


class Coordinator:
    """Runs the rounds of all tasks of one store."""

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        signer: ReleaseSigner,
        opener: LeaderKey,
        clock: Clock,
        around: Surroundings | None = None,
        *,
        pace: Pace | None = None,
        trust: Trust | None = None,
        listing: tuple[Repository, Keyring] | None = None,
        witness: Witness | None = None,
    ) -> None:
        around = around or Surroundings()
        self.store = store
        self.registry = Registry(store, blobs, signer)
        self.deltas = Deltas(self.registry, blobs, around.offload)
        self.fleet = Fleet(store)
        self._blobs = blobs
        self._clock = clock
        self._pace = pace or Pace()
        self._beat = around.beat
        self._watchers = Watchers()
        self._woken = asyncio.Event()
        self._turns = Turns()
        self.uploads = Uploads(blobs)
        self.private = PrivateRounds(store, signer, opener.public_key, around.helper, trust or Trust())
        self._tools = Tools(
            store=store,
            blobs=blobs,
            registry=self.registry,
            leader=opener,
            runtime=around.runtime,
            clock=clock,
            offload=around.offload,
            chance=around.chance,
            tell=self._watchers.tell,
            publish=self._publish,
            private=self.private,
            at_helper=asyncio.Semaphore(AT_HELPER),
            pace=self._pace,
        )
        self._runners: dict[str, TaskRunner] = {}
        self._recover()
        self.witness = witness
        self._flushed_at, self._steered_at, self._witnessed_at = clock.now(), 0.0, 0.0
        self.ticked_at = 0.0  # without a failure
        self.rollouts: Steering | None = None
        self.verbs: RolloutVerbs | None = None
        quantising = None if listing is None else self._take_listing(*listing, signer)
        self.releasing = Releasing(store, self.registry, self.deltas, self.verbs, quantising)
        self.operations = Operations(self._tools, self.fleet, self.take_up, self.verbs, witness)

    def _take_listing(self, repository: Repository, keys: Keyring, signer: ReleaseSigner) -> Quantising:
        """Steer rollouts, and define releases, by a listing."""
        store, tools = self.store, self._tools
        desk = ReleaseDesk(store, self.registry, repository, keys, tools.clock)
        offers = Offers(store, desk, signer, tools.chance)
        self.rollouts = Steering(store, desk, offers, self.fleet, tools.clock, tools.chance, tools.tell)
        self.verbs = RolloutVerbs(store, self.rollouts, desk, self.fleet, tools.clock, tools.chance)
        return Quantising(store, self.registry, tools.blobs, desk, tools.runtime, tools.clock, tools.offload)

    # Devices.

    async def check_in(self, device: DeviceId, check_in: CheckIn) -> CheckInReply:
        """Answer a device's offer.

        Raises:
            NotAllowed: the device isn't enrolled here, or in another population.
        """
        self.fleet.visit(device, check_in, self._clock.now())
        return await self.deltas.added(self._answer(device, check_in), check_in.held_bundles)

    def _answer(self, device: DeviceId, check_in: CheckIn) -> CheckInReply:
        runners = [runner for runner in self._runners.values() if runner.task.population == check_in.population]
        model = runners[-1].task.model if runners else ""
        signed, offer = self._release_for(device, check_in, model)
        again = self._window(check_in.population, runners)
        if not check_in.offers_work:
            return CheckInReply(Retry(again), signed, offer)
        reasons = []
        for runner in self._most_wanting(runners):
            reason = runner.why_not(device, check_in)
            if not reason:
                for other in runners:
                    if other is not runner:
                        other.abort_sessions_of(device)
                return CheckInReply(runner.join(device, again), signed, offer)
            reasons.append(reason)
        nothing = f"no round is open for population {check_in.population!r}"
        return CheckInReply(Retry(again, ("; ".join(reasons) or nothing)[:256]), signed, offer)

    def _publish(self, connection: sa.Connection, version: Version, channel: str, now: float) -> None:
        if self.verbs is not None:
            self.verbs.follow(connection, version.model, version.number, channel, now)
        else:
            self.registry.release(connection, version, channel, now)

    def _release_for(
        self, device: DeviceId, check_in: CheckIn, model: str
    ) -> tuple[SignedRelease | None, SignedOffer | None]:
        """The newest release, for fleets that trust the release key alone; or an offer, where there is a listing."""
        if self.rollouts is not None and not model:
            model = self.rollouts.offers.model_of(check_in.population)
        if not model:
            return None, None
        if self.rollouts is None:
            newest = self.registry.newest_release(model, check_in.channel)
            return (newest.signed if newest else None), None
        now = self._clock.now()
        self.rollouts.offers.hear(device, check_in.outcomes, now)
        return None, self.rollouts.offers.offer(device, check_in, model, now)

    def fetch(self, digest: Digest) -> Path:
        """Where a file of a version's bundle lies, or a delta of one; raises `NotFound` for anything else."""
        return self.deltas.path(digest) or self.registry.fetchable(digest)

    def listing_file(self, name: str) -> bytes:
        """A file of the release listing, by its name; raises `NotFound`."""
        if self.rollouts is None:
            raise NotFound("this coordinator has no release listing")
        return self.rollouts.desk.repository.file(name)

    def checkpoint(self) -> str:
        """A signed checkpoint of the audit log as it is now; raises `NotFound` where nobody witnesses."""
        if self.witness is None:
            raise NotFound("this coordinator's audit log has no witness")
        self.witness.take(self.store, self._clock.now())
        return self.witness.notes()[-1]

    def count_fetched(self, size: int, digest: Digest | None = None) -> None:
        """Note that devices have fetched so many bytes, of the file with this digest, if it is known which."""
        working = [runner for runner in self._runners.values() if runner.active]
        serving = [runner for runner in working if digest is not None and runner.hands_out(digest)]
        for runner in (serving or working)[:1]:
            runner.bytes_down += size

    async def begin_report(self, begin: ReportBegin) -> int:
        """How many of the report's bytes are here already; all of them, if it is counted already.

        Raises:
            NotFound: no such session.
            NotAllowed: another session's token.
            RoundClosed: too late.
            AlreadyReported: another report of this session counts.
            Conflict: the report id is another session's.
            OutOfBounds: larger or smaller than any report of this model.
        """
        runner = self._runner_of(begin.session_id)
        if runner is None:
            return self.uploads.begin_after_the_end(self.store, begin)
        session = runner.admit(begin)
        if session.state is SessionState.REPORTED:
            return self.uploads.counted(begin)
        return self.uploads.begin(begin, runner.largest_report(begin.session_id))

    async def append(self, report_id: str, offset: int, chunk: bytes) -> None:
        """Add bytes to an upload.

        Raises:
            NotFound: no such upload has begun.
            RoundClosed: its round ended, or its session did.
            OutOfBounds: they don't follow what is here, or are more than was announced.
        """
        self.uploads.append(report_id, offset, chunk)

    async def finish_report(self, report_id: str) -> RetryWindow:
        """Count a report, all of whose bytes are here. When it returns, the report is durable and counted once.

        Raises:
            NotFound: no such upload has begun.
            Interrupted: bytes are missing; begin again and go on.
            RoundClosed, AlreadyReported: it came too late.
            DigestMismatch: its bytes changed on their way; begin again from the first.
            BadInput, SealBroken: it can't be counted, and won't be.
        """
        begin, is_counted = self.uploads.whole(report_id)
        runner = self._runner_of(begin.session_id)
        if not is_counted:
            if runner is None:
                raise RoundClosed("the round ended while the report was on its way")
            device = runner.round_of(begin.session_id).session(begin.session_id).device
            await runner.count(begin)
            self.fleet.reported(device)
            self.wake()
        self.uploads.forget(report_id)
        population = runner.task.population if runner else ""
        return self._window(population, [one for one in self._runners.values() if one.task.population == population])

    # Programs that drive a task.

    async def run_cohort(self, task: str, order: CohortOrder, longest: float | None = None) -> Answers:
        """Run one cohort of a driven task; see `umbel_server.cohort.run_cohort`."""
        return await cohort.run_cohort(self.runner(task), order, longest, self.wake)

    def devices_of(self, task: str) -> list[DeviceId]:
        """The devices that a program may ask: those of the task's population that have called lately."""
        now = self._clock.now()
        self.fleet.flush(now)
        with self.store.reading() as connection:
            return fleet.lately(connection, self.runner(task).task.population, now)

    # Time.

    async def tick(self, patience: float = math.inf) -> None:
        """Do all that is due now, for every task; what fails for one is raised after the others have had their turn."""
        failed = await self._turns.take(self._runners.values(), patience)
        self._steer(failed)
        self.uploads.drop_all_but({id_ for runner in self._runners.values() for id_ in runner.open_sessions()})
        self._flush(force=False)
        if failed:
            raise ExceptionGroup("some tasks or rollouts couldn't go on", failed)
        self.ticked_at = self._clock.now()

    async def run(self) -> None:
        """Tick, until cancelled. What fails is logged and tried again: the store still says where things stand."""
        failures = 0
        try:
            while True:
                self._woken.clear()
                try:
                    await self.tick(self._beat.patience)
                    failures = 0
                except Exception as error:  # noqa: BLE001 - whatever it was, the next try must go on
                    failures += 1
                    tell(_log, "tick failed", error, failures=failures)
                await self._pause(self._beat.tick * min(2**failures, 64))
        finally:
            await self._turns.stop()
            self._flush(force=True)

    def wake(self) -> None:
        """Have `run` tick now rather than at its next time."""
        self._woken.set()

    def subscribe(self) -> AsyncIterator[ServerEvent]:
        """What happens from now on."""
        return self._watchers.subscribe()

    def take_up(self, name: str) -> None:
        """Read a task anew from the store, after an operator's change."""
        with self.store.reading() as connection:
            record = task_records.get(connection, name)
        if name in self._runners:
            self._runners[name].record = record
        else:
            self._runners[name] = TaskRunner(self._tools, record)
        self.wake()

    # Inside.

    def _recover(self) -> None:
        """Take up every task where the store says it stands, and sweep away what nothing names."""
        with self.store.reading() as connection:
            records = task_records.everything(connection)
            pending = round_records.pending_states(connection)
        for record in records:
            try:
                self._runners[record.task.name] = TaskRunner(self._tools, record)
            except NotFound as error:
                raise WrongState(
                    f"the folder lacks files that the database names for task {record.task.name!r}; put both back as "
                    "they were at one moment, see docs/how-to/operate-a-coordinator.md"
                ) from error
            self._blobs.keep_states(record.task.name, record.strategy_state, *pending)
        rounds = [held for runner in self._runners.values() for held in runner.rounds.values()]
        counted = {
            (session.report_id, session.sealed_digest)
            for held in rounds
            for session in held.reports
            if session.report_id and session.sealed_digest
        }
        self._blobs.sweep_spool(counted, drop_partial=not rounds)

    def runner(self, task: str) -> TaskRunner:
        """What runs a task's rounds; raises `NotFound`."""
        if task not in self._runners:
            raise NotFound(f"no task is called {task!r}; `umbel tasks list` shows what there is")
        return self._runners[task]

    def _runner_of(self, session_id: str) -> TaskRunner | None:
        for runner in self._runners.values():
            if any(session_id in held.sessions for held in runner.rounds.values()):
                return runner
        return None

    def _most_wanting(self, runners: list[TaskRunner]) -> list[TaskRunner]:
        by_round = {str(runner.active.key): runner for runner in runners if runner.active}
        order = selection.most_wanting([runner.active for runner in runners if runner.active])
        return [by_round[str(held.key)] for held in order]

    def _steer(self, failed: list[Exception]) -> None:
        now = self._clock.now()
        if self.rollouts is None or is_recent(self._steered_at, now, self._beat.steer):
            return
        self._steered_at = now
        try:
            self.rollouts.reconcile(self._checkpoint(now))
        except Exception as error:  # noqa: BLE001 - raised by the caller, after the rest had its turn
            failed.append(error)

    def _checkpoint(self, now: float) -> str:
        """The newest checkpoint of the audit log, for the fleet to witness; taken anew every few minutes."""
        if self.witness is None:
            return ""
        if not is_recent(self._witnessed_at, now, self._beat.witness):
            self._witnessed_at = now
            self.witness.take(self.store, now)
        return self.witness.newest.short if self.witness.newest else ""

    def _window(self, population: str, runners: list[TaskRunner]) -> RetryWindow:
        working = [one for one in runners if one.active or one.task.state is TaskState.RUNNING]
        seconds = max((one.typical_seconds for one in working), default=0.0)
        wanted = sum(one.task.slots for one in working)
        return selection.window(self._pace, self.fleet.active(population), wanted, seconds)

    def _flush(self, *, force: bool) -> None:
        now = self._clock.now()
        if force or not is_recent(self._flushed_at, now, self._beat.flush):
            self._flushed_at = now
            self.fleet.flush(now)
            for runner in self._runners.values():
                runner.flush()

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()
