"""The fleet engine: the same seed is the same run, bit for bit; rounds, privacy and rollouts run in it as they are."""

from __future__ import annotations

import base64
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.protos.examples import WORK
from tests.server.test_round import fresh, heard, joined
from tests.simulations import fleets
from umbel.bundle import Bundle
from umbel.clock import SystemClock
from umbel.errors import OutOfBounds
from umbel.messages import check_in_reply_to_message
from umbel.randomness import generator
from umbel.visit import Assignment
from umbel.weights import Weights
from umbel_server.privacy_ledger import epsilon
from umbel_server.round import RoundState
from umbel_simulations.fleet import virtual_time
from umbel_simulations.fleet.engine import require_room
from umbel_simulations.fleet.homes import Packed
from umbel_simulations.fleet.house import House
from umbel_simulations.fleet.member import Member
from umbel_simulations.fleet.results import _rollout, _spending
from umbel_simulations.fleet.rollouts import Played, noisy
from umbel_simulations.fleet.sessions import Tally, tally
from umbel_simulations.outcome import RolloutEvent, RoundOutcome, from_json, to_json
from umbel_simulations.report.page import render
from umbel_simulations.scenario import PrivacyPart
from umbel_simulations.world import Adversary, Crash, Faults, RolloutPlan, Switches


@pytest.fixture(autouse=True)
def _every_work_on_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what takes no time."""
    monkeypatch.setattr(virtual_time, "WORTHWHILE", 0.0)


def test_two_workers_tell_what_one_tells_bit_for_bit(tiny_bundle: Bundle, tmp_path: Path) -> None:
    told = fleets.everything(fleets.home_of(tiny_bundle))
    told = replace(told, rollouts=(), hours=0.6, task=replace(told.task, rounds=2))
    one, two = (fleets.played(told, tmp_path, workers) for workers in (1, 2))
    assert one.canonical() == two.canonical()
    assert {"coordinator killed", "lost", "late"} <= set(one.faults)


@pytest.mark.slow
def test_any_number_of_workers_tells_the_same_run_bit_for_bit(tiny_bundle: Bundle, tmp_path: Path) -> None:
    told = fleets.everything(fleets.home_of(tiny_bundle))
    one, four = (fleets.played(told, tmp_path, workers) for workers in (1, 4))
    assert one.canonical() == four.canonical()
    assert {"coordinator killed", "helper cut off", "lost", "late", "duplicated", "overtaken"} <= set(one.faults)
    assert one.rollouts
    # Two of them, in another process with another hash seed, in which sets have another order.
    program = (
        "import sys; from pathlib import Path; from tests.simulations import fleets; "
        "print(fleets.played(fleets.everything(Path(sys.argv[1])), Path(sys.argv[2]), 2).digest())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", program, told.model, str(tmp_path)],
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert elsewhere.stdout.strip() == str(one.digest())


@pytest.mark.slow
def test_another_seed_tells_another_run(tiny_bundle: Bundle, tmp_path: Path) -> None:
    told = fleets.scenario(fleets.home_of(tiny_bundle))
    assert fleets.played(told, tmp_path).digest() != fleets.played(replace(told, seed=4), tmp_path).digest()


def test_what_was_spent_stays_spent_in_a_round_that_came_to_nothing() -> None:
    told = [RoundOutcome(number, "accepted", 0.0, 1.0, 1, 1) for number in (1, 2, 3, 4)]
    spent = [one.epsilon for one in _spending(told, {1: 0.5, 3: 0.75, 4: math.inf})]
    assert spent == [0.5, 0.5, 0.75, 0.0], "without noise there is no bound that could be told"


def test_a_run_ends_when_its_hours_are_over_though_devices_are_at_work(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """How long they would have worked on is no time in which rounds begin and end without them."""
    slow = fleets.population(examples_per_second=0.01)
    found = fleets.played(fleets.scenario(fleets.home_of(tiny_bundle), population=slow, hours=0.25), tmp_path)
    assert 0 < found.trained < found.sessions, "who is at work for the round that is open has wasted nothing yet"
    assert found.hours == max(one.closed_hour for one in found.rounds) == 0.25


def test_a_run_before_anybody_has_looked_in_has_an_outcome_and_a_page(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """Devices that look in once in a hundred hours don't all do so at its beginning."""
    rare = fleets.population(check_in_hours=100.0)
    told = fleets.scenario(fleets.home_of(tiny_bundle), population=rare, hours=0.1, rollouts=(RolloutPlan(5.0),))
    found = fleets.played(told, tmp_path)
    assert (found.sessions, found.wasted_share, found.dropped_share) == (0, None, None)
    assert found.accuracy == found.first_accuracy is not None
    assert [one.ending for one in found.rollouts] == ["not-begun"]
    assert from_json(to_json(found)) == (found, None)
    assert "not-begun" in render(found)


def test_what_devices_did_for_rounds_that_came_to_nothing_was_wasted(tiny_bundle: Bundle, tmp_path: Path) -> None:
    told = fleets.scenario(fleets.home_of(tiny_bundle), population=fleets.population(devices=2), hours=1.0)
    found = fleets.played(replace(told, faults=Faults(crashes=(Crash("leader"),))), tmp_path)
    assert found.faults == {}, "it dies with a sum in its hands, or not at all"
    given_up = [one.reported for one in found.rounds if one.verdict == "abandoned"]
    assert not any(one.verdict == "accepted" for one in found.rounds), "three are the fewest"
    assert found.wasted == sum(given_up) > 0
    assert found.trained - found.wasted <= 2, "the round that was open at the end"
    assert [hour.available for hour in found.hourly] == [2], "the second hour never began"


@pytest.mark.slow
def test_who_was_taken_away_at_work_has_wasted_it_though_it_could_not_tell_yet(
    tiny_bundle: Bundle, tmp_path: Path
) -> None:
    """The run ends while most of them are still away: their sessions stand in their homes alone."""
    people = fleets.population(devices=60, drop_out=0.4, examples_per_second=1.0)
    told = fleets.scenario(fleets.home_of(tiny_bundle), population=people)
    task = replace(told.task, goal=20, minimum=5, rounds=3, over_selection=1.5)
    found = fleets.played(replace(told, task=task), tmp_path)
    counted = sum(one.reported for one in found.rounds)
    assert found.trained == counted + found.wasted <= found.sessions
    assert sum(found.shapes.values()) < found.sessions, "some have not come back"
    assert found.dropped >= 0.8 * found.faults["taken away"] > 0
    assert found.wasted >= found.dropped * 0.9


def holding(session: str, **homes: str) -> Member:
    """A device that hasn't ended a session; `cut_off` or `home` names where that stands, and its shape."""
    assert isinstance(WORK.reply, Assignment)
    answer = check_in_reply_to_message(replace(WORK, reply=replace(WORK.reply, session_id=session)))
    told = {"assignment": base64.b64encode(answer.SerializeToString()).decode()}
    packed = {
        where: Packed((("session/session.json", json.dumps(told | {"shape": shape}).encode()),))
        for where, shape in homes.items()
    }
    return Member(0, None, **packed)  # type: ignore[arg-type]


def test_a_session_is_judged_by_what_became_of_it_and_of_its_round() -> None:
    open_now = heard(joined(joined(fresh(), "heard"), "at-work"), "heard")
    accepted, refused = (heard(joined(joined(fresh(), name), "taken"), name) for name in ("counted", "in-vain"))
    rounds = (open_now, replace(accepted, state=RoundState.COMPLETED), replace(refused, state=RoundState.FAILED))
    members = (
        holding("s-heard", home="-v[]+"),
        holding("s-at-work", cut_off="-v["),
        holding("s-taken", cut_off="-v[", home="-"),
    )
    # One that was interrupted and came back in time counts; one that only checked in was none.
    shapes = {"-v[]+^": 2, "-v[!": 1, "-v[!]+^": 1, "-v": 3}
    found = tally(members, [{"shapes": shapes}, {}], rounds, lambda member: True)
    assert found == Tally(dict(sorted(shapes.items())), trained=4 + 2, wasted=4, dropped=1 + 1)


def test_energy_is_what_work_and_traffic_take(tiny_bundle: Bundle, tmp_path: Path) -> None:
    people = fleets.population(watts=3.0, joules_per_megabyte_up=5e5, joules_per_megabyte_down=2e5)
    told = fleets.scenario(fleets.home_of(tiny_bundle), population=people)
    found = fleets.played(replace(told, task=replace(told.task, rounds=1)), tmp_path).per_device
    wanted = 3.0 * found["seconds"].mean + 0.5 * found["bytes_up"].mean + 0.2 * found["bytes_down"].mean
    assert found["joules"].mean == pytest.approx(wanted)
    assert min(found[name].mean for name in ("seconds", "bytes_up", "bytes_down")) > 0


@pytest.mark.slow
def test_what_a_scenario_switches_off_is_off(tiny_bundle: Bundle, tmp_path: Path) -> None:
    people = fleets.population(examples_per_second=1.0, check_in_hours=0.05)
    told = fleets.scenario(fleets.home_of(tiny_bundle), population=people)
    told = replace(told, task=replace(told.task, over_selection=2.0))
    switches = (Switches(), Switches(pace_steering=False), Switches(abort_before_upload=False))
    on, unsteered, unasked = (fleets.played(replace(told, server=one), tmp_path) for one in switches)
    assert sum(hour.check_ins for hour in unsteered.hourly) != sum(hour.check_ins for hour in on.hourly)
    assert 1.1 * on.bytes_up < unasked.bytes_up
    calm = fleets.scenario(fleets.home_of(tiny_bundle))
    calm = replace(calm, task=replace(calm.task, rounds=1))
    asked, not_asked = (fleets.played(replace(calm, server=one), tmp_path).bytes_up for one in switches[::2])
    assert not_asked == pytest.approx(asked, rel=0.02), "where all are wanted, as much goes up"
    for switch in (Switches(), Switches(adaptive_deadline=False)):
        often = replace(told, server=switch, population=fleets.population(check_in_hours=0.005))
        house = House(tmp_path / str(switch), often, SystemClock(), Counter(), [])
        assert house._settings.adaptive_deadlines is switch.adaptive_deadline
        assert (house._settings.pace_shortest_seconds, house._settings.pace_idle_seconds) == (18.0, 18.0)
        house.close()


def test_noise_is_as_large_as_was_asked_beside_the_weights_themselves() -> None:
    weights = Weights({"small": np.linspace(-1e-3, 1e-3, 4000, dtype=np.float32), "still": np.ones(4000, np.float32)})
    moved = noisy(weights, 0.5, generator(1, "noise")) - weights
    assert np.std(moved["small"]) == pytest.approx(0.5 * np.std(weights["small"]), rel=0.1)
    assert np.std(moved["still"]) == pytest.approx(0.5, rel=0.1), "what doesn't vary counts as varying by one"


def test_a_fleet_that_would_fill_the_memory_is_refused_before_it_does() -> None:
    require_room(100_000, 1 << 30)
    with pytest.raises(OutOfBounds, match=r"10,000,000 devices take 30 GB or more, and this machine has 8 GB"):
        require_room(10_000_000, 8_000_000_000)


def test_privacy_is_reported_as_it_was_spent_round_by_round(tiny_bundle: Bundle, tmp_path: Path) -> None:
    privacy = PrivacyPart(on=True, noise_multiplier=4.0, metric_bound=10.0, rounds_per_device=2)
    told = fleets.scenario(fleets.home_of(tiny_bundle))
    found = fleets.played(replace(told, task=replace(told.task, privacy=privacy)), tmp_path)
    settings = replace(told, task=replace(told.task, privacy=privacy)).server_task().privacy
    wanted = [epsilon([4.0] * rounds, settings) for rounds in (1, 2, 2, 2)]
    assert [one.epsilon for one in found.rounds] == pytest.approx(wanted)
    assert found.epsilon == found.rounds[-1].epsilon > 0


def test_private_rounds_learn_what_open_ones_learn(tiny_bundle: Bundle, tmp_path: Path) -> None:
    told = fleets.scenario(fleets.home_of(tiny_bundle))
    private = replace(told, task=replace(told.task, privacy=PrivacyPart(on=True)))
    in_the_open, in_secret = fleets.played(told, tmp_path), fleets.played(private, tmp_path)
    assert in_the_open.shapes == in_secret.shapes == {"-v[]+^": 24}
    assert [one.verdict for one in in_the_open.rounds] == ["accepted"] * 4
    assert in_the_open.accuracy is not None
    assert in_the_open.first_accuracy is not None
    assert in_the_open.accuracy > in_the_open.first_accuracy + 0.3
    losses = ([one.loss for one in outcome.rounds] for outcome in (in_the_open, in_secret))
    for plain, secret in zip(*losses, strict=True):
        assert plain == pytest.approx(secret, rel=0.02)


@pytest.mark.slow
def test_a_good_release_reaches_everybody_and_a_broken_one_is_taken_back(tiny_bundle: Bundle, tmp_path: Path) -> None:
    good = RolloutPlan(0.5, waves=fleets.WAVES, gate=fleets.GATE)
    broken = replace(good, at_hour=2.5, content="unloadable")
    told = fleets.scenario(fleets.home_of(tiny_bundle), hours=6.0, rollouts=(good, broken))
    first, second = fleets.played(told, tmp_path).rollouts
    assert (first.ending, first.devices_reached, first.devices_left) == ("completed", fleets.USERS, fleets.USERS)
    assert (second.ending, second.devices_left) == ("rolled-back", 0)
    assert second.devices_reached < fleets.USERS


REFUSED = {"sign-flip": set(), "label-flip": set(), "lazy": set(), "nan": {"not-finite"}, "replay": {"seal-broken"}}


@pytest.mark.parametrize(("left", "cleared"), [(0, 3.0), (2, None)])
def test_a_release_that_some_devices_were_left_on_was_never_cleared(left: int, cleared: float | None) -> None:
    """A rollback ends at its deadline too: what `roll_back_hours` asks for isn't shown by that."""
    played = Played(RolloutPlan(1.0, content="slow"), "rollout-1", started=1.0, ended=3.0, stage="rolled-back")
    played.events.append(RolloutEvent(3.0, f"rolled-back: fail\ndevices left on it: {left}"))
    assert _rollout(played, {}).cleared_hour == cleared


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind not in ("nan", "replay") else kind for kind in REFUSED]
)
def test_liars_spoil_the_outcome_or_are_refused(tiny_bundle: Bundle, tmp_path: Path, kind: str) -> None:
    liars = (Adversary(kind, 0.4),)  # type: ignore[arg-type]
    told = fleets.scenario(fleets.home_of(tiny_bundle), adversaries=liars)
    found = fleets.played(told, tmp_path)
    assert set(found.refusals) == REFUSED[kind]
    assert found.accuracy is not None
    assert (found.accuracy > 0.5) == bool(REFUSED[kind])


IN_SECRET = {"sign-flip": "", "nan": "seal-broken", "replay": "malformed-message"}


@pytest.mark.parametrize("kind", ["sign-flip", *(pytest.param(k, marks=pytest.mark.slow) for k in ("replay", "nan"))])
def test_in_a_private_round_a_wrong_report_is_refused_and_a_wrong_direction_is_not_seen(
    tiny_bundle: Bundle, tmp_path: Path, kind: str
) -> None:
    told = fleets.scenario(fleets.home_of(tiny_bundle), adversaries=(Adversary(kind, 0.4),))  # type: ignore[arg-type]
    found = fleets.played(replace(told, task=replace(told.task, privacy=PrivacyPart(on=True))), tmp_path)
    assert [one.verdict for one in found.rounds] == ["accepted"] * 4
    assert " ".join(found.refusals) == IN_SECRET[kind]
    assert found.accuracy is not None
    assert (found.accuracy > 0.5) == bool(IN_SECRET[kind])


@pytest.mark.slow
def test_a_scaled_update_is_clipped_on_the_device_or_refused_by_the_server(tiny_bundle: Bundle, tmp_path: Path) -> None:
    told = fleets.scenario(fleets.home_of(tiny_bundle), adversaries=(Adversary("scaling", 0.4, factor=1000.0),))
    clipped = fleets.played(told, tmp_path)
    assert clipped.refusals == {}
    assert (clipped.accuracy or 0.0) > 0.6
    loose = replace(told, task=replace(told.task, plan=replace(told.task.plan, clip_norm=0.0)))
    unbounded = fleets.played(loose, tmp_path)
    assert set(unbounded.refusals) == {"out-of-bounds"}
    assert [one.verdict for one in unbounded.rounds] == ["accepted"] * 4
    # Only honest devices' reports count: the model is the better for it.
    assert unbounded.accuracy is not None
    assert unbounded.first_accuracy is not None
    assert unbounded.accuracy > unbounded.first_accuracy + 0.1
