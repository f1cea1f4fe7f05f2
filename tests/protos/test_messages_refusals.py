"""What a decoder must not let through, one attack a case, with the error that each must give.

A case takes a good message, spoils it in one way, and names the error. The good one is decoded first in every case, so
that a refusal can only come from what was spoilt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from google.protobuf.message import Message

from tests.protos import examples
from umbel import messages
from umbel.errors import MalformedMessage, NotFinite, OutOfBounds, UmbelError, WeightsMismatch
from umbel.release import Release
from umbel.update import Update
from umbel.v1 import device_pb2 as pb
from umbel.v1 import release_pb2

Spoil = Callable[[Any], object]
M = TypeVar("M", bound=Message)

BAD_NAMES = ["", "..", ".", "../../etc/passwd", "a/b", "a\\b", "-rf", "a b", "a\n", "a\0", "é", "x" * 101]
BAD_TEXTS = ["line\nline", "\x1b[2J", "\0", "a\u202eb", "\x7f"]
BAD_DIGESTS = ["", "ab", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "../" + "0" * 61, "0" * 63 + "\n"]
BAD_REPORT_IDS = ["", "0" * 31, "0" * 33, "A" * 32, "../" + "0" * 29, "0" * 31 + "\n"]
TOO_MANY = 257


def put(field: str, value: object) -> Spoil:
    """Replace one field, given by its dotted path."""

    def spoil(message: Any) -> None:
        *path, last = field.split(".")
        for step in path:
            message = getattr(message, step)
        setattr(message, last, value)

    spoil.__name__ = f"{field}={value!r:.20}"
    return spoil


def drop(field: str) -> Spoil:
    """Leave one part out."""

    def spoil(message: Any) -> None:
        *path, last = field.split(".")
        for step in path:
            message = getattr(message, step)
        message.ClearField(last)

    spoil.__name__ = f"without {field}"
    return spoil


def refuse(good: M, decode: Callable[[M], object], spoil: Spoil, error: type[UmbelError]) -> None:
    decode(good)
    spoil(good)
    with pytest.raises(error) as caught:
        decode(messages.parse(type(good), good.SerializeToString()))
    assert type(caught.value) is error
    assert str(caught.value)


def many_entries(field: str, entry: object) -> Spoil:
    def spoil(message: Any) -> None:
        *path, last = field.split(".")
        for step in path:
            message = getattr(message, step)
        getattr(message, last).extend([entry] * TOO_MANY)

    spoil.__name__ = f"too many {field}"
    return spoil


# Check-ins.


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        *((put("population", name), MalformedMessage) for name in BAD_NAMES),
        *((put("channel", name), MalformedMessage) for name in BAD_NAMES),
        *((lambda m, n=name: m.capabilities.runtimes.append(n), MalformedMessage) for name in BAD_NAMES),
        *((lambda m, d=digest: m.held_bundles.append(d), MalformedMessage) for digest in BAD_DIGESTS),
        *((put("sdk", words), MalformedMessage) for words in BAD_TEXTS),
        *((lambda m, w=words: m.capabilities.suites.append(w), MalformedMessage) for words in BAD_TEXTS),
        (put("sdk", "x" * 257), OutOfBounds),
        (put("protocol", 0), MalformedMessage),
        (put("training_examples", 2**63), OutOfBounds),
        (put("held_back_examples", 2**64 - 1), OutOfBounds),
        (many_entries("held_bundles", "0" * 64), OutOfBounds),
        (many_entries("sessions", pb.SessionRecord(task="t", shape="-")), OutOfBounds),
        (
            many_entries("outcomes", pb.ReleaseOutcome(model="m", outcome=pb.ReleaseOutcome.OUTCOME_ADOPTED)),
            OutOfBounds,
        ),
        (many_entries("capabilities.runtimes", "onnx"), OutOfBounds),
        (many_entries("capabilities.suites", "umbel-sealed/1"), OutOfBounds),
    ],
)
def test_a_spoilt_check_in_is_refused(spoil: Spoil, error: type[UmbelError]) -> None:
    good = messages.check_in_to_message(examples.CHECK_IN)
    refuse(good, messages.check_in_from_message, spoil, error)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        *((put("task", name), MalformedMessage) for name in BAD_NAMES),
        *((put("error", words), MalformedMessage) for words in BAD_TEXTS),
        (put("error", "x" * 257), OutOfBounds),
        (put("round", 2**63), OutOfBounds),
        (put("shape", "-v[?"), MalformedMessage),
        (put("shape", "-\n"), MalformedMessage),
        (put("shape", "-" * 65), MalformedMessage),
    ],
)
def test_a_spoilt_session_record_is_refused(spoil: Spoil, error: type[UmbelError]) -> None:
    good = messages.check_in_to_message(examples.CHECK_IN)
    refuse(good, messages.check_in_from_message, lambda message: spoil(message.sessions[0]), error)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        *((put("model", name), MalformedMessage) for name in BAD_NAMES),
        *((put("reason", words), MalformedMessage) for words in BAD_TEXTS),
        (put("reason", "x" * 257), OutOfBounds),
        (put("number", 2**63), OutOfBounds),
        (put("outcome", 0), MalformedMessage),
        (put("outcome", 99), MalformedMessage),
        *((put("accuracy_change", change), OutOfBounds) for change in (1.01, -1.01)),
        *((put("latency_ratio", ratio), OutOfBounds) for ratio in (0.0, -1.0)),
        (put("accuracy_change", math.nan), NotFinite),
        (put("latency_ratio", math.inf), NotFinite),
    ],
)
def test_a_spoilt_release_outcome_is_refused(spoil: Spoil, error: type[UmbelError]) -> None:
    good = messages.check_in_to_message(examples.CHECK_IN)
    refuse(good, messages.check_in_from_message, lambda message: spoil(message.outcomes[0]), error)


# Answers to check-ins.


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        *((put("session_id", name), MalformedMessage) for name in BAD_NAMES),
        *((put("task", name), MalformedMessage) for name in BAD_NAMES),
        *(
            (drop(part), MalformedMessage)
            for part in ("plan", "base", "sealing", "if_accepted", "if_rejected", "base.release", "base.signature")
        ),
        (put("round", 2**63), OutOfBounds),
        (put("upload_token", b""), OutOfBounds),
        (put("upload_token", b"x" * 257), OutOfBounds),
        (put("base.key_id", "x" * 257), OutOfBounds),
        (put("base.key_id", "\x1b["), MalformedMessage),
        (put("sealing.suite", "x" * 257), OutOfBounds),
        (put("sealing.key_id", "0" * 16), MalformedMessage),
        (put("sealing.public_key", b"\1" * 32), MalformedMessage),
        (put("if_accepted.earliest_seconds", -1.0), OutOfBounds),
        (put("if_accepted.latest_seconds", 0.5), OutOfBounds),
        (put("if_rejected.latest_seconds", math.inf), OutOfBounds),
        (put("if_rejected.earliest_seconds", math.nan), OutOfBounds),
    ],
)
def test_a_spoilt_assignment_is_refused(spoil: Spoil, error: type[UmbelError]) -> None:
    good = messages.check_in_reply_to_message(examples.WORK)
    refuse(good, messages.check_in_reply_from_message, lambda message: spoil(message.assignment), error)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (drop("retry"), MalformedMessage),
        (drop("retry.window"), MalformedMessage),
        (put("retry.window.latest_seconds", math.nan), OutOfBounds),
        (put("retry.window.earliest_seconds", 1e9), OutOfBounds),
        (put("retry.reason", "x" * 257), OutOfBounds),
        (put("retry.reason", "\x1b[2J"), MalformedMessage),
        (drop("newest.release"), MalformedMessage),
        (drop("newest.signature"), MalformedMessage),
    ],
)
def test_a_spoilt_retry_is_refused(spoil: Spoil, error: type[UmbelError]) -> None:
    good = messages.check_in_reply_to_message(examples.LATER)
    refuse(good, messages.check_in_reply_from_message, spoil, error)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (put("kind", 0), MalformedMessage),
        (put("kind", 99), MalformedMessage),
        (put("batch_size", 0), OutOfBounds),
        (put("max_examples", 2**63), OutOfBounds),
        (put("min_examples", 2**64 - 1), OutOfBounds),
        *((put(field, value), OutOfBounds)
          for field in ("max_seconds", "clip_norm", "max_weight")
          for value in (-1.0, math.nan, math.inf, -math.inf)),
        (lambda m: m.hyperparameters.update({"lr": math.nan}), OutOfBounds),
        (lambda m: m.hyperparameters.update({"lr": -0.1}), OutOfBounds),
        *((lambda m, n=name: m.hyperparameters.update({n: 0.1}), MalformedMessage) for name in BAD_NAMES),
        (lambda m: m.hyperparameters.update({f"h{i}": 0.1 for i in range(TOO_MANY)}), OutOfBounds),
    ],
)  # fmt: skip
def test_a_spoilt_plan_is_refused(spoil: Spoil, error: type[UmbelError]) -> None:
    refuse(messages.plan_to_message(examples.PLAN), messages.plan_from_message, spoil, error)


@pytest.mark.parametrize("field", ["epochs", "batch_size", "max_steps", "max_examples", "min_examples", "seed"])
def test_a_plan_counts_nothing_below_zero_nor_beyond_what_travels(field: str) -> None:
    for count in (-1, 2**64, 2**32 if field in ("epochs", "batch_size", "max_steps") else 2**64):
        with pytest.raises(OutOfBounds, match=field):
            replace(examples.PLAN, **{field: count})


# Releases.


def _release_from_message(message: release_pb2.Release) -> Release:
    return messages.release_from_bytes(message.SerializeToString())


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        *((put("model", name), MalformedMessage) for name in BAD_NAMES),
        *((put("channel", name), MalformedMessage) for name in BAD_NAMES),
        *((put("bundle_digest", digest), MalformedMessage) for digest in BAD_DIGESTS),
        (put("number", 0), MalformedMessage),
        (put("version", 0), MalformedMessage),
        (put("number", 2**63), OutOfBounds),
        (put("version", 2**63), OutOfBounds),
        (put("manifest_size", 2**63), OutOfBounds),
        (put("manifest_size", (4 << 20) + 1), OutOfBounds),
    ],
)
def test_a_spoilt_release_is_refused(spoil: Spoil, error: type[UmbelError]) -> None:
    good = messages.parse(release_pb2.Release, messages.release_to_bytes(examples.RELEASE))
    refuse(good, _release_from_message, spoil, error)


# Reports.


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        *((put("session_id", name), MalformedMessage) for name in BAD_NAMES),
        *((put("sealed_digest", digest), MalformedMessage) for digest in BAD_DIGESTS),
        *((put("report_id", wrong), MalformedMessage) for wrong in BAD_REPORT_IDS),
        (put("upload_token", b""), OutOfBounds),
        (put("upload_token", b"x" * 257), OutOfBounds),
        (put("sealed_size", 2**63), OutOfBounds),
    ],
)  # fmt: skip
def test_a_spoilt_question_before_an_upload_is_refused(spoil: Spoil, error: type[UmbelError]) -> None:
    good = messages.report_begin_to_message(examples.REPORT_BEGIN)
    refuse(good, messages.report_begin_from_message, spoil, error)


def _update_from_message(message: pb.UpdateBody) -> Update:
    return messages.update_from_bytes(message.SerializeToString(), examples.UPDATE.delta.shapes, 100.0)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda m: setattr(m, "delta", m.delta[:-4]), WeightsMismatch),
        (lambda m: setattr(m, "delta", m.delta[:-1]), WeightsMismatch),
        (lambda m: setattr(m, "delta", m.delta + bytes(4)), WeightsMismatch),
        (put("delta", b""), WeightsMismatch),
        (lambda m: setattr(m, "delta", b"\0\0\xc0\x7f" + m.delta[4:]), NotFinite),
        (lambda m: setattr(m, "delta", m.delta[:-4] + b"\0\0\x80\x7f"), NotFinite),
        (lambda m: setattr(m, "delta", m.delta[:-4] + b"\0\0\x80\xff"), NotFinite),
        (put("weight", 0.0), OutOfBounds),
        (put("weight", -600.0), OutOfBounds),
        (put("weight", 100.5), OutOfBounds),
        (put("weight", 1e12), OutOfBounds),
        (put("weight", math.nan), NotFinite),
        (put("weight", math.inf), NotFinite),
        (lambda m: m.metrics.update({"loss": math.nan}), NotFinite),
        (lambda m: m.metrics.update({"extra": math.inf}), NotFinite),
        (lambda m: m.metrics.update({"examples": -1.0}), OutOfBounds),
        (lambda m: m.metrics.update({"correct": -1e30}), OutOfBounds),
        (lambda m: m.metrics.update({"age[3]": -1.0}), OutOfBounds),
        (lambda m: m.metrics.update({"x" * 257: 1.0}), OutOfBounds),
        (lambda m: m.metrics.update({"\x1b[2J": 1.0}), MalformedMessage),
        (lambda m: m.metrics.update({f"m{i}": 1.0 for i in range(TOO_MANY)}), OutOfBounds),
    ],
)
def test_a_spoilt_update_is_refused(spoil: Spoil, error: type[UmbelError]) -> None:
    good = messages.parse(pb.UpdateBody, messages.update_to_bytes(examples.UPDATE))
    refuse(good, _update_from_message, spoil, error)


def test_the_largest_weight_of_the_plan_is_still_taken() -> None:
    update = Update(examples.UPDATE.delta, 100.0, {})
    assert messages.update_from_bytes(messages.update_to_bytes(update), update.delta.shapes, 100.0).weight == 100.0


def test_what_is_printed_of_an_assignment_and_a_report_holds_no_token() -> None:
    for value in (examples.WORK, examples.REPORT_BEGIN):
        assert repr(examples.TOKEN) not in repr(value)
        assert examples.TOKEN.hex() not in repr(value)
