"""The table of moves, at random: no story that can't be true, no vote twice, and gates that count what it says.

The machine keeps books of its own: who holds which offer, and what each has told. The coordinator's table has to agree
with them after every step.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.rollouts.fleet import AUTHOR, MODEL, POPULATION, Fleet
from umbel.visit import CheckIn, Outcome, ReleaseOutcome
from umbel_server import executions, exposures
from umbel_server.executions import WAITING, WITHDRAWN, Execution
from umbel_server.offers import Standing
from umbel_server.rollout import Rollout, Stage
from umbel_server.rollout_spec import Wave
from umbel_server.tables import EXECUTIONS

DEVICES: Final = tuple(f"{number:x}" * 32 for number in range(1, 5))
STORIES: Final = {
    (),
    ("adopted",),
    ("adopted", "committed"),
    ("adopted", "committed", "reverted"),
    ("adopted", "reverted"),
    ("kept-own",),
    ("failed",),
}
"""All that may ever become of one offer, whatever is told."""


@dataclass
class Move:
    """The machine's own note of an offer."""

    execution: str
    device: str
    number: int
    story: tuple[str, ...] = ()
    withdrawn: bool = False
    replaced: bool = False
    """By a later offer of the same release to the same device."""

    @property
    def counted(self) -> str:
        """What the table has to say of it."""
        return self.story[-1] if self.story else WITHDRAWN if self.withdrawn else WAITING


class World:
    """One coordinator with a rollout to everybody, made once: the machine empties its table and begins anew."""

    def __init__(self, folder: Path) -> None:
        self.fleet = Fleet(folder)
        self.fleet.verbs.publish(MODEL, self.fleet.good_version(), "stable", AUTHOR)
        waves = (Wave(100.0, soak_seconds=10.0, deadline_seconds=3600.0),)
        self.fleet.begin_rollout("r", self.fleet.good_version(), waves=waves)
        self.fleet.steer()
        self.fleet.steer()
        assert self.fleet.coordinator.rollouts is not None
        self.offers, self.store = self.fleet.coordinator.rollouts.offers, self.fleet.coordinator.store
        self.standing = self.offers.standing
        self.rollout: Rollout = self.fleet.verbs.get("r").rollout


class AnyVisits(RuleBasedStateMachine):
    """Whatever devices, forgers and people do, in any order."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.rollout = self.world.rollout
        self.world.offers.standing = self.world.standing
        with self.world.store.transaction() as connection:
            connection.execute(EXECUTIONS.delete())
        self.moves: dict[str, Move] = {}  # drawn from in the order of making: ids are chance, and never the same
        self.has = dict.fromkeys(DEVICES, 0)
        self.now = self.world.fleet.clock.now()

    # What happens.

    @initialize()
    def everybody_calls(self) -> None:
        for device in DEVICES:
            self.check_in(device)

    @rule(device=st.sampled_from(DEVICES))
    def check_in(self, device: str) -> None:
        asked = CheckIn(POPULATION, ("onnx",), (), release=self.has[device])
        signed = self.world.offers.offer(device, asked, MODEL, self.tick())
        if signed is None:
            return
        with self.world.store.reading() as connection:
            found = [it for it in executions.of_numbers(connection, MODEL, self.numbers) if it.device == device]
        made = next(it for it in found if it.id.encode() in signed.statement)
        assert made.number > self.has[device], "an offer leads forwards"
        before = [it for it in self.here if (it.device, it.number) == (device, made.number)]
        for move in before:
            if move.execution != made.id:
                assert move.counted in (WAITING, WITHDRAWN, "adopted", "committed"), "who answered isn't asked again"
                move.replaced = True
        self.moves.setdefault(made.id, Move(made.id, device, made.number))

    @precondition(lambda self: self.moves)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome), device=st.sampled_from(DEVICES), again=st.integers(1, 3))
    def anybody_tells_anything(self, data: st.DataObject, outcome: Outcome, device: str, again: int) -> None:
        """Of any offer that was ever made, once or more: true, stale, foreign or replayed."""
        self.tell(self.moves[data.draw(st.sampled_from(list(self.moves)))], device, outcome, again)

    @precondition(lambda self: self.moves)
    @rule(data=st.data(), outcomes=st.lists(st.sampled_from(Outcome), min_size=1, max_size=5))
    def the_device_itself_tells(self, data: st.DataObject, outcomes: list[Outcome]) -> None:
        move = self.moves[data.draw(st.sampled_from(list(self.moves)))]
        for outcome in outcomes:
            self.tell(move, move.device, outcome)

    def tell(self, move: Move, device: str, outcome: Outcome, again: int = 1) -> None:
        told = ReleaseOutcome(MODEL, move.number, outcome, execution=move.execution)
        self.world.offers.hear(device, [told] * again, self.tick())
        if device == move.device and not move.replaced and (*move.story, outcome.value) in STORIES:
            move.story += (outcome.value,)
            self.has[device] = {"adopted": move.number, "reverted": 0}.get(outcome.value, self.has[device])

    @rule(device=st.sampled_from(DEVICES), outcome=st.sampled_from(Outcome), invented=st.integers(0, 9))
    def make_up_an_offer(self, device: str, outcome: Outcome, invented: int) -> None:
        told = ReleaseOutcome(MODEL, self.world.rollout.spec.release, outcome, execution=f"invented-{invented}")
        self.world.offers.hear(device, [told], self.tick())

    @rule(device=st.sampled_from(DEVICES))
    def lose_the_shelf(self, device: str) -> None:
        self.has[device] = 0

    @rule(stage=st.sampled_from([Stage.RUNNING, Stage.PAUSED, Stage.ROLLING_BACK]))
    def steer(self, stage: Stage) -> None:
        self.rollout = replace(self.world.rollout, stage=stage)
        self.world.offers.standing = replace(self.world.standing, rollouts=(self.rollout,))

    @rule()
    def hold(self) -> None:
        self.world.offers.standing = Standing((self.rollout,), self.world.standing.heads, {MODEL: "wrong labels"})

    @rule()
    def withdraw(self) -> None:
        with self.world.store.transaction() as connection:
            executions.withdraw(connection, "r", self.world.rollout.spec.release)
        for move in self.here:
            if move.number == self.world.rollout.spec.release and not move.story:
                move.withdrawn = True

    # What always holds.

    @invariant()
    def the_table_says_what_was_told(self) -> None:
        assert {it.id: it.outcome for it in self.table()} == {it.execution: it.counted for it in self.here}

    @invariant()
    def one_device_has_one_vote(self) -> None:
        assert max(Counter((it.device, it.number) for it in self.table()).values(), default=1) == 1

    @invariant()
    def the_gate_counts_what_the_table_says(self) -> None:
        release = self.world.rollout.spec.release
        with self.world.store.reading() as connection:
            moves = executions.of_rollout(connection, "r", [release])
            counts = executions.counts(connection, "r", [release])
        mine = [it for it in self.here if it.number == release]
        seen = exposures.canaries(moves, {})
        assert len(seen) == len(mine) == sum(counts.values())
        assert sum(it.answered for it in seen) == sum(bool(it.story) for it in mine)
        assert sum(it.failed for it in seen) == sum(it.counted in ("failed", "reverted") for it in mine)
        assert sum(it.kept_own for it in seen) == sum(it.counted == "kept-own" for it in mine)
        assert counts == Counter((release, it.counted or "waiting") for it in mine)

    # Small parts.

    @property
    def here(self) -> list[Move]:
        """The offers that still stand in the table."""
        return [move for move in self.moves.values() if not move.replaced]

    @property
    def numbers(self) -> list[int]:
        spec = self.world.rollout.spec
        return [spec.from_release, spec.release, spec.revert_release]

    def table(self) -> list[Execution]:
        with self.world.store.reading() as connection:
            return executions.of_numbers(connection, MODEL, self.numbers)

    def tick(self) -> float:
        self.now += 1.0
        return self.now


def test_whatever_is_told_the_table_stays_true(tmp_path: Path) -> None:
    class Machine(AnyVisits):
        world = World(tmp_path)

    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=20, stateful_step_count=25, deadline=None),
    )
