"""A round moves only as its page says, whatever order devices and time come in."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.server.driving import World, task
from umbel.clock import CLOCK_SLACK_SECONDS
from umbel.digests import digest_of
from umbel.errors import AlreadyReported, Conflict, NotFound, RoundClosed, WrongState
from umbel.identity import DeviceId
from umbel.plan import Kind
from umbel_models.zoo import bundle_path
from umbel_server import round_records
from umbel_server.round import (
    UPLOAD_GRACE_SECONDS,
    Base,
    Round,
    RoundKey,
    RoundState,
    Session,
    SessionState,
)

SEALED = digest_of(b"sealed")
BASE = Base(1, 1, digest_of(b"bundle"))


def fresh(goal: int = 2, minimum: int = 1, slots: int = 3) -> Round:
    return Round(
        RoundKey("task", 1), BASE, goal, minimum, slots, session_seconds=50.0, opened_at=0.0, due=60.0, deadline=100.0
    )


def joined(held: Round, name: str, now: float = 0.0) -> Round:
    return held.assign(f"s-{name}", DeviceId(name), "token", now)


def heard(held: Round, name: str, now: float = 1.0) -> Round:
    return held.receive(f"s-{name}", f"r-{name}", SEALED, 10, now)


def test_the_goal_closes_a_round_at_once_and_aborts_the_rest() -> None:
    held = joined(joined(joined(fresh(), "a"), "b"), "c")
    held = heard(heard(held, "b"), "a")
    assert held.state is RoundState.AGGREGATING
    assert [session.device for session in held.reports] == ["b", "a"]
    assert held.session("s-c").state is SessionState.ABORTED
    with pytest.raises(RoundClosed, match="too late"):
        held.admit("s-c", 2.0)
    with pytest.raises(RoundClosed):
        heard(held, "c")
    with pytest.raises(RoundClosed):
        joined(held, "d")


def test_a_round_opened_while_the_clock_was_ahead_ends_once_it_is_set_right() -> None:
    """Its deadline was years away, and nothing else ended it."""
    years = 1e8
    ahead = replace(fresh(goal=3, minimum=2), opened_at=years, due=years + 50, deadline=years + 100)
    assert ahead.close(years - CLOCK_SLACK_SECONDS) is ahead
    ended = ahead.close(0.0)
    assert (ended.state, ended.reason) == (
        RoundState.ABANDONED,
        "it was opened while this machine's clock was ahead",
    )
    reported = heard(heard(joined(joined(ahead, "a", years), "b", years), "a", years), "b", years)
    assert reported.close(0.0).state is RoundState.AGGREGATING, "what has come counts"


def test_a_round_takes_no_more_devices_than_it_has_slots() -> None:
    held = joined(joined(joined(fresh(), "a"), "b"), "c")
    with pytest.raises(RoundClosed):
        joined(held, "d")
    freed = held.fail("s-a", "not-finite", 1.0)
    assert joined(freed, "d").free_slots == 0


def test_a_device_that_asks_again_gets_a_new_session_in_place_of_its_open_one() -> None:
    held = joined(fresh(slots=1), "a").assign("again", DeviceId("a"), "token", 1.0)
    assert held.session("s-a").state is SessionState.ABORTED
    assert held.count(SessionState.ASSIGNED) == 1
    with pytest.raises(RoundClosed, match="superseded"):
        heard(held, "a")


@pytest.mark.parametrize("outcome", ["reported", "failed"])
def test_a_device_has_one_chance_in_a_round(outcome: str) -> None:
    held = joined(fresh(), "a")
    held = heard(held, "a") if outcome == "reported" else held.fail("s-a", "seal-broken", 1.0)
    assert not held.may_join(DeviceId("a"))
    with pytest.raises(RoundClosed):
        held.assign("again", DeviceId("a"), "token", 2.0)


def test_the_same_report_again_changes_nothing_and_another_one_is_refused() -> None:
    held = heard(joined(fresh(), "a"), "a")
    assert heard(held, "a") is held
    with pytest.raises(AlreadyReported):
        held.receive("s-a", "r-other", SEALED, 10, 2.0)


def test_a_report_may_begin_until_its_sessions_deadline_and_end_a_little_later() -> None:
    held = joined(fresh(), "a")
    assert held.admit("s-a", 50.0).deadline == 50.0
    with pytest.raises(RoundClosed, match="deadline"):
        held.admit("s-a", 50.1)
    assert held.expire(50.0 + UPLOAD_GRACE_SECONDS) is held
    assert heard(held, "a", 60.0).count(SessionState.REPORTED) == 1
    late = held.expire(50.1 + UPLOAD_GRACE_SECONDS)
    assert late.session("s-a").state is SessionState.EXPIRED
    with pytest.raises(RoundClosed):
        heard(late, "a")
    assert late.may_join(DeviceId("a"))


def test_no_session_outlasts_its_round() -> None:
    assert joined(fresh(), "a", now=90.0).session("s-a").deadline == 100.0
    with pytest.raises(RoundClosed):
        joined(fresh(), "a", now=100.0)


def test_once_due_the_minimum_is_enough_and_at_the_deadline_less_is_abandoned() -> None:
    empty = joined(fresh(goal=3, minimum=2), "a")
    one = heard(empty, "a")
    two = heard(joined(one, "b"), "b")
    assert two.close(59.9) is two
    assert two.close(60.0).state is RoundState.AGGREGATING
    assert one.close(99.9) is one
    abandoned = one.close(100.0)
    assert abandoned.state is RoundState.ABANDONED
    assert "1 of at least 2" in abandoned.reason
    assert abandoned.ended_at == 100.0


def test_unknown_sessions_are_not_found() -> None:
    with pytest.raises(NotFound):
        fresh().admit("s-x", 0.0)
    with pytest.raises(NotFound):
        heard(fresh(), "x")


def test_the_end_comes_in_order() -> None:
    closed = heard(joined(fresh(goal=1), "a"), "a")
    for jump in (
        lambda: closed.completed(2, 5.0),
        lambda: closed.abandon("why", 5.0),
        lambda: fresh().failed("x", 5.0),
    ):
        with pytest.raises(WrongState):
            jump()
    judged = closed.aggregated(10.0, {"examples": 10.0}, 2)
    assert judged.state is RoundState.VALIDATING
    done, refused = judged.completed(2, 5.0), judged.failed("worse", 5.0)
    assert (done.state, done.version, done.ended_at) == (RoundState.COMPLETED, 2, 5.0)
    assert (refused.state, refused.version, refused.reason) == (RoundState.FAILED, None, "worse")
    for over in (done, refused):
        assert over.state.is_over
        with pytest.raises(WrongState):
            over.failed("again", 6.0)


NAMES = st.sampled_from("abcdefg")
MOVES = {
    RoundState.COLLECTING: {RoundState.AGGREGATING, RoundState.ABANDONED},
    RoundState.AGGREGATING: {RoundState.VALIDATING, RoundState.FAILED},
    RoundState.VALIDATING: {RoundState.COMPLETED, RoundState.FAILED},
}


class AnyRound(RuleBasedStateMachine):
    """Devices, time and the coordinator in any order."""

    @initialize(goal=st.integers(1, 4), minimum=st.integers(1, 4), extra=st.integers(0, 3))
    def begin(self, goal: int, minimum: int, extra: int) -> None:
        self.now = 0.0
        self.held = fresh(goal, min(goal, minimum), goal + extra)
        self.drawn = 0
        self.counted: list[str] = []

    def move(self, after: Round) -> None:
        before = self.held
        if after.state is not before.state:
            assert after.state in MOVES[before.state]
        for known in before.sessions.values():
            new = after.sessions[known.id]
            if known.state is not SessionState.ASSIGNED:
                assert new == known, "a session that is over never changes"
        self.held = after

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.move(self.held.expire(self.now).close(self.now))

    @rule(name=NAMES)
    def device_asks(self, name: str) -> None:
        self.drawn += 1
        may = self.held.may_join(DeviceId(name)) and self.now < self.held.deadline
        try:
            self.move(self.held.assign(f"s-{self.drawn}", DeviceId(name), "token", self.now))
            assert may
        except RoundClosed:
            assert not may

    @rule(number=st.integers(1, 30), report=st.integers(0, 1))
    def device_reports(self, number: int, report: int) -> None:
        session, report_id = f"s-{number}", f"r-{number}-{report}"
        before = self.held
        try:
            after = before.receive(session, report_id, SEALED, 10, self.now)
        except (NotFound, Conflict):
            return
        if after is not before:
            self.counted.append(report_id)
        self.move(after)

    @rule(number=st.integers(1, 30))
    def report_is_bad(self, number: int) -> None:
        try:
            self.move(self.held.fail(f"s-{number}", "not-finite", self.now))
        except (NotFound, Conflict):
            return

    @precondition(lambda self: self.held.state is RoundState.AGGREGATING)
    @rule(accepted=st.booleans())
    def coordinator_judges(self, accepted: bool) -> None:
        self.move(self.held.aggregated(1.0, {}, 2))
        self.move(self.held.completed(2, self.now) if accepted else self.held.failed("worse", self.now))

    @invariant()
    def every_report_counts_once_and_in_order(self) -> None:
        assert [session.report_id for session in self.held.reports] == self.counted
        assert [session.sequence for session in self.held.reports] == list(range(len(self.counted)))
        assert len(self.counted) <= self.held.goal

    @invariant()
    def devices_and_slots_keep_their_bounds(self) -> None:
        busy = [s for s in self.held.sessions.values() if s.state in (SessionState.ASSIGNED, SessionState.REPORTED)]
        assert len(busy) <= self.held.slots
        assert len({session.device for session in busy}) == len(busy)

    @invariant()
    def what_is_over_holds_nothing_open(self) -> None:
        if self.held.state is not RoundState.COLLECTING:
            assert self.held.count(SessionState.ASSIGNED) == 0
            assert self.held.free_slots == 0
        if self.held.state is RoundState.COMPLETED:
            assert len(self.counted) >= self.held.minimum


AnyRound.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyRound = AnyRound.TestCase


def test_a_session_is_over_once() -> None:
    over = Session("s", DeviceId("a"), "t", 0.0, 1.0).ended(SessionState.FAILED, "why", 2.0)
    assert (over.state, over.detail, over.ended_at) == (SessionState.FAILED, "why", 2.0)


def test_rounds_of_one_number_are_each_tasks_own(small_world: World) -> None:
    """In the store: what is noted of one task's round changes nothing of another's, nor of its own evaluation."""
    (device,), operations = small_world.enrol("d"), small_world.coordinator.operations
    operations.add_model("second", bundle_path("smartwatch"), "operator:test")
    operations.create_task(replace(task(), name="a"), "operator:test")
    operations.create_task(replace(task(), name="b", population="others", model="second"), "operator:test")
    keys = (RoundKey("a", 1), RoundKey("b", 1), RoundKey("a", 2), RoundKey("a", 1, Kind.EVALUATE))
    with small_world.store.transaction() as connection:
        for place, key in enumerate(keys):
            opened = replace(fresh(), key=key, opened_at=-10.0 * place)
            round_records.open_round(connection, opened)
            after = opened.assign(f"s-{key}", DeviceId(device.id), "token", 0.0)
            after = after.receive(f"s-{key}", f"r-{key}", SEALED, 10, 3.0)
            round_records.save(connection, opened, after, 3.0)
        round_records.set_pending_state(connection, keys[0], SEALED)
        assert [round_records.pending_state(connection, key) for key in keys] == [SEALED, None, None, None]
        assert [round_records.load(connection, key).key for key in keys] == list(keys)  # type: ignore[union-attr]
        assert sorted(round_records.report_delays(connection, "a", Kind.TRAIN)) == [3.0, 23.0]
        assert round_records.report_delays(connection, "b", Kind.TRAIN) == [13.0]
        assert round_records.session_times(connection, "a", Kind.TRAIN) == [3.0, 3.0]
        # One that runs out of time would have taken longer; one that its round's end cut short says nothing.
        late = round_records.load(connection, keys[0])
        assert late is not None
        asked = late.assign("late", DeviceId("late"), "token", 4.0).assign("cut", DeviceId("cut"), "token", 40.0)
        round_records.save(connection, late, after := asked.expire(99.0), 99.0)
        round_records.save(connection, after, after.abandon("enough", 99.5), 99.5)
        assert after.session("late").state is SessionState.EXPIRED
        assert sorted(round_records.session_times(connection, "a", Kind.TRAIN)) == [3.0, 3.0, 50.0]
        assert sorted(round_records.report_delays(connection, "a", Kind.TRAIN)) == [3.0, 23.0]
