"""The rollout's transition table, from outside: what people and gates may do, and what they can't."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from umbel.errors import MalformedMessage, NotAllowed, OutOfBounds, WrongState
from umbel_server import rollout as steps
from umbel_server.gates import Decision, Finding, GatePolicy, Judgement
from umbel_server.json_text import from_text, to_text
from umbel_server.rollout import ALLOWED, Rollout, Stage
from umbel_server.rollout_spec import (
    ExperimentArm,
    OnFailure,
    Promotion,
    RolloutSpec,
    Wave,
    ladder,
    spec_from_tree,
    spec_to_tree,
)
from umbel_server.waves import bucket, release_for, takes, wave_of

AUTHOR, SECOND = "ada", "grace"
SPEC = RolloutSpec("shoulder", "stable", "clinic", release=4, from_release=3, revert_release=5)
DEVICES = [f"{index:032x}" for index in range(20_000)]
ENDED = {Stage.SUCCEEDED, Stage.ROLLED_BACK, Stage.DENIED, Stage.CANCELED, Stage.SUPERSEDED}


def _judgement(decision: Decision) -> Judgement:
    return Judgement(decision, (Finding("failures", decision, "as told by a test"),))


PASS, FAIL, UNSURE, MORE = (
    _judgement(decision) for decision in (Decision.PASS, Decision.FAIL, Decision.INCONCLUSIVE, Decision.CONTINUE)
)


def _waiting(spec: RolloutSpec = SPEC) -> Rollout:
    return steps.submit(steps.draft("r1", spec, AUTHOR, "salt", 0.0))


def _running(spec: RolloutSpec = SPEC) -> Rollout:
    return steps.start(steps.approve(_waiting(spec), SECOND, spec.subject), 1.0)


def test_a_good_release_climbs_every_wave_and_succeeds() -> None:
    rollout, seen = _running(), []
    while rollout.stage is Stage.RUNNING:
        assert rollout.share
        seen.append(rollout.share.percent)
        rollout = steps.judged(rollout, PASS, 2.0)
    assert seen == [1, 5, 25, 100]
    assert rollout.stage is Stage.SUCCEEDED


def test_each_wave_has_a_soak_time_of_its_own() -> None:
    rollout = steps.judged(_running(), PASS, 70.0)
    assert (rollout.wave, rollout.wave_opened_at, rollout.started_at) == (1, 70.0, 1.0)


def test_the_next_wave_does_not_open_while_a_gate_says_continue() -> None:
    rollout = _running()
    assert steps.judged(rollout, MORE, 2.0) == rollout


def test_a_failed_gate_rolls_back_by_itself_and_the_end_is_final() -> None:
    rollout = steps.judged(_running(), FAIL, 2.0)
    assert rollout.stage is Stage.ROLLING_BACK
    assert "as told by a test" in rollout.reason
    done = steps.reverted(rollout)
    assert done.stage is Stage.ROLLED_BACK
    with pytest.raises(WrongState):
        steps.resume(done, SECOND, 3.0)


def test_a_failed_gate_pauses_where_the_policy_says_so_and_only_a_second_person_resumes() -> None:
    spec = dataclasses.replace(SPEC, on_failure=OnFailure.PAUSE)
    rollout = steps.judged(_running(spec), FAIL, 2.0)
    assert rollout.stage is Stage.PAUSED
    with pytest.raises(NotAllowed):
        steps.resume(rollout, AUTHOR, 3.0)
    assert steps.resume(rollout, SECOND, 3.0).stage is Stage.RUNNING


def test_an_inconclusive_gate_pauses() -> None:
    assert steps.judged(_running(), UNSURE, 2.0).stage is Stage.PAUSED


def test_a_person_who_paused_may_resume_the_same_wave() -> None:
    rollout = steps.judged(_running(), PASS, 2.0)
    again = steps.resume(steps.pause(rollout, "lunch"), AUTHOR, 9.0)
    assert (again.wave, again.stage, again.wave_opened_at) == (1, Stage.RUNNING, 9.0)


def test_a_manual_wave_waits_for_a_second_person() -> None:
    spec = dataclasses.replace(SPEC, waves=ladder(promotion=Promotion.MANUAL))
    rollout = steps.judged(_running(spec), PASS, 2.0)
    assert rollout.stage is Stage.AWAITING_PROMOTION
    with pytest.raises(NotAllowed):
        steps.promote(rollout, AUTHOR, 3.0)
    assert steps.promote(rollout, SECOND, 3.0).wave == 1


def test_promoting_a_wave_whose_gate_has_not_passed_is_refused() -> None:
    with pytest.raises(WrongState):
        steps.promote(_running(), SECOND, 3.0)


def test_an_author_cannot_approve_his_own_rollout() -> None:
    with pytest.raises(NotAllowed):
        steps.approve(_waiting(), AUTHOR, SPEC.subject)


def test_the_last_editor_cannot_approve_either() -> None:
    edited = steps.submit(steps.edit(_waiting(), dataclasses.replace(SPEC, lab=("x",)), SECOND))
    with pytest.raises(NotAllowed):
        steps.approve(edited, SECOND, edited.spec.subject)


def test_the_author_cannot_approve_what_somebody_else_edited() -> None:
    edited = steps.submit(steps.edit(_waiting(), dataclasses.replace(SPEC, lab=("x",)), SECOND))
    with pytest.raises(NotAllowed):
        steps.approve(edited, AUTHOR, edited.spec.subject)
    assert steps.approve(edited, "operator:third", edited.spec.subject).stage is Stage.SCHEDULED


def test_an_approval_is_void_after_an_edit() -> None:
    approved = steps.approve(_waiting(), SECOND, SPEC.subject)
    edited = steps.edit(approved, dataclasses.replace(SPEC, release=6, revert_release=7), AUTHOR)
    assert (edited.stage, edited.approved_by) == (Stage.DRAFT, "")
    with pytest.raises(WrongState):
        steps.start(edited, 1.0)


def test_an_approval_of_something_else_is_refused() -> None:
    other = dataclasses.replace(SPEC, gate=GatePolicy(alpha=0.4))
    with pytest.raises(WrongState, match="looked at"):
        steps.approve(_waiting(), SECOND, other.subject)


def test_a_rollout_changed_behind_its_approval_does_not_start() -> None:
    approved = steps.approve(_waiting(), SECOND, SPEC.subject)
    tampered = dataclasses.replace(approved, spec=dataclasses.replace(SPEC, release=9, revert_release=10))
    with pytest.raises(WrongState, match="approved"):
        steps.start(tampered, 1.0)


def test_a_denied_rollout_stays_denied() -> None:
    denied = steps.deny(_waiting(), SECOND, "not on a Friday")
    assert "not on a Friday" in denied.reason
    with pytest.raises(WrongState):
        steps.submit(denied)


def test_a_scheduled_rollout_does_not_start_early() -> None:
    spec = dataclasses.replace(SPEC, start_at=100.0)
    scheduled = steps.approve(_waiting(spec), SECOND, spec.subject)
    with pytest.raises(WrongState):
        steps.start(scheduled, 99.0)
    assert steps.start(scheduled, 100.0).stage is Stage.RUNNING


def test_one_person_stops_a_rollout_from_every_stage_under_way() -> None:
    manual = dataclasses.replace(SPEC, waves=ladder(promotion=Promotion.MANUAL))
    for rollout in (_running(), steps.judged(_running(manual), PASS, 2.0), steps.pause(_running(), "")):
        assert steps.abort(rollout, "stop", 9.0).stage is Stage.ROLLING_BACK


def test_a_rollout_that_succeeded_can_still_be_rolled_back() -> None:
    spec = dataclasses.replace(SPEC, waves=(Wave(100.0),))
    rollout = steps.judged(_running(spec), PASS, 2.0)
    assert steps.roll_back(rollout, "a user called", 9.0).stage is Stage.ROLLING_BACK


def test_an_experiment_ends_only_when_a_person_ends_it() -> None:
    arms = (ExperimentArm(3, 1.0), ExperimentArm(4, 1.0))
    spec = dataclasses.replace(SPEC, waves=(Wave(100.0),), arms=arms, from_release=2)
    assert steps.judged(_running(spec), PASS, 2.0).stage is Stage.AWAITING_PROMOTION


def test_somebody_elses_change_in_between_is_noticed() -> None:
    rollout = _running()
    steps.require_revision(rollout, rollout.revision)
    with pytest.raises(WrongState, match="look again"):
        steps.require_revision(steps.pause(rollout, ""), rollout.revision)


@pytest.mark.parametrize(
    "changes",
    [
        {"waves": ()},
        {"waves": (Wave(5.0), Wave(5.0))},
        {"waves": (Wave(25.0), Wave(5.0))},
        {"waves": (Wave(0.0, lab=True), Wave(100.0))},
        {"waves": (Wave(0.0, lab=True),), "lab": ("a" * 32,)},
        {"release": 3},
        {"revert_release": 4},
        {"hold_back_percent": 100.0},
        {"arms": (ExperimentArm(4, 1.0),)},
        {"arms": (ExperimentArm(4, 1.0), ExperimentArm(4, 1.0))},
        {"arms": (ExperimentArm(3, 1.0), ExperimentArm(4, 1.0))},
        {"arms": (ExperimentArm(4, 1.0), ExperimentArm(5, 1.0))},
        {"arms": (ExperimentArm(4, 1.0), ExperimentArm(2, float("inf"))), "from_release": 1},
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(OutOfBounds):
        dataclasses.replace(SPEC, **changes)  # type: ignore[arg-type]


def test_waves_of_nobody_and_of_too_many_are_refused() -> None:
    for percent in (0.0, -1.0, 100.5, float("nan")):
        with pytest.raises(OutOfBounds):
            Wave(percent)


# Who belongs to which wave.


@pytest.mark.parametrize(
    ("soak", "deadline"), [(-1.0, 10.0), (11.0, 10.0), (1.0, float("inf")), (float("nan"), 10.0), (1.0, float("nan"))]
)
def test_a_wave_whose_times_make_no_sense_is_refused(soak: float, deadline: float) -> None:
    with pytest.raises(OutOfBounds):
        Wave(5.0, soak_seconds=soak, deadline_seconds=deadline)


def test_waves_are_nested_sticky_and_of_the_size_they_say() -> None:
    rollout, before = _running(), set[str]()
    while rollout.stage is Stage.RUNNING:
        now = {device for device in DEVICES if takes(rollout, device)}
        assert before <= now
        assert rollout.share
        assert len(now) / len(DEVICES) == pytest.approx(rollout.share.percent / 100, abs=0.01)
        rollout, before = steps.judged(rollout, PASS, 2.0), now
    assert before == set(DEVICES)


def test_two_rollouts_choose_independently() -> None:
    first, second = (dataclasses.replace(_running(), salt=salt, wave=1) for salt in ("a", "b"))
    both = [device for device in DEVICES if takes(first, device) and takes(second, device)]
    assert len(both) == pytest.approx(50, abs=25), "a twentieth of a twentieth"


def test_a_held_back_device_is_in_no_wave() -> None:
    rollout = _running(dataclasses.replace(SPEC, hold_back_percent=10.0, waves=(Wave(100.0),)))
    outside = [device for device in DEVICES if wave_of(rollout, device) is None]
    assert len(outside) / len(DEVICES) == pytest.approx(0.1, abs=0.01)


def test_a_lab_wave_takes_the_lab_alone() -> None:
    spec = dataclasses.replace(SPEC, waves=(Wave(0.0, lab=True), Wave(5.0), Wave(100.0)), lab=(DEVICES[3],))
    rollout = _running(spec)
    assert [device for device in DEVICES if takes(rollout, device)] == [DEVICES[3]]


def test_devices_outside_the_group_are_in_no_wave() -> None:
    spec = dataclasses.replace(SPEC, waves=(Wave(100.0),), only=(DEVICES[1], DEVICES[2]))
    rollout = _running(spec)
    assert [device for device in DEVICES if takes(rollout, device)] == [DEVICES[1], DEVICES[2]]


def test_the_places_of_known_devices_never_change() -> None:
    """Golden: every language's server must agree."""
    assert [bucket("salt", DEVICES[index]) for index in range(4)] == GOLDEN_BUCKETS


GOLDEN_BUCKETS = [7363, 1820, 9818, 1105]


def test_an_experiment_splits_devices_by_weight() -> None:
    arms = (ExperimentArm(4, 3.0), ExperimentArm(5, 1.0))
    spec = dataclasses.replace(SPEC, waves=(Wave(100.0),), arms=arms, release=5, revert_release=6)
    rollout = _running(spec)
    share = sum(release_for(rollout, device) == 4 for device in DEVICES) / len(DEVICES)
    assert share == pytest.approx(0.75, abs=0.02)


# As JSON.


def test_a_spec_comes_back_from_json_as_it_went() -> None:
    spec = dataclasses.replace(
        SPEC,
        waves=(Wave(0.0, lab=True), Wave(50.0, promotion=Promotion.MANUAL), Wave(100.0)),
        lab=("a", "b"),
        arms=(ExperimentArm(4, 1.0), ExperimentArm(3, 2.0)),
        from_release=2,
        on_failure=OnFailure.PAUSE,
    )
    assert spec_from_tree(from_text(to_text(spec_to_tree(spec)))) == spec
    rollout = steps.pause(_running(spec), "x")
    assert steps.rollout_from_tree(from_text(to_text(steps.rollout_to_tree(rollout)))) == rollout


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"model": 3},
        spec_to_tree(SPEC) | {"wave": []},
        spec_to_tree(SPEC) | {"release": "4"},
        spec_to_tree(SPEC) | {"release": True},
        spec_to_tree(SPEC) | {"waves": [{"percent": "all"}]},
        spec_to_tree(SPEC) | {"waves": 7},
        spec_to_tree(SPEC) | {"gate": {"alfa": 1}},
        spec_to_tree(SPEC) | {"on_failure": "shrug"},
        spec_to_tree(SPEC) | {"only": "a" * 32},
        spec_to_tree(SPEC) | {"lab": [7]},
    ],
)
def test_json_that_is_no_spec_is_refused(tree: dict[str, object]) -> None:
    with pytest.raises(MalformedMessage):
        spec_from_tree(tree)


# At random.


ACTIONS: dict[str, Callable[[Rollout, str], Rollout]] = {
    "edit": lambda r, who: steps.edit(r, r.spec, who),
    "submit": lambda r, who: steps.submit(r),
    "approve": lambda r, who: steps.approve(r, who, r.spec.subject),
    "deny": lambda r, who: steps.deny(r, who, ""),
    "cancel": lambda r, who: steps.cancel(r),
    "start": lambda r, who: steps.start(r, 1.0),
    "promote": lambda r, who: steps.promote(r, who, 1.0),
    "pause": lambda r, who: steps.pause(r, ""),
    "resume": lambda r, who: steps.resume(r, who, 1.0),
    "abort": lambda r, who: steps.abort(r, "", 9.0),
    "roll back": lambda r, who: steps.roll_back(r, "", 9.0),
    "finish rolling back": lambda r, who: steps.reverted(r),
    "supersede": lambda r, who: steps.supersede(r, "r2"),
    "judge": lambda r, who: steps.judged(r, {"ada": PASS, "grace": FAIL}.get(who, UNSURE), 1.0),
}


class AnyoneDoesAnything(RuleBasedStateMachine):
    """Whatever is tried, by whomever: no offer without a second person's approval, and no way out of an end."""

    @initialize(manual=st.booleans(), back=st.booleans())
    def begin(self, manual: bool, back: bool) -> None:
        waves = (Wave(10.0, promotion=Promotion.MANUAL if manual else Promotion.AUTOMATIC), Wave(100.0))
        self.spec = dataclasses.replace(SPEC, waves=waves, on_failure=OnFailure.ROLL_BACK if back else OnFailure.PAUSE)
        self.rollout = steps.draft("r1", self.spec, AUTHOR, "salt", 0.0)

    @rule(action=st.sampled_from(sorted(ACTIONS)), who=st.sampled_from([AUTHOR, SECOND, "linus"]))
    def act(self, action: str, who: str) -> None:
        before = self.rollout
        try:
            self.rollout = ACTIONS[action](before, who)
        except (WrongState, NotAllowed):
            assert self.rollout is before
            return
        assert before.stage in ALLOWED[action]
        assert self.rollout.revision > before.revision
        if before.stage in ENDED:
            assert (before.stage, self.rollout.stage) == (Stage.SUCCEEDED, Stage.ROLLING_BACK)
        if before.wave != self.rollout.wave:
            assert self.rollout.wave == before.wave + 1

    @invariant()
    def nothing_is_offered_that_one_person_alone_let_go(self) -> None:
        if self.rollout.offers:
            assert self.rollout.approved_by not in ("", self.rollout.author, self.rollout.last_editor)
            assert self.rollout.approved_subject == self.rollout.spec.subject


TestAnyoneDoesAnything = AnyoneDoesAnything.TestCase
TestAnyoneDoesAnything.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.text(max_size=20), st.text(max_size=40))
def test_every_device_has_a_place(salt: str, device: str) -> None:
    assert 0 <= bucket(salt, device) < 10_000


def test_what_a_spec_lacks_is_named_in_its_own_words() -> None:
    with pytest.raises(MalformedMessage, match="a rollout's spec lacks channel, release"):
        spec_from_tree({"model": "m", "population": "p", "from_release": 1, "revert_release": 3})
