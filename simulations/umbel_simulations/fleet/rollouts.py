"""A scenario's rollouts, played by two operators: prepared, approved, started; then the gates have the say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from umbel.bundle import file_refs
from umbel.identity import DeviceId
from umbel.randomness import generator
from umbel.release import STABLE
from umbel.runtime.onnx import OnnxRuntime
from umbel.successor import successor
from umbel.weights import Weights
from umbel_server.executions import HOLDS_IT, of_numbers
from umbel_server.rollout import Stage
from umbel_server.rollout_spec import Audience, OnFailure, RolloutSpec
from umbel_server.rollout_verbs import RolloutVerbs
from umbel_server.tables import VERSIONS
from umbel_server.versions import Lineage, Version, VersionState
from umbel_simulations.fleet.house import MODEL, OPERATOR, POPULATION, SECOND, House
from umbel_simulations.outcome import RolloutEvent
from umbel_simulations.world import RolloutPlan

_LOOK_SECONDS: Final = 60.0
_UNTIL_KNOWN: Final = "not started"
_ENDED: Final = (Stage.SUCCEEDED, Stage.ROLLED_BACK, Stage.PAUSED)


@dataclass(slots=True)
class Played:
    """One rollout of the scenario, as far as it has come."""

    plan: RolloutPlan
    name: str
    release: int = 0
    started: float | None = None
    """Virtual hours, as all times here."""
    ended: float | None = None
    stage: str = _UNTIL_KNOWN
    events: list[RolloutEvent] = field(default_factory=list)
    numbers: tuple[int, ...] = ()
    """Releases that it moves devices to."""
    seen: set[DeviceId] = field(default_factory=set)
    """Devices that had it after one of their visits, whether or not they could tell the coordinator."""
    reached: int = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.ended is not None

    @property
    def is_cleared(self) -> bool:
        """Whether it was rolled back, and nobody who had it was given up on: by the coordinator's books."""
        return self.stage == Stage.ROLLED_BACK.value and "left on it: 0" in self.events[-1].what


class Play:
    """Plays one rollout on a coordinator that may die meanwhile.

    Args:
        house: the coordinator; it isn't built yet.
        plan: what is to happen.
        place: its place among the scenario's rollouts.
        seed: of the run.
    """

    def __init__(self, house: Callable[[], House], plan: RolloutPlan, place: int, seed: int) -> None:
        self._find_house, self._plan = house, plan
        self._chance = generator(seed, "noisy release", place)
        self.played = Played(plan, f"rollout-{place + 1}")

    async def run(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin at its hour, then look at it every minute until it is over."""
        await asyncio.sleep(self._plan.at_hour * 3600.0)
        while not self._may_begin():  # noqa: ASYNC110 - what an operator would do
            await asyncio.sleep(_LOOK_SECONDS)
        # The two operators ask until they are heard, and leave no rollout half made.
        with self._house.spared():
            self._begin(loop.time() / 3600.0)
        while not self.played.is_over:
            await asyncio.sleep(_LOOK_SECONDS)
            if self._house.is_up:
                self._look(loop.time() / 3600.0)

    def _may_begin(self) -> bool:
        if not self._house.is_up:
            return False
        rollouts = [record.rollout.stage for record in self._verbs.newest()]
        return not any(stage in (Stage.RUNNING, Stage.ROLLING_BACK) for stage in rollouts)

    @property
    def _house(self) -> House:
        return self._find_house()

    @property
    def _verbs(self) -> RolloutVerbs:
        verbs = self._house.parts.coordinator.verbs
        assert verbs is not None  # noqa: S101 - `build` always gives a listing
        return verbs

    def _begin(self, hour: float) -> None:
        version = made(self._house, self._plan, self._chance)
        verbs, played = self._verbs, self.played
        prepared = verbs.prepare(MODEL, version.number, STABLE, OPERATOR)
        steering = self._house.parts.coordinator.rollouts
        assert steering is not None  # noqa: S101
        with self._house.parts.store.reading() as connection:
            head = steering.desk.head(connection, Audience(MODEL, STABLE, POPULATION))
        spec = RolloutSpec(
            MODEL,
            STABLE,
            POPULATION,
            prepared.number,
            from_release=head,
            revert_release=prepared.revert,
            waves=tuple(step.wave() for step in self._plan.waves),
            gate=self._plan.gate_policy(),
            on_failure=OnFailure(self._plan.on_failure),
        )
        verbs.create(played.name, spec, OPERATOR)
        verbs.submit(played.name, OPERATOR, -1)
        verbs.approve(played.name, SECOND, spec.subject, -1)
        verbs.start(played.name, OPERATOR, -1)
        played.release, played.started = prepared.number, hour
        self._set_aside(version)
        self._look(hour)

    def _set_aside(self, version: Version) -> None:
        """Refuse a version that was broken on purpose, so that no round starts from it; its release goes its way.

        Past the product's own verbs, which know no second thoughts about a version.
        """
        if self._plan.content != "trained":
            this = (VERSIONS.c.model == MODEL) & (VERSIONS.c.number == version.number)
            with self._house.parts.store.transaction() as connection:
                connection.execute(VERSIONS.update().where(this).values(state=VersionState.REFUSED.value))

    def see(self, device: DeviceId, release: int) -> None:
        """Look at which release a device has after a visit; 0 for none."""
        if release in self.played.numbers:
            self.played.seen.add(device)

    def count(self) -> None:
        """See who has taken the release by now: by the coordinator's books, and by what devices really had."""
        with self._house.parts.store.reading() as connection:
            moves = of_numbers(connection, MODEL, self.played.numbers)
        told = {move.device for move in moves if _was_taken(move.outcome)}
        self.played.reached = len(told | self.played.seen)

    def _look(self, hour: float) -> None:
        played, found = self.played, self._verbs.get(self.played.name).rollout
        stage = f"{found.stage.value}, wave {found.wave + 1}" if found.stage is Stage.RUNNING else found.stage.value
        if stage != played.stage:
            played.events.append(RolloutEvent(round(hour, 4), f"{stage}: {found.reason}".strip(": ")))
        played.stage, played.numbers = stage, tuple(found.releases)
        if found.stage in _ENDED:
            played.ended = hour


def _was_taken(outcome: str) -> bool:
    return outcome in (*HOLDS_IT, "reverted")


def made(house: House, plan: RolloutPlan, chance: np.random.Generator) -> Version:
    """The version that a rollout moves to: the newest accepted one, or one that is broken on purpose."""
    registry, parts = house.parts.coordinator.registry, house.parts
    with parts.store.reading() as connection:
        newest = registry.newest_accepted(connection, MODEL)
    if plan.content == "trained":
        return newest
    parent = registry.bundle(newest.bundle)
    match plan.content:
        case "noisy":
            manifest, files = successor(parent, noisy(parent.shared_weights(), plan.noise, chance), OnnxRuntime())
        case "unloadable":
            name = parent.graph_file("onnx", "infer")
            files = {name: b"not a graph"}
            manifest = replace(parent.manifest, files={**parent.manifest.files, **file_refs(files)})
        case _:
            manifest, files = successor(parent, parent.shared_weights().scaled(1.0 + 1e-6), OnnxRuntime())
            house.slow_bundles.add(manifest.digest)
    registry.keep_successor(manifest, files)
    with parts.store.transaction() as connection:
        lineage = Lineage(registered_by=OPERATOR)
        return registry.add_version(
            connection, MODEL, newest.number, manifest, lineage, house.now(), VersionState.ACCEPTED
        )


def noisy(weights: Weights, share: float, chance: np.random.Generator) -> Weights:
    """Weights with noise: its deviation is `share` times that of each array."""
    return Weights(
        {
            name: (array + chance.normal(0.0, share * (float(np.std(array)) or 1.0), array.shape)).astype(np.float32)
            for name, array in weights.arrays.items()
        }
    )
