"""The power may go before any durable step that a device takes: a good slot answers at the next start, every time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.client.recordings import recordings
from tests.rollouts.fleet import AUTHOR, MODEL, QUICK, Fleet
from umbel_client import adoption
from umbel_client.files import BESIDE, Disk
from umbel_client.slots import TRIES, Slots

OWN = replace(QUICK, epochs=1, margin=1.0)
"""With weights of its own, so that these are written and dropped too."""


class PowerCut(BaseException):
    """The machine is dark."""


@dataclass
class Plug:
    """Is pulled before the step of this number (0 is the first), or never."""

    at: int = -1
    steps: list[str] = field(default_factory=list)

    def __call__(self, step: str) -> None:
        if len(self.steps) == self.at:
            raise PowerCut(step)
        self.steps.append(step)


Scene = Callable[[Fleet], Awaitable[None]]


async def nothing_here_yet(fleet: Fleet) -> None:
    """A new device, and a release that it can have."""
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)


async def a_release_in_use(fleet: Fleet) -> None:
    """A device with a release that proved itself, and a newer one that comes as a delta."""
    await nothing_here_yet(fleet)
    for _ in range(3):
        await fleet.visits(seconds=40.0)
    assert fleet.devices[0].kit.shelf.slots.trial is None
    await nothing_here_yet(fleet)


async def a_trial_whose_time_has_come(fleet: Fleet) -> None:
    """A device whose newest release has answered for long enough."""
    await a_release_in_use(fleet)
    await fleet.visits()
    assert fleet.devices[0].kit.shelf.slots.trial is not None
    fleet.clock.instant += 40.0


async def a_trial_without_tries(fleet: Fleet) -> None:
    """A device whose newest release took its process down each time."""
    await a_release_in_use(fleet)
    await fleet.visits()
    for _ in range(TRIES):
        fleet.devices[0].kit.shelf.change(Slots.loading)


SCENES = {
    "a first release": nothing_here_yet,
    "the next release": a_release_in_use,
    "a commitment": a_trial_whose_time_has_come,
    "a way back": a_trial_without_tries,
}


@pytest.mark.parametrize("scene", ["the next release"])  # of all scenes, all steps are slow tests
async def test_a_power_cut_before_some_durable_steps_leaves_a_good_slot(tmp_path: Path, scene: str) -> None:
    """A quick slice of the next one."""
    await _cut(SCENES[scene], tmp_path, every=9)


@pytest.mark.slow
@pytest.mark.parametrize("scene", SCENES)
async def test_a_power_cut_before_any_durable_step_leaves_a_good_slot(tmp_path: Path, scene: str) -> None:
    await _cut(SCENES[scene], tmp_path, every=1)


async def test_a_try_is_on_the_medium_before_a_release_is_tested_which_may_take_the_machine_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, plug = Fleet(tmp_path, devices=1), Plug()
    await a_release_in_use(fleet)

    def reset(*arguments: object) -> None:
        before.extend(step for step in plug.steps if step.endswith("state.json"))
        raise PowerCut("while it was tested")

    before: list[str] = []

    monkeypatch.setattr(adoption, "verify_golden", reset)
    with pytest.raises(PowerCut, match="tested"):
        await _visit(fleet, plug)
    assert before[-3:] == ["write state.json", "flush state.json", "replace state.json"]


async def _cut(scene: Scene, folder: Path, every: int) -> None:
    """Play a visit; then again and again from the same beginning, with the plug pulled one step (`every`) later."""
    before = Fleet(folder / "before", devices=1)
    before.reopen(0, personal=OWN)
    await scene(before)
    number = before.releases()[0]
    undisturbed = before.copied(folder / "undisturbed")
    await _visit(undisturbed, Plug())
    ended = await _settled(undisturbed)
    for step in range(0, 200, every):
        fleet, plug = before.copied(folder / str(step)), Plug(step)
        try:
            await _visit(fleet, plug)
        except PowerCut as cut:
            where = f"after a cut before step {step}, {cut}"
        else:
            break
        reborn = fleet.reopen(0, personal=OWN)
        assert fleet.releases()[0] in (number, ended[0]), where
        if number:
            assert len(reborn.predict(recordings(1)[0])) > 0, where
        assert await _settled(fleet) == ended, where
        assert not list(fleet.folder.glob(f"home-0/**/*{BESIDE}")), where
    assert step > 10, "a visit should have more durable steps than that"


async def _settled(fleet: Fleet) -> tuple[int, str]:
    """The device's release and what it answers with, two visits later."""
    await fleet.visits()
    await fleet.visits()
    return fleet.releases()[0], fleet.devices[0].answers_with


async def _visit(fleet: Fleet, plug: Plug) -> None:
    """A start and a visit, as after a night without power."""
    await fleet.reopen(0, personal=OWN, disk=Disk(plug)).wake()
