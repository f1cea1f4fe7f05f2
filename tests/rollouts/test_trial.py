"""A release on trial proves itself and is committed, or the one before it answers again, wherever the power goes."""

from __future__ import annotations

import asyncio
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tests.client.recordings import recordings
from tests.power_cut import PowerCut
from tests.rollouts.fleet import AUTHOR, MODEL, QUICK, Fleet, fleet_of
from umbel.digests import digest_of
from umbel.errors import RuntimeFailure, WrongState
from umbel.runtime.litert import LiteRTRuntime
from umbel_client import PersonalSettings
from umbel_client.agent import Agent, Until
from umbel_client.files import Disk
from umbel_client.predictor import Predictor
from umbel_client.slots import TRIES, Personal, Slot, Slots, Trial


@pytest.fixture
async def fleet(tmp_path: Path) -> Fleet:
    made = await fleet_of(tmp_path, 1)
    made.clock.instant += 60
    await made.visits()
    return made


def told(fleet: Fleet) -> dict[int, str]:
    """Release -> the device's outcome, as the coordinator knows it."""
    from sqlalchemy import select

    from umbel_server.tables import EXECUTIONS

    with fleet.coordinator.store.reading() as connection:
        return {row.number: row.outcome for row in connection.execute(select(EXECUTIONS))}


async def test_a_trial_is_committed_after_its_time_and_told(fleet: Fleet) -> None:
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    await fleet.visits(seconds=10.0)
    assert fleet.devices[0].kit.shelf.slots.trial is not None, "it hasn't answered for long enough"
    await fleet.visits(seconds=40.0)
    await fleet.visits()
    assert fleet.devices[0].kit.shelf.slots.trial is None
    assert told(fleet)[number] == "committed"


@pytest.mark.parametrize("step", ["create state.json", "create slots.json"])
async def test_a_commit_is_told_though_the_process_dies_in_the_middle_of_it(fleet: Fleet, step: str) -> None:
    number, armed = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR), []

    def dies(taken: str) -> None:
        if armed and taken == step:
            raise PowerCut

    await fleet.visits()
    device = fleet.reopen(0, disk=Disk(dies))
    fleet.clock.instant += 40.0
    armed.append(True)
    with pytest.raises(PowerCut):
        await device.wake()
    fleet.reopen(0)
    await fleet.visits()
    await fleet.visits()
    assert fleet.devices[0].kit.shelf.slots.trial is None
    assert told(fleet)[number] == "committed"


async def test_a_release_that_takes_its_process_down_is_gone_at_the_third_start(fleet: Fleet) -> None:
    good = fleet.releases()[0]
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    assert fleet.releases() == [number]
    shelf = fleet.devices[0].kit.shelf
    # Each start spends a try before it loads; the process dies before anything proves that it can answer.
    for _ in range(TRIES):
        shelf.change(Slots.loading)
    fleet.reopen(0)
    assert fleet.releases() == [good]
    assert fleet.devices[0].answers_with == f"release {good}"
    await fleet.visits()
    await fleet.visits()
    assert told(fleet)[number] == "reverted"
    assert fleet.releases() == [good], "a release that was given up is not offered again"


async def test_starts_that_answer_never_use_up_the_tries(fleet: Fleet) -> None:
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    for _ in range(3 * TRIES):
        fleet.reopen(0).predict(recordings(1)[0])
    assert fleet.releases() == [number]


async def test_a_machine_that_loses_its_power_while_the_agent_sleeps_uses_up_no_try(fleet: Fleet) -> None:
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    for _ in range(3 * TRIES):
        device = fleet.reopen(0)
        assert device.kit.memory.state.next_wake > fleet.clock.now(), "it sleeps before its first visit"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(Agent(device, lambda visit: None).run(Until()), 0.05)
    assert fleet.releases() == [number]


async def test_neither_ranked_answers_nor_orderly_ends_use_up_the_tries(fleet: Fleet) -> None:
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    for _ in range(3 * TRIES):
        fleet.reopen(0).probabilities(recordings(1)[0])
    for _ in range(3 * TRIES):
        fleet.reopen(0).close()
    assert fleet.releases() == [number]
    for _ in range(TRIES + 1):
        fleet.reopen(0)
    assert fleet.releases() != [number], "ends that leave no sign are taken for crashes"


async def test_a_release_that_fails_to_answer_uses_up_its_tries_however_orderly_the_ends(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = fleet.releases()[0]
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()

    def fails(*_: object) -> None:
        raise RuntimeFailure("no such kernel on this device")

    with monkeypatch.context() as broken:
        broken.setattr(Predictor, "__call__", fails)
        for _ in range(TRIES):
            assert fleet.releases() == [number]
            with closing(fleet.reopen(0)) as device, pytest.raises(RuntimeFailure):
                device.predict(recordings(1)[0])
    fleet.reopen(0)
    assert fleet.releases() == [good]


async def test_a_bundle_that_rots_on_trial_is_given_up_at_once(fleet: Fleet) -> None:
    good = fleet.releases()[0]
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    kit = fleet.devices[0].kit
    active = kit.shelf.slots.active
    assert active is not None
    kit.shelf.path(active.bundle).write_bytes(b"rotten")
    fleet.reopen(0)
    assert fleet.releases() == [good]
    assert active.bundle in fleet.devices[0].kit.shelf.slots.blocked


async def test_a_device_that_changes_its_runtime_in_a_trial_blames_no_release(fleet: Fleet) -> None:
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await fleet.visits()
    device = fleet.reopen(0, runtime=LiteRTRuntime())
    for _ in range(TRIES):
        with pytest.raises(WrongState, match="can't use its model now"):
            device.predict(recordings(1)[0])
        device = fleet.reopen(0, runtime=LiteRTRuntime())
    await fleet.visits()
    assert (device.answers_with, device.kit.shelf.slots.blocked) == (f"release {number}", ())
    fleet.clock.instant += QUICK.trial_seconds + 1
    await fleet.visits()
    await fleet.visits()
    assert told(fleet)[number] == "committed"


@pytest.mark.parametrize("name", ["manifest", "weights.safetensors"])
async def test_a_committed_release_that_rots_is_fetched_anew_at_the_next_visit(fleet: Fleet, name: str) -> None:
    kit, number = fleet.devices[0].kit, fleet.releases()[0]
    active = kit.shelf.slots.active
    assert active is not None and kit.shelf.slots.trial is None
    files = {**kit.shelf.bundle(active.bundle, "onnx").paths, "manifest": kit.shelf.path(active.bundle)}
    files[name].write_bytes(b"rotten")
    assert fleet.reopen(0).answers_with == ""
    await fleet.visits()
    assert fleet.devices[0].answers_with == f"release {number}"
    assert told(fleet) == {number: "committed"}


async def test_examples_that_cannot_be_learnt_from_end_no_visit(fleet: Fleet) -> None:
    """A personal model that can't be made is the owner's affair: the release answers, and the fleet isn't left."""
    too_steep = PersonalSettings(epochs=1, hyperparameters={"lr": 1e30})
    device = fleet.reopen(0, personal=too_steep)
    device.learn_from(*recordings(40, "more"))
    visit = await device.wake()
    assert visit.error is None and device.answers_with == f"release {fleet.releases()[0]}"
    assert "not-finite" in device.kit.memory.state.last_error


async def test_content_that_was_given_up_here_is_not_tried_again_under_another_number(fleet: Fleet) -> None:
    good, version = fleet.releases()[0], fleet.good_version()
    fleet.verbs.publish(MODEL, version, "stable", AUTHOR)
    await fleet.visits()
    for _ in range(TRIES):
        fleet.devices[0].kit.shelf.change(Slots.loading)
    fleet.reopen(0)
    again = fleet.verbs.publish(MODEL, version, "stable", AUTHOR)
    await fleet.visits()
    await fleet.visits()
    assert (told(fleet)[again], fleet.releases()) == ("failed", [good])


async def test_a_release_that_answers_otherwise_than_its_maker_saw_is_not_even_tried(fleet: Fleet) -> None:
    good = fleet.releases()[0]
    number = fleet.verbs.publish(MODEL, fleet.lying_version(), "stable", AUTHOR)
    await fleet.visits()
    assert fleet.releases() == [good] and fleet.devices[0].kit.shelf.slots.blocked == ()
    await fleet.visits()
    assert told(fleet)[number] == "failed"


async def test_a_test_that_kills_the_process_each_time_ends_as_a_failure(fleet: Fleet) -> None:
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    memory = fleet.devices[0].kit.memory

    class Killed(BaseException):
        pass

    def die(work: Any, *arguments: Any) -> Any:
        raise Killed

    for _ in range(TRIES):
        device = fleet.reopen(0, offload=die)
        with pytest.raises(Killed):
            await device.wake()
    fleet.reopen(0)
    await fleet.visits()
    await fleet.visits()
    assert told(fleet)[number] == "failed"
    assert memory is not None and number not in fleet.releases()


# The slots alone, at random.


class AnySequence(RuleBasedStateMachine):
    """Whatever happens to the slots: what answered well before stays reachable until something else is committed."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = Slots()
        self.number = 0
        self.committed: Slot | None = None

    @rule(own=st.booleans(), trial=st.booleans())
    def adopt(self, own: bool, trial: bool) -> None:
        self.number += 1
        bundle = digest_of(str(self.number).encode())
        slot = Slot("m", self.number, self.number, bundle)
        personal = Personal(bundle, digest_of(b"own")) if own else None
        self.slots = self.slots.adopt(slot, personal, Trial(f"e{self.number}", 0.0) if trial else None)
        if not trial:
            self.committed = slot

    @rule()
    def load(self) -> None:
        self.slots = self.slots.loading()

    @rule()
    def answer(self) -> None:
        self.slots = self.slots.healthy()

    @rule()
    def commit(self) -> None:
        self.slots = self.slots.commit()
        if self.slots.active is not None:
            self.committed = self.slots.active

    @rule()
    def give_up(self) -> None:
        before = self.slots
        self.slots = self.slots.give_up("no good")
        if before.trial is not None:
            assert before.active is not None
            assert before.active.bundle in self.slots.blocked
            assert self.slots.reverted is not None and self.slots.reverted.number == before.active.number

    @rule()
    def forget(self) -> None:
        self.slots = self.slots.without_personal()
        assert self.slots.personal is None and self.slots.previous_personal is None

    @invariant()
    def the_last_committed_one_is_still_there(self) -> None:
        if self.committed is not None:
            assert self.committed in (self.slots.active, self.slots.previous)

    @invariant()
    def a_trial_never_has_more_tries_than_it_got(self) -> None:
        if self.slots.trial is not None:
            assert 0 <= self.slots.trial.tries_left <= TRIES

    @invariant()
    def personal_weights_belong_to_their_slot(self) -> None:
        for slot, own in (
            (self.slots.active, self.slots.personal),
            (self.slots.previous, self.slots.previous_personal),
        ):
            assert own is None or (slot is not None and own.bundle == slot.bundle)


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(max_examples=80, stateful_step_count=25, deadline=None)


def test_going_back_brings_the_personal_model_of_before_along() -> None:
    one, two = (Slot("m", n, n, digest_of(bytes([n]))) for n in (1, 2))
    own = Personal(one.bundle, digest_of(b"own"))
    slots = Slots().adopt(one, own).adopt(two, None, Trial("e", 0.0)).give_up("worse")
    assert (slots.active, slots.personal) == (one, own)
    assert replace(slots, reverted=None) == slots.told()
