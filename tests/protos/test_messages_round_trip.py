"""Every value comes back from its message as it went in, through real bytes."""

from __future__ import annotations

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from tests.protos import strategies as draw
from umbel import fields, messages
from umbel.plan import Plan
from umbel.release import Release, SignedRelease
from umbel.update import Update
from umbel.v1 import device_pb2, release_pb2
from umbel.visit import CheckIn, CheckInReply, Outcome, ReleaseOutcome, ReportBegin, Retry, RetryWindow, SessionRecord
from umbel.weights import Weights


def over_the_wire(message: Message) -> Message:
    return messages.parse(type(message), message.SerializeToString())


@given(draw.plans)
def test_a_plan_comes_back(plan: Plan) -> None:
    message = over_the_wire(messages.plan_to_message(plan))
    assert isinstance(message, device_pb2.Plan)
    assert messages.plan_from_message(message) == plan


@given(draw.releases)
def test_a_release_comes_back(release: Release) -> None:
    assert messages.release_from_bytes(messages.release_to_bytes(release)) == release


@given(draw.signed_releases)
def test_a_signed_release_comes_back_byte_for_byte(signed: SignedRelease) -> None:
    message = over_the_wire(messages.signed_to_message(signed))
    assert isinstance(message, release_pb2.SignedRelease)
    assert messages.signed_from_message(message) == signed


@given(draw.check_ins)
def test_a_check_in_comes_back(check_in: CheckIn) -> None:
    message = over_the_wire(messages.check_in_to_message(check_in))
    assert isinstance(message, device_pb2.CheckInRequest)
    assert messages.check_in_from_message(message) == check_in


@given(draw.replies)
def test_the_answer_to_a_check_in_comes_back(answer: CheckInReply) -> None:
    message = over_the_wire(messages.check_in_reply_to_message(answer))
    assert isinstance(message, device_pb2.CheckInResponse)
    assert messages.check_in_reply_from_message(message) == answer


@given(draw.report_begins)
def test_the_question_before_an_upload_comes_back(begin: ReportBegin) -> None:
    message = over_the_wire(messages.report_begin_to_message(begin))
    assert isinstance(message, device_pb2.ReportBegin)
    assert messages.report_begin_from_message(message) == begin


@given(draw.updates)
def test_an_update_comes_back_to_the_last_bit(update: Update) -> None:
    again = messages.update_from_bytes(messages.update_to_bytes(update), update.delta.shapes, 1e6)
    assert again == update
    assert again.delta.to_vector().tobytes() == update.delta.to_vector().tobytes()


@given(draw.updates)
def test_equal_updates_have_equal_bytes_whatever_the_order_of_their_metrics(update: Update) -> None:
    turned = Update(update.delta, update.weight, dict(reversed(update.metrics.items())))
    assert messages.update_to_bytes(turned) == messages.update_to_bytes(update)


@given(st.text())
def test_whatever_an_error_says_a_device_can_tell_it(words: str) -> None:
    """A device whose error message is long or strange must not be refused at every later check-in."""
    check_in = CheckIn(
        "watch",
        ("onnx",),
        (),
        sessions=(SessionRecord("task", 1, "-*", words),),
        outcomes=(ReleaseOutcome("watch", 2, Outcome.FAILED, words * 300),),
    )
    told = messages.check_in_from_message(messages.check_in_to_message(check_in))
    assert told.sessions[0].error == fields.as_text(words)
    assert len(told.outcomes[0].reason) <= fields.MAX_TEXT


@given(st.text())
def test_whatever_a_coordinator_says_a_device_can_read_it(words: str) -> None:
    answer = messages.check_in_reply_to_message(CheckInReply(Retry(RetryWindow(1, 2), words)))
    read = messages.check_in_reply_from_message(answer).reply
    assert isinstance(read, Retry)
    assert read.reason == fields.as_text(words)


@pytest.mark.parametrize("words", ["", "plain", "Größe ≥ 3 µs", "火"])
def test_plain_words_stay_as_they_are(words: str) -> None:
    assert fields.as_text(words) == words


def test_fields_of_a_newer_peer_are_ignored() -> None:
    plan = Plan(epochs=3)
    unknown = bytes([(100 << 3) & 0x7F | 0x80, 100 << 3 >> 7, 42])  # field 100, varint 42
    message = messages.parse(device_pb2.Plan, messages.plan_to_message(plan).SerializeToString() + unknown)
    assert messages.plan_from_message(message) == plan


def test_maps_come_out_sorted_though_they_travel_in_no_order() -> None:
    """Whoever writes a decoded value down, in a database or an audit row, writes the same bytes at every run."""
    named = {f"h{number}": 1.0 for number in range(50)}
    plan = messages.plan_from_message(messages.plan_to_message(Plan(hyperparameters=named)))
    assert list(plan.hyperparameters) == sorted(named)
    body = messages.update_to_bytes(Update(Weights({}), 1.0, named))
    assert list(messages.update_from_bytes(body, {}, 1.0).metrics) == sorted(named)
