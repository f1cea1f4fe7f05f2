"""What Prometheus is told of rollouts, holds and the listing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import sqlalchemy as sa
from prometheus_client.core import Metric

from tests.rollouts.fleet import AUTHOR, MODEL, Fleet
from umbel.clock import DAY
from umbel_server import executions
from umbel_server.executions import WAITING, Execution
from umbel_server.keyring import RULES
from umbel_server.monitoring import releases
from umbel_server.monitoring.releases import Listing
from umbel_server.rollout_spec import Audience

Labels = frozenset[tuple[str, str]]


def told(fleet: Fleet, *reads: Callable[[sa.Connection], Iterator[Metric]]) -> dict[tuple[str, Labels], float]:
    with fleet.coordinator.store.reading() as connection:
        samples = [sample for read in reads for family in read(connection) for sample in family.samples]
    return {(it.name.removeprefix("umbel_"), frozenset(it.labels.items())): it.value for it in samples}


def of(name: str, **labels: str) -> tuple[str, Labels]:
    return name, frozenset(labels.items())


async def test_what_waits_for_a_person_is_told_with_since_when(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    assert fleet.coordinator.rollouts is not None
    listing = Listing(fleet.coordinator.rollouts.desk.repository)
    unsigned, held = of("releases_unsigned", model=MODEL), of("release_held_timestamp_seconds", model=MODEL)
    desk, version, now = fleet.coordinator.rollouts.desk, fleet.good_version(), fleet.clock.now()
    with fleet.coordinator.store.transaction() as connection:
        desk.prepare(connection, version, Audience(MODEL, "stable"), AUTHOR, now)
    assert told(fleet, listing.read)[unsigned] == 1
    first = fleet.verbs.publish(MODEL, version, "stable", AUTHOR)
    signed = told(fleet, listing.read, releases.channels)
    assert (signed[unsigned], held in signed) == (0, False)
    assert signed[of("release_number", model=MODEL, channel="stable", population="")] == first
    end = signed[of("metadata_expiry_timestamp_seconds", role="timestamp")]
    assert end - fleet.clock.now() <= RULES["timestamp"].lifetime_seconds < end - fleet.clock.now() + DAY / 2

    fleet.begin_rollout("r", fleet.good_version())
    running = told(fleet, releases.rollouts)
    assert running[of("rollouts", stage="running")] == 1 and running[of("rollouts", stage="paused")] == 0
    began = fleet.clock.now()
    assert running[of("rollout_changed_timestamp_seconds", rollout="r", model=MODEL, stage="running")] == began
    with fleet.coordinator.store.transaction() as connection:
        for name, outcome in (("a", WAITING), ("b", "adopted"), ("c", "adopted")):
            executions.offer(connection, Execution(name, "r", 0, MODEL, 2, f"device-{name}", began, outcome))
    fleet.clock.instant += 100.0
    fleet.verbs.stop("r", "pause", AUTHOR, "a long holiday")
    fleet.verbs.hold(MODEL, AUTHOR, "somebody called")
    stands = told(fleet, releases.rollouts, releases.channels)
    changed = {name: value for name, value in stands.items() if name[0] == "rollout_changed_timestamp_seconds"}
    paused = of("rollout_changed_timestamp_seconds", rollout="r", model=MODEL, stage="paused")
    assert changed == {paused: began + 100.0}
    devices = {
        outcome: stands[of("rollout_devices", rollout="r", outcome=outcome)] for outcome in ("waiting", "adopted")
    }
    assert devices == {"waiting": 1, "adopted": 2}
    assert stands[held] == began + 100.0
    assert not [name for name in stands if AUTHOR in str(name) or "device-" in str(name) or "somebody" in str(name)]
