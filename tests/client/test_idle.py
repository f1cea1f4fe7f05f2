"""A device works only when every condition holds, and says in words which one doesn't."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.client.conftest import SetClock
from umbel.errors import MalformedMessage, NotFound
from umbel_client.idle import ALWAYS, CONDITIONS, Eligible, History, IdlePolicy, Waiting
from umbel_client.linux import LinuxStatus, metered_of, power
from umbel_client.status import DeviceStatus, FileStatus, HostStatus

NOON = 1_700_049_600.0 - 1_700_049_600.0 % 86_400 + 12 * 3600
GOOD = DeviceStatus(idle=True, charging=True, battery=0.5, metered=False, temperature=30.0, free_bytes=1 << 40)
SOME = History(training_examples=10)
POLICY = IdlePolicy()


def reasons(policy: IdlePolicy, status: DeviceStatus, history: History = SOME, now: float = NOON) -> str:
    verdict = policy.verdict(status, history, now)
    return "; ".join(verdict.reasons)


def test_all_conditions_met_is_eligible() -> None:
    assert POLICY.verdict(GOOD, SOME, NOON) == Eligible()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"idle": False}, "in use"),
        ({"charging": False}, "on battery: charge 50%, 80% needed"),
        ({"charging": False, "battery": None}, "charge unknown"),
        ({"metered": True}, "metered"),
        ({"temperature": 61.0}, "too hot: 61.0"),
        ({"free_bytes": 1}, "storage is short"),
    ],
)
def test_each_condition_alone_holds_the_device_back(change: dict[str, Any], words: str) -> None:
    verdict = POLICY.verdict(replace(GOOD, **change), SOME, NOON)
    assert isinstance(verdict, Waiting)
    assert len(verdict.reasons) == 1
    assert words in verdict.reasons[0]


def test_a_full_battery_stands_in_for_mains() -> None:
    assert POLICY.verdict(replace(GOOD, charging=False, battery=0.8), SOME, NOON) == Eligible()
    assert POLICY.verdict(replace(GOOD, charging=None, battery=0.9), SOME, NOON) == Eligible()


_FACTS = {
    "idle": "idle",
    "power": "charging",
    "network": "metered",
    "temperature": "temperature",
    "storage": "free_bytes",
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_what_nobody_can_tell_is_a_no_unless_the_policy_takes_it(condition: str) -> None:
    facts: dict[str, Any] = {_FACTS[condition]: None, "battery": None}
    unknown = replace(GOOD, **facts)
    assert f"{condition} is unknown" in reasons(POLICY, unknown)
    assert isinstance(replace(POLICY, allow_unknown=(condition,)).verdict(unknown, SOME, NOON), Eligible)


def test_allowing_the_unknown_does_not_allow_the_known_bad() -> None:
    careless = replace(POLICY, allow_unknown=CONDITIONS)
    assert careless.verdict(DeviceStatus(), SOME, NOON) == Eligible()
    assert "metered" in reasons(careless, DeviceStatus(metered=True))


def test_an_unknown_policy_version_is_never_eligible() -> None:
    policy = IdlePolicy.from_tree({"version": 2, "work_always": True})
    assert "version 2 is not known" in reasons(policy, GOOD)


@pytest.mark.parametrize(("hour", "held"), [(21, False), (22, True), (23, True), (3, True), (7, False), (12, False)])
def test_quiet_hours_pass_midnight_and_follow_local_time(hour: int, held: bool) -> None:
    policy = replace(POLICY, quiet_hours=((22 * 60, 7 * 60),))
    moment = NOON + (hour - 12) * 3600
    assert ("quiet hours: from 22:00 to 07:00" in reasons(policy, GOOD, now=moment)) is held
    east = replace(GOOD, utc_offset_minutes=120)
    assert ("quiet hours" in reasons(policy, east, now=moment - 7200)) is held


def test_a_spent_budget_waits_for_tomorrow() -> None:
    policy = replace(POLICY, max_bytes_per_day=1000, max_seconds_per_day=5.0)
    assert "budget of 0 MB" in reasons(policy, GOOD, replace(SOME, bytes_today=1000))
    assert "5 seconds of work" in reasons(policy, GOOD, replace(SOME, seconds_today=5.0))
    assert reasons(policy, GOOD, replace(SOME, bytes_today=999, seconds_today=4.9)) == ""


def test_too_few_examples_or_too_soon_still_asks_for_releases() -> None:
    verdict = POLICY.verdict(GOOD, History(), NOON)
    assert verdict == Eligible(offers_work=False, reasons=("0 training examples, 1 needed",))
    patient = replace(POLICY, min_seconds_between_contributions=60.0)
    verdict = patient.verdict(GOOD, replace(SOME, last_contribution=NOON - 20), NOON)
    assert verdict == Eligible(offers_work=False, reasons=("contributed lately; again in 40 seconds",))


statuses = st.builds(
    DeviceStatus,
    idle=st.sampled_from([True, False, None]),
    charging=st.sampled_from([True, False, None]),
    battery=st.none() | st.floats(0, 1),
    metered=st.sampled_from([True, False, None]),
    temperature=st.none() | st.floats(-50, 150),
    free_bytes=st.none() | st.integers(0, 1 << 50),
    utc_offset_minutes=st.integers(-720, 840),
)
policies = st.builds(
    IdlePolicy,
    require_idle=st.booleans(),
    require_power=st.booleans(),
    require_unmetered=st.booleans(),
    max_temperature=st.none() | st.floats(0, 100),
    min_free_bytes=st.integers(0, 1 << 40),
    min_examples=st.integers(0, 20),
    min_seconds_between_contributions=st.floats(0, 1e6),
    quiet_hours=st.lists(st.tuples(st.integers(0, 1440), st.integers(0, 1440)), max_size=2).map(tuple),
    max_bytes_per_day=st.integers(0, 1000),
    max_seconds_per_day=st.floats(0, 1000),
    allow_unknown=st.lists(st.sampled_from(CONDITIONS), unique=True).map(tuple),
)


@given(policies, statuses, st.integers(0, 2000), st.floats(0, 4e9))
def test_waiting_always_has_words_and_more_knowledge_of_good_never_hurts(
    policy: IdlePolicy, status: DeviceStatus, spent: int, now: float
) -> None:
    history = replace(SOME, bytes_today=spent)
    verdict = policy.verdict(status, history, now)
    if isinstance(verdict, Waiting):
        assert verdict.reasons and all(verdict.reasons)
        return
    better = replace(GOOD, battery=1.0, temperature=-60.0, utc_offset_minutes=status.utc_offset_minutes)
    assert isinstance(policy.verdict(better, history, now), Eligible)
    assert policy.interruptions(status, now) == ()


@given(policies)
def test_a_policy_survives_its_text(policy: IdlePolicy) -> None:
    assert IdlePolicy.from_tree(json.loads(json.dumps(asdict(policy)))) == policy


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", '{"version": "1"}', '{"version": true}', '{"version": 1, "require_idel": true}',
        '{"version": 1, "require_idle": 1}', '{"version": 1, "min_battery": -0.1}',
        '{"version": 1, "min_examples": "3"}', '{"version": 1, "quiet_hours": [[1]]}',
        '{"version": 1, "quiet_hours": [[0, 1441]]}', '{"version": 1, "quiet_hours": 3}',
        '{"version": 1, "allow_unknown": ["luck"]}', '{"version": 1, "max_temperature": "hot"}',
    ],
)  # fmt: skip
def test_a_policy_with_a_slip_is_refused_and_not_half_taken(text: str) -> None:
    with pytest.raises(MalformedMessage):
        IdlePolicy.from_tree(json.loads(text))


# Where the facts come from.


def test_a_host_tells_facts_by_name_and_nothing_is_known_before() -> None:
    host = HostStatus()
    assert host.read() == DeviceStatus()
    host.tell(idle=True, battery=0.4)
    host.tell(battery=None)
    assert host.read() == DeviceStatus(idle=True)
    for facts in ({"idel": True}, {"idle": 1}, {"battery": "full"}, {"battery": True}, {"utc_offset_minutes": None}):
        with pytest.raises(MalformedMessage):
            host.tell(**facts)


def test_a_status_file_is_followed_and_what_makes_no_sense_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    with pytest.raises(NotFound):
        FileStatus(path)
    path.write_text(json.dumps({"idle": True, "charging": True}))
    source = FileStatus(path)
    assert source.read() == DeviceStatus(idle=True, charging=True)
    for text in ('{"idle": false, "charging": true} ', '{"idle": tru', "[]"):
        path.write_text(text)
        expected = DeviceStatus(idle=False, charging=True) if "false" in text else DeviceStatus()
        assert source.read() == expected
    path.unlink()
    assert source.read() == DeviceStatus()


def supply(folder: Path, name: str, **files: str) -> None:
    (folder / name).mkdir(parents=True)
    for file, text in files.items():
        (folder / name / file).write_text(text + "\n")


def test_power_is_read_as_the_kernel_tells_it(tmp_path: Path) -> None:
    assert power(tmp_path / "nothing") == (True, None)
    desktop = tmp_path / "desktop"
    supply(desktop, "mouse", type="Battery", scope="Device", capacity="10", status="Discharging")
    assert power(desktop) == (True, None)
    away = tmp_path / "away"
    supply(away, "AC", type="Mains", online="0")
    supply(away, "BAT0", type="Battery", capacity="71", status="Discharging")
    assert power(away) == (False, 0.71)
    docked = tmp_path / "docked"
    supply(docked, "AC", type="Mains", online="1")
    supply(docked, "BAT0", type="Battery", capacity="40", status="Not charging")
    assert power(docked) == (True, 0.4)
    odd = tmp_path / "odd"
    supply(odd, "BAT0", type="Battery", status="Unknown")
    assert power(odd) == (None, None)


@pytest.mark.parametrize(
    ("answer", "metered"),
    [("", None), ("unknown\n", None), ("no (guessed)\nunknown\n", False), ("no\nyes (guessed)\n\n", True)],
)
def test_network_manager_is_believed_where_it_says_something(answer: str, metered: bool | None) -> None:
    assert metered_of(answer) is metered


def test_this_machine_says_what_it_can(tmp_path: Path) -> None:
    clock = SetClock()
    source = LinuxStatus(tmp_path, clock)
    status = source.read()
    assert status.idle is not None
    assert status.free_bytes is not None and status.free_bytes > 0
    assert source.read() is status
    clock.instant += 3
    assert source.read() is not status


def test_always_asks_nothing_of_the_machine() -> None:
    assert ALWAYS.verdict(DeviceStatus(), SOME, NOON) == Eligible()
