"""An experiment gives each device the release of one arm, concludes nothing from a split that chance didn't make, and
ends when a person ends it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.rollouts.fleet import AUTHOR, EAGER, MODEL, POPULATION, SECOND, Fleet
from umbel.visit import Outcome
from umbel_server import executions
from umbel_server.executions import Execution
from umbel_server.gates import Decision
from umbel_server.rollout import Rollout, Stage
from umbel_server.rollout_spec import ExperimentArm, RolloutSpec, Wave

EVERYBODY = (Wave(100.0, soak_seconds=10.0, deadline_seconds=3600.0),)


def begin_experiment(fleet: Fleet) -> Rollout:
    """Two releases side by side, one device in two each."""
    first, second = (fleet.verbs.prepare(MODEL, fleet.good_version(), "stable", AUTHOR).number for _ in range(2))
    arms = (ExperimentArm(first, 1.0), ExperimentArm(second, 1.0))
    spec = RolloutSpec(MODEL, "stable", POPULATION, second, waves=EVERYBODY, gate=EAGER, arms=arms)
    fleet.verbs.create("e", spec, AUTHOR)
    fleet.verbs.submit("e", AUTHOR, 0)
    fleet.verbs.approve("e", SECOND, spec.subject, 1)
    begun: Rollout = fleet.verbs.start("e", AUTHOR, 2).rollout
    return begun


def answered(fleet: Fleet, begun: Rollout, counts: tuple[int, int]) -> None:
    """As if so many devices had taken the release of each arm."""
    with fleet.coordinator.store.transaction() as connection:
        for number, count in zip(begun.releases, counts, strict=True):
            for device in range(count):
                name = f"{number}-{device}"
                move = Execution(name, "e", 0, MODEL, number, name, fleet.clock.now(), Outcome.ADOPTED.value)
                executions.offer(connection, move)


@pytest.mark.parametrize(
    ("counts", "decision"),
    [((21, 19), Decision.PASS), ((36, 4), Decision.INCONCLUSIVE), ((0, 40), Decision.INCONCLUSIVE)],
)
def test_nothing_is_concluded_from_arms_of_the_wrong_size(
    tmp_path: Path, counts: tuple[int, int], decision: Decision
) -> None:
    fleet = Fleet(tmp_path)
    begun = begin_experiment(fleet)
    answered(fleet, begun, counts)
    fleet.clock.instant += 60.0
    rollouts = fleet.coordinator.rollouts
    assert rollouts is not None
    assert rollouts.judgement(begun, fleet.clock.now()).decision is decision
    fleet.steer()
    ended = fleet.verbs.get("e").rollout
    assert ended.stage is (Stage.AWAITING_PROMOTION if decision is Decision.PASS else Stage.PAUSED)


async def test_devices_get_the_release_of_their_arm_and_keep_it(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, devices=6)
    begun = begin_experiment(fleet)
    await fleet.visits()
    first = fleet.releases()
    assert set(first) <= set(begun.releases)
    await fleet.visits()
    assert fleet.releases() == first
    assert fleet.verbs.get("e").rollout.stage is not Stage.SUCCEEDED, "a person ends it"
