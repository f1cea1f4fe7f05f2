"""The fleet engine: a scenario from its first virtual second to its outcome.

    house      a real coordinator (and helper), built from a folder
    members    real devices; asleep they are the bytes of their homes
    run        wakes each device when it is due and free, plays faults and rollouts, until all is done
    audit      compares the product's books with what happened; only then is there an outcome

The order of events is that of virtual time alone, so a run can be told again, bit for bit, with any number of workers.
A run that was killed is told again from its beginning: nothing of it needs to be kept.
"""

from __future__ import annotations

import asyncio
import os
import traceback
from collections import defaultdict
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from umbel.errors import InvariantBroken, OutOfBounds
from umbel.identity import DeviceId
from umbel.randomness import generator
from umbel.release import STABLE
from umbel.runtime.onnx import OnnxRuntime
from umbel_client import Identity
from umbel_client.files import Disk
from umbel_client.private import save_pinned
from umbel_server.task import TaskState
from umbel_simulations.data import Federation
from umbel_simulations.engines import Progress
from umbel_simulations.fleet.adversaries import who_lies
from umbel_simulations.fleet.books import Books
from umbel_simulations.fleet.crew import Crew
from umbel_simulations.fleet.entropy import device_key
from umbel_simulations.fleet.faults import Weather, crash_times
from umbel_simulations.fleet.helper_house import smallest_cohort
from umbel_simulations.fleet.homes import EMPTY, Homes
from umbel_simulations.fleet.house import MODEL, OPERATOR, POPULATION, House, listening
from umbel_simulations.fleet.invariants import Audit, release_of
from umbel_simulations.fleet.member import Awake, Member
from umbel_simulations.fleet.population import People
from umbel_simulations.fleet.results import outcome_of
from umbel_simulations.fleet.rollouts import Play
from umbel_simulations.fleet.shifts import Shifts
from umbel_simulations.fleet.sleepers import Sleepers
from umbel_simulations.fleet.time_of_device import SharedSessions
from umbel_simulations.fleet.virtual_time import Ahead, VirtualClock, VirtualLoop
from umbel_simulations.fleet.virtual_time import run as run_loop
from umbel_simulations.outcome import Outcome
from umbel_simulations.scenario import Scenario
from umbel_simulations.scratch import scratch
from umbel_simulations.setting import Setting, bundle_folder, prepare
from umbel_simulations.world import Crash, Outage

MIDNIGHT: Final = 1_789_948_800.0
"""POSIX seconds of the day on which every simulation begins; a Monday."""
_AWAY_SECONDS: Final = 1800.0
_DEVICE_BYTES: Final = 3_000
"""Of memory that a device takes, as seen with 100,000 of them."""
_LOOK_SECONDS: Final = 60.0
_TELL_SECONDS: Final = 900.0


def run(scenario: Scenario, *, workers: int, progress: Progress, folder: Path) -> Outcome:
    """Play a scenario; see `umbel_simulations.engines.Engine`.

    Raises:
        InvariantBroken: the product's books don't fit what happened: a bug, found.
        SimulationStuck: everybody waits for something that nobody will do.
        BadInput: a scenario that the product refuses.
        OutOfBounds: more devices than this machine has memory for.
    """
    return play(scenario, prepare(scenario), workers=workers, progress=progress, folder=folder)


def play(scenario: Scenario, setting: Setting, *, workers: int, progress: Progress, folder: Path) -> Outcome:
    """`run` on a model and users that are at hand."""
    require_room(scenario.population.devices, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with scratch(folder) as place, listening() as failures:
        return run_loop(lambda loop: Run(loop, scenario, setting, workers, progress, place, failures).play())


def require_room(devices: int, memory: int) -> None:
    """Raise `OutOfBounds` for a fleet that would never fit into so many bytes, before it fills them."""
    if devices * _DEVICE_BYTES > memory:
        raise OutOfBounds(
            f"population: {devices:,} devices take {devices * _DEVICE_BYTES / 1e9:,.0f} GB or more, and this machine "
            f"has {memory / 1e9:,.0f} GB of memory; ask for fewer"
        )


class Run:
    """One run of one scenario."""

    stops_when_done = True
    """False: it goes on until its hours are over, though nothing more will come of it."""

    def __init__(
        self,
        loop: VirtualLoop,
        scenario: Scenario,
        setting: Setting,
        workers: int,
        progress: Progress,
        place: Path,
        failures: list[str],
    ) -> None:
        self._loop, self._scenario, self._seed, self._progress = loop, scenario, scenario.seed, progress
        self._place, self._failures = place, failures
        self._clock = VirtualClock(loop, MIDNIGHT + scenario.start_hour * 3600.0)
        self._books = Books(loop.time)
        self._people = People(scenario)
        self._federation, self._first = setting.federation, setting.bundle
        self._ahead = Ahead(workers)
        self._plays = [Play(self._house_of, plan, number, self._seed) for number, plan in enumerate(scenario.rollouts)]
        self._sleepers = Sleepers(loop, self._begin_visit)
        self._visits: set[asyncio.Task[None]] = set()
        self._device_crashes: list[float] = []
        """Those that are due, and for how long each device stays away."""
        self._broken: BaseException | None = None
        self._available: list[int] = []
        self._end = asyncio.Event()

    def _house_of(self) -> House:
        return self._house

    async def play(self) -> Outcome:
        """From the first second to the outcome."""
        self._build()
        try:
            jobs = [asyncio.ensure_future(job) for job in self._jobs()]
            self._house.start()
            self._wake_everybody()
            try:
                async with asyncio.timeout(self._scenario.hours * 3600.0):
                    await self._end.wait()
            except TimeoutError:
                pass
            for task in (*jobs, *self._visits):
                task.cancel()
            # A device that is at work has yet to stop, which takes its time: no time of the run, nor of the server.
            self._clock.stop()
            await self._house.stop()
            results = await asyncio.gather(*jobs, *self._visits, return_exceptions=True)
            self._raise(results)
            return self._outcome()
        finally:
            self._ahead.close()
            self._house.close()

    # Beginning.

    def _build(self) -> None:
        scenario = self._scenario
        self._house = House(self._place / "server", scenario, self._clock, self._books.faults, self._failures)
        operations = self._house.parts.coordinator.operations
        operations.add_model(MODEL, bundle_folder(scenario.model), OPERATOR)
        self._homes = Homes(self._place / "homes")
        self._crew = self._make_crew()
        self._members = self._enrol()
        if scenario.rollouts:
            operations.publish(MODEL, 1, STABLE, OPERATOR)
        operations.create_task(self._house.task(), OPERATOR)

    def _make_crew(self) -> Crew:
        scenario, parts = self._scenario, self._house.parts
        ends = ends_of(self._federation)
        return Crew(
            house=self._house,
            homes=self._homes,
            people=self._people,
            federation=self._federation,
            ends=ends,
            shifts=Shifts(scenario.shifts, self._people.count, self._seed, self._federation.central, ends),
            runtime=SharedSessions(OnnxRuntime()),
            ahead=self._ahead,
            clock=self._clock,
            weather=Weather(scenario.faults, self._seed, self._books.faults),
            books=self._books,
            chance=generator(self._seed, "crew"),
            shapes=self._first.manifest.shared_shapes,
            release_key=parts.release_key,
            smallest_cohort=smallest_cohort(scenario),
            asks_first=scenario.server.abort_before_upload,
            drop_out=scenario.population.drop_out,
            away_seconds=_AWAY_SECONDS,
        )

    def _enrol(self) -> dict[DeviceId, Member]:
        liars = who_lies(self._scenario.adversaries, self._people.count, self._seed)
        members = {}
        for index in range(self._people.count):
            identity = self._identity(device_key(self._seed, index))
            members[identity.device_id] = Member(index, identity, liars.get(index))
        self._house.parts.access.admit(OPERATOR, POPULATION, list(members))
        self._house.parts.coordinator.fleet.learn()
        if self._house.helper is not None:
            for member in members.values():
                pinned = self._house.helper.enrol(POPULATION, member.index)
                with self._homes.awake(EMPTY) as (home, packed):
                    save_pinned(home, pinned, Disk())
                member.home = packed[0]
        return members

    def _identity(self, key: bytes) -> Identity:
        parts = self._house.parts
        # Metadata of releases are read only where there are any.
        root = parts.release_root if self._scenario.rollouts else b""
        return Identity(key, b"", b"", parts.release_key, POPULATION, "", release_root=root)

    # Waking.

    def _wake_everybody(self) -> None:
        # Nobody starts at the same moment, as if the fleet had been there before.
        spread = self._scenario.population.check_in_hours * 3600.0
        first = generator(self._seed, "first wake").random(self._people.count) * spread
        for member in self._members.values():
            self._wake_at(member, self._people.availability.next_free(member.index, float(first[member.index])))

    def _wake_at(self, member: Member, due: float) -> None:
        if due < self._scenario.hours * 3600.0:
            self._sleepers.add(due, member)

    def _begin_visit(self, member: Member) -> None:
        if self._end.is_set():
            return
        task = self._loop.create_task(self._visit(member))
        self._visits.add(task)
        task.add_done_callback(self._visits.discard)

    async def _visit(self, member: Member) -> None:
        crash = self._device_crashes.pop(0) if self._device_crashes else None
        awake = Awake(self._crew, member, crash)
        try:
            visit = await awake.visit()
        except Exception as error:  # noqa: BLE001 - a device may refuse anything, but never fail inside
            self._broken = self._broken or error
            self._end.set()
            return
        if visit is not None and crash is not None:
            # It was over before the crash came, which is the next one's.
            self._device_crashes.insert(0, crash)
        for play in self._plays:
            play.see(member.identity.device_id, release_of(member))
        self._wake_at(member, awake.next_due(visit))

    # Meanwhile.

    def _jobs(self) -> Iterator[Coroutine[Any, Any, None]]:
        seconds = self._scenario.hours * 3600.0
        yield self._watch()
        yield self._count_the_free()
        for place, crash in enumerate(self._scenario.faults.crashes):
            yield self._crash(crash, crash_times(crash, place, seconds, self._seed))
        for outage in self._scenario.faults.outages:
            yield self._cut_off(outage)
        for play in self._plays:
            yield play.run(self._loop)

    async def _watch(self) -> None:
        """Tell how far it is, and end the run when nothing more will come."""
        scenario = self._scenario
        told = -_TELL_SECONDS
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            if not self._house.is_up:
                continue
            record = self._house.parts.coordinator.runner(scenario.name).record
            hours = self._loop.time() / 3600.0
            if self._loop.time() - told >= _TELL_SECONDS:
                told = self._loop.time()
                reports = sum(self._books.reports.values())
                words = f"{record.judged_rounds} of {scenario.task.rounds} rounds, {reports} reports"
                self._progress.step(hours, scenario.hours, hours, words)
            done = record.task.state is TaskState.DONE
            if self.stops_when_done and done and all(play.played.is_over for play in self._plays):
                self._end.set()

    async def _count_the_free(self) -> None:
        # The last hour's end is no hour's beginning, whichever of two timers of one instant comes first there.
        while self._loop.time() < self._scenario.hours * 3600.0:
            self._available.append(self._people.availability.count(self._loop.time()))
            await asyncio.sleep(3600.0)

    async def _crash(self, crash: Crash, times: list[float]) -> None:
        for at in times:
            await asyncio.sleep(at - self._loop.time())
            match crash.process:
                case "device":
                    self._device_crashes.append(crash.down_seconds)
                case "helper" if self._house.helper is not None:
                    self._house.helper.kill(crash.down_seconds)
                case "leader":
                    self._house.kill_combining(crash.down_seconds)
                case "coordinator":
                    self._house.kill(int(self._crew.chance.integers(0, 6)), crash.down_seconds)
                case _:
                    pass

    async def _cut_off(self, outage: Outage) -> None:
        cut = self._house if outage.process == "coordinator" else self._house.helper
        if cut is None:
            return
        await asyncio.sleep(outage.from_hour * 3600.0)
        cut.outages += 1
        self._books.faults[f"{outage.process} cut off"] += 1
        await asyncio.sleep((outage.until_hour - outage.from_hour) * 3600.0)
        cut.outages -= 1

    # The end.

    def _raise(self, results: list[BaseException | None]) -> None:
        """Whatever failed inside comes out: a device, a job of the engine's own."""
        ends = (asyncio.CancelledError,)
        failures = [one for one in (self._broken, *results) if isinstance(one, BaseException)]
        for failure in failures:
            if not isinstance(failure, ends):
                words = "".join(traceback.format_exception(failure)).strip()
                raise InvariantBroken(f"something failed inside a device or the engine:\n{words}") from failure

    def _outcome(self) -> Outcome:
        for play in self._plays:
            play.count()
        played = [play.played for play in self._plays]
        audit = Audit(self._house, self._members, self._books, self._federation.clients, played)
        held = audit.require()
        return outcome_of(
            self._scenario,
            self._crew,
            self._members,
            audit,
            self._available,
            played,
            self._first,
            held,
        )


def ends_of(federation: Federation) -> dict[str, float]:
    """The least and the greatest answer to each target, added up: that less an answer is the opposite answer."""
    own = (part for client in federation.clients for part in (client.training, client.held_back))
    answers: defaultdict[str, list[NDArray[Any]]] = defaultdict(list)
    for part in (federation.central, *own):
        for name, array in part.targets.items():
            answers[name] += [array] if array.size else []
    return {name: _ends(arrays) for name, arrays in answers.items() if arrays}


def _ends(arrays: list[NDArray[Any]]) -> float:
    # Classes count from 0, whether or not anybody has the first of them.
    least = 0 if arrays[0].dtype.kind in "iu" else min(map(np.min, arrays))
    return float(least + max(map(np.max, arrays)))
