"""One device of the fleet: asleep it is the bytes of its home; awake it is a real `Device` in a real folder."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Final

from umbel.plan import Kind, Plan
from umbel.runtime import Runtime
from umbel.visit import Assignment
from umbel_client import Device, DeviceStatus, Identity, IdlePolicy, PersonalSettings
from umbel_client.examples import Arrays, Examples, HeldBack, Split, StoreStats
from umbel_client.files import Disk
from umbel_client.private import PrivacyPolicy
from umbel_client.visits import Ending, Visit
from umbel_simulations.data import ClientData
from umbel_simulations.fleet.adversaries import Forge, flipped, honest, lying_runtime, not_a_number, replaying
from umbel_simulations.fleet.availability import NEVER
from umbel_simulations.fleet.channel import VirtualChannel
from umbel_simulations.fleet.crew import Crew
from umbel_simulations.fleet.faults import Plug, ProcessKilled
from umbel_simulations.fleet.homes import EMPTY, Packed
from umbel_simulations.fleet.population import Profile
from umbel_simulations.fleet.time_of_device import FORWARD, DeviceTime, PacedRuntime, Working
from umbel_simulations.world import Adversary

PERSONAL: Final = PersonalSettings(epochs=1, trial_seconds=3600.0)
POLICY: Final = IdlePolicy()
_SHORTEST_NAP: Final = 1.0


class SharedExamples:
    """An `ExampleStore` over a federation's own arrays: any number of devices, no copy."""

    def __init__(self, split: Split, revision: int) -> None:
        self._split, self._revision = split, revision
        self._stats = StoreStats(split.training.count, split.held_back.count)
        self._forgotten = 0

    def add(self, inputs: Arrays, targets: Arrays, *, at: float, subject: str = "", held_back: HeldBack = None) -> int:
        """Nothing is added: the federation says what there is."""
        return 0

    def split(self, now: float) -> Split:
        """All of it."""
        return self._split

    def stats(self, now: float) -> StoreStats:
        """How much there is."""
        return self._stats

    def forget(self, subject: str | None) -> int:
        """Forget everything; the federation keeps it for others."""
        gone = self._stats.training + self._stats.held_back
        nothing = Examples({}, {}, 0)
        self._split, self._stats = Split(nothing, nothing), StoreStats()
        self._forgotten += 1
        return gone

    def revision(self) -> int:
        """Changes when it is forgotten, and when other examples took its place."""
        return 1 + self._revision + self._forgotten

    def forgotten(self) -> int:
        """How often it was."""
        return self._forgotten


@dataclass(slots=True, eq=False)
class Member:
    """A device between its visits."""

    index: int
    identity: Identity
    """Who it is, its key parsed once: a device that opens at each visit would do it each time."""
    adversary: Adversary | None = None
    home: Packed = EMPTY
    cut_off: Packed | None = None
    """Its home as it was when the run ended in the middle of a visit."""
    taken: tuple[float, float] = (NEVER, NEVER)
    """When somebody takes the device away during its session, and when it is given back, in virtual seconds."""
    seconds: float = 0.0
    """Spent working."""
    sessions: int = 0
    loot: list[bytes] = field(default_factory=list)
    """What a replaying one has kept."""


class Awake:
    """A member during one visit: the seams of its `Device`.

    Args:
        crew: what all devices share.
        member: who wakes.
        crash: for how long its process stays away once it was killed, at one of its steps; None where it isn't.
    """

    def __init__(self, crew: Crew, member: Member, crash: float | None) -> None:
        self._crew, self._member = crew, member
        self._profile: Profile = crew.people.profile(member.index)
        self._client = crew.federation.clients[member.index % len(crew.federation.clients)]
        self.time = DeviceTime(crew.clock, self._profile.clock_error)
        self._assignment: Assignment | None = None
        self._expected = 0.0
        self._plug = Plug()
        self._crash = crash
        if crash is not None:
            self._plug.pull_in(int(crew.chance.integers(1, 12)))

    async def visit(self) -> Visit | None:
        """One visit of the real device; None if its process died on the way."""
        crew, member = self._crew, self._member
        try:
            with crew.homes.awake(member.home) as (home, packed):
                try:
                    visit = await self._device(home).wake()
                except ProcessKilled:
                    visit = None
                    crew.books.faults["device killed"] += 1
        except asyncio.CancelledError:
            # The home itself stays as it was: what was written since may depend on how far a thread was.
            member.cut_off = packed[0]
            raise
        member.home = packed[0]
        member.seconds += self.time.total
        return visit

    def next_due(self, visit: Visit | None) -> float:
        """When to wake it next, in virtual seconds: as it was told, but not before it is free again."""
        crew, member, now = self._crew, self._member, self._crew.now()
        if visit is None:
            due = now + (self._crash or 0.0)
        elif visit.ending is Ending.WAITED and not self._is_free(now):
            # It isn't looked at again before it is free; one that waits for a new day's budget looks when it would.
            due = now
        else:
            due = visit.next_wake - self._profile.clock_error - crew.clock.epoch
        if member.taken[0] <= now:
            due = max(due, member.taken[1])
        return crew.people.availability.next_free(member.index, max(due, now + _SHORTEST_NAP))

    # The seams.

    def read(self) -> DeviceStatus:
        """What the device knows of itself: a `StatusSource`."""
        free = self._is_free(self.time.true() - self._crew.clock.epoch)
        return DeviceStatus(
            idle=free,
            charging=True,
            battery=1.0,
            metered=not free,
            temperature=30.0,
            free_bytes=8 << 30,
            utc_offset_minutes=self._profile.utc_offset_minutes,
        )

    def _device(self, home: Any) -> Device:
        crew = self._crew
        adversary = self._member.adversary
        runtime: Runtime = PacedRuntime(crew.runtime, self.time, self._profile.speed, crew.house.slow_bundles)
        if adversary is not None:
            runtime = lying_runtime(runtime, adversary)
        return Device.open(
            home,
            identity=self._member.identity,
            channel=self._channel(adversary),
            runtime=runtime,
            clock=self.time,
            examples=self._examples(),
            status=self,
            policy=POLICY,
            personal=PERSONAL,
            disk=Disk(self._plug),
            offload=Working(crew.ahead, self.time, self._at_least, asyncio.sleep),
            privacy=PrivacyPolicy(minimum_cohort=crew.smallest_cohort),
        )

    def _examples(self) -> SharedExamples:
        """What the device has seen, as it is on this visit."""
        crew, member, client = self._crew, self._member, self._client
        split = Split(client.training, client.held_back)
        if member.adversary is not None and member.adversary.kind == "label-flip":
            split = Split(flipped(split.training, crew.ends), flipped(split.held_back, crew.ends))
        begun = crew.shifts.begun(member.index, crew.now())
        return SharedExamples(crew.shifts.shifted(split, begun), len(begun))

    def _channel(self, adversary: Adversary | None) -> VirtualChannel:
        crew = self._crew
        forge: Forge = honest
        if adversary is not None and adversary.kind == "nan":
            forge = not_a_number(crew.release_key, crew.shapes)
        if adversary is not None and adversary.kind == "replay":
            forge = replaying(self._member.loot)
        return VirtualChannel(
            crew.house,
            self._member.identity.device_id,
            self._profile,
            crew.weather,
            lambda: self._is_free(crew.now()),
            crew.books,
            asks_first=crew.asks_first,
            assigned=self._assigned,
            forge=lambda begin, sealed: forge(begin, sealed, self._assignment),
        )

    def _is_free(self, time: float) -> bool:
        return not is_away(self._crew, self._member, time)

    def _assigned(self, assignment: Assignment) -> None:
        crew, member = self._crew, self._member
        self._assignment = assignment
        self._expected = expected_seconds(assignment.plan, self._client, self._profile.speed)
        member.sessions += 1
        member.taken = (NEVER, NEVER)
        if crew.chance.random() < crew.drop_out:
            begin = crew.now() + float(crew.chance.random()) * self._expected
            member.taken = (begin, begin + float(crew.chance.exponential(crew.away_seconds)))
            crew.books.faults["taken away"] += 1

    def _at_least(self) -> float:
        """Seconds that the work which begins now takes at least: all of it, or until it is interrupted."""
        if not self._expected:
            return 0.0
        now = self._crew.now()
        end = min(self._crew.people.availability.free_until(self._member.index, now), self._member.taken[0])
        least, self._expected = min(self._expected, max(0.0, end - now)), 0.0
        return least


def is_away(crew: Crew, member: Member, time: float | None = None) -> bool:
    """Whether somebody has taken a device away, or it isn't free of itself, at an instant: now, unless given."""
    now = crew.now() if time is None else time
    begin, end = member.taken
    return begin <= now < end or not crew.people.availability.free(member.index, now)


def expected_seconds(plan: Plan, client: ClientData, speed: float) -> float:
    """What a plan takes on a device, if nothing comes between."""
    judged = client.held_back.count * FORWARD
    if plan.kind is Kind.EVALUATE:
        return judged / speed
    count = min(client.training.count, plan.max_examples or client.training.count)
    batches = max(1, -(-count // plan.batch_size))
    steps = min(plan.epochs * batches, plan.max_steps or plan.epochs * batches)
    # Each epoch's last batch is as small as what is left.
    whole, begun = divmod(steps, batches)
    return (judged + whole * count + min(begun * plan.batch_size, count)) / speed
