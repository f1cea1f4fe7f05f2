"""Values <-> `umbel.v1` messages, both ways, in one place.

Encoding can't fail. Decoding checks everything that a value's own constructor doesn't, and raises a `BadInput`: what
it returns may be used without another look. Fields that a newer peer added are ignored; enum values that it added are
refused. Maps, which travel in no order, come out sorted.
"""

from __future__ import annotations

import re
from typing import TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from umbel import fields
from umbel.digests import parse_digest
from umbel.errors import MalformedMessage, OutOfBounds, WeightsMismatch
from umbel.fields import name
from umbel.file_delta import file_delta_from_message, file_delta_to_message
from umbel.offer import offer_from_message, offer_to_message
from umbel.outcomes import health_from_message, health_to_message, outcome_from_message, outcome_to_message
from umbel.plan import Kind, Plan
from umbel.release import Release, SignedRelease, require_plausible
from umbel.sealing import Sealing, descriptor_from_message, descriptor_to_message
from umbel.update import Metrics, Update, is_count
from umbel.v1 import device_pb2 as pb
from umbel.v1 import release_pb2
from umbel.visit import (
    Assignment,
    CheckIn,
    CheckInReply,
    Event,
    ReportBegin,
    Retry,
    RetryWindow,
    SessionRecord,
)
from umbel.weights import Shapes, Weights, require_finite

M = TypeVar("M", bound=Message)

_REPORT_ID = re.compile(r"[0-9a-f]{32}")
_SHAPE = re.compile("[" + re.escape("".join(event.value for event in Event)) + "]{0,64}")


def parse(kind: type[M], data: bytes) -> M:
    """Decode bytes that came from elsewhere.

    Raises:
        MalformedMessage: the bytes are no such message.
    """
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise MalformedMessage(f"not a {kind.__name__}: {error}") from error
    return message


# Plans.


def plan_to_message(plan: Plan) -> pb.Plan:
    """Encode a plan."""
    return pb.Plan(
        kind=pb.Plan.KIND_TRAIN if plan.kind is Kind.TRAIN else pb.Plan.KIND_EVALUATE,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        max_steps=plan.max_steps,
        max_examples=plan.max_examples,
        min_examples=plan.min_examples,
        max_seconds=plan.max_seconds,
        clip_norm=plan.clip_norm,
        max_weight=plan.max_weight,
        hyperparameters=dict(plan.hyperparameters),
        seed=plan.seed,
    )


_KINDS = {pb.Plan.KIND_TRAIN: Kind.TRAIN, pb.Plan.KIND_EVALUATE: Kind.EVALUATE}


def plan_from_message(message: pb.Plan) -> Plan:
    """Decode a plan; an unknown kind is refused, not guessed."""
    if message.kind not in _KINDS:
        raise MalformedMessage(f"plan kind {message.kind} is not known here; update umbel")
    fields.few(message.hyperparameters, "hyperparameters")
    return Plan(
        kind=_KINDS[message.kind],
        epochs=message.epochs,
        batch_size=message.batch_size,
        max_steps=message.max_steps,
        max_examples=fields.count(message.max_examples, "max_examples"),
        min_examples=fields.count(message.min_examples, "min_examples"),
        max_seconds=message.max_seconds,
        clip_norm=message.clip_norm,
        max_weight=message.max_weight,
        hyperparameters={name(key, "hyperparameter"): value for key, value in sorted(message.hyperparameters.items())},
        seed=message.seed,
    )


# Releases.


def release_to_bytes(release: Release) -> bytes:
    """The statement that is signed."""
    message = release_pb2.Release(
        model=release.model,
        number=release.number,
        version=release.version,
        channel=release.channel,
        bundle_digest=release.bundle,
        manifest_size=release.manifest_size,
        issued_at_ms=_milliseconds(release.issued_at),
    )
    return message.SerializeToString(deterministic=True)


def release_from_bytes(statement: bytes) -> Release:
    """Decode a statement whose signature has been verified."""
    message = parse(release_pb2.Release, statement)
    release = Release(
        model=name(message.model, "model"),
        number=fields.count(message.number, "release number"),
        version=fields.count(message.version, "version"),
        channel=name(message.channel, "channel"),
        bundle=parse_digest(message.bundle_digest),
        manifest_size=fields.count(message.manifest_size, "manifest size"),
        issued_at=message.issued_at_ms / 1000,
    )
    require_plausible(release)
    return release


def signed_to_message(signed: SignedRelease) -> release_pb2.SignedRelease:
    """Encode a signed release."""
    return release_pb2.SignedRelease(release=signed.statement, key_id=signed.key_id, signature=signed.signature)


def signed_from_message(message: release_pb2.SignedRelease) -> SignedRelease:
    """Decode a signed release, unverified."""
    if not message.release or not message.signature:
        raise MalformedMessage("a signed release without a statement or a signature")
    return SignedRelease(message.release, fields.text(message.key_id, "key id"), message.signature)


# Check-in.


def check_in_to_message(check_in: CheckIn) -> pb.CheckInRequest:
    """Encode a check-in."""
    return pb.CheckInRequest(
        protocol=check_in.protocol,
        sdk=check_in.sdk,
        population=check_in.population,
        capabilities=pb.Capabilities(runtimes=check_in.runtimes, suites=check_in.suites),
        held_bundles=check_in.held_bundles,
        offers_work=check_in.offers_work,
        training_examples=check_in.training_examples,
        held_back_examples=check_in.held_back_examples,
        sessions=[
            pb.SessionRecord(
                task=record.task, round=record.round, shape=record.shape, error=fields.as_text(record.error)
            )
            for record in check_in.sessions
        ],
        outcomes=[outcome_to_message(outcome) for outcome in check_in.outcomes],
        channel=check_in.channel,
        release=check_in.release,
        health=health_to_message(check_in.health),
    )


def check_in_from_message(message: pb.CheckInRequest) -> CheckIn:
    """Decode a check-in: names are names, lists are short, shapes are made of known letters."""
    if message.protocol < 1:
        raise MalformedMessage("a check-in must name the protocol that the device speaks")
    for field in ("held_bundles", "sessions", "outcomes"):
        fields.few(getattr(message, field), field)
    fields.few([*message.capabilities.runtimes, *message.capabilities.suites], "capabilities")
    return CheckIn(
        population=name(message.population, "population"),
        runtimes=tuple(name(runtime, "runtime") for runtime in message.capabilities.runtimes),
        suites=tuple(fields.text(suite, "suite") for suite in message.capabilities.suites),
        held_bundles=tuple(parse_digest(digest) for digest in message.held_bundles),
        offers_work=message.offers_work,
        training_examples=fields.count(message.training_examples, "training_examples"),
        held_back_examples=fields.count(message.held_back_examples, "held_back_examples"),
        sessions=tuple(_session_from_message(record) for record in message.sessions),
        outcomes=tuple(outcome_from_message(outcome) for outcome in message.outcomes),
        channel=name(message.channel, "channel"),
        sdk=fields.text(message.sdk, "sdk"),
        protocol=message.protocol,
        release=fields.count(message.release, "release number"),
        health=health_from_message(message.health),
    )


def _session_from_message(message: pb.SessionRecord) -> SessionRecord:
    if not _SHAPE.fullmatch(message.shape):
        raise MalformedMessage(f"session shape {message.shape[:80]!r} has letters that no event has")
    return SessionRecord(
        name(message.task, "task"),
        fields.count(message.round, "round"),
        message.shape,
        fields.text(message.error, "session error"),
    )


# The answer to a check-in.


def window_to_message(window: RetryWindow) -> pb.RetryWindow:
    """Encode a retry window."""
    return pb.RetryWindow(earliest_seconds=window.earliest, latest_seconds=window.latest)


def window_from_message(message: pb.RetryWindow) -> RetryWindow:
    """Decode a retry window."""
    return RetryWindow(message.earliest_seconds, message.latest_seconds)


def check_in_reply_to_message(answer: CheckInReply) -> pb.CheckInResponse:
    """Encode the answer to a check-in."""
    message = pb.CheckInResponse()
    match answer.reply:
        case Assignment() as assignment:
            message.assignment.CopyFrom(_assignment_to_message(assignment))
        case Retry(window, reason):
            message.retry.window.earliest_seconds = window.earliest
            message.retry.window.latest_seconds = window.latest
            message.retry.reason = fields.as_text(reason)
    if answer.newest is not None:
        message.newest.CopyFrom(signed_to_message(answer.newest))
    if answer.offer is not None:
        message.offer.CopyFrom(offer_to_message(answer.offer))
    message.deltas.extend(map(file_delta_to_message, answer.deltas))
    return message


def check_in_reply_from_message(message: pb.CheckInResponse) -> CheckInReply:
    """Decode the answer to a check-in."""
    newest = signed_from_message(message.newest) if message.HasField("newest") else None
    offer = offer_from_message(message.offer) if message.HasField("offer") else None
    fields.few(message.deltas, "deltas")
    deltas = tuple(file_delta_from_message(delta) for delta in message.deltas)
    match message.WhichOneof("reply"):
        case "assignment":
            return CheckInReply(_assignment_from_message(message.assignment), newest, offer, deltas)
        case "retry":
            return CheckInReply(_retry_from_message(message.retry), newest, offer, deltas)
        case _:
            raise MalformedMessage("the coordinator answered a check-in with neither work nor a window")


def _retry_from_message(message: pb.Retry) -> Retry:
    _require_present(message, "window")
    return Retry(window_from_message(message.window), fields.text(message.reason, "reason"))


def _assignment_to_message(assignment: Assignment) -> pb.Assignment:
    return pb.Assignment(
        session_id=assignment.session_id,
        task=assignment.task,
        round=assignment.round,
        plan=plan_to_message(assignment.plan),
        base=signed_to_message(assignment.base),
        sealing=pb.Sealing(
            suite=assignment.sealing.suite,
            public_key=assignment.sealing.public_key,
            key_id=assignment.sealing.key_id,
        ),
        upload_token=assignment.upload_token,
        deadline_ms=_milliseconds(assignment.deadline),
        if_accepted=window_to_message(assignment.if_accepted),
        if_rejected=window_to_message(assignment.if_rejected),
        private_round=descriptor_to_message(assignment.private_round) if assignment.private_round else None,
    )


def _assignment_from_message(message: pb.Assignment) -> Assignment:
    _require_present(message, "plan", "base", "sealing", "if_accepted", "if_rejected")
    return Assignment(
        session_id=name(message.session_id, "session"),
        task=name(message.task, "task"),
        round=fields.count(message.round, "round"),
        plan=plan_from_message(message.plan),
        base=signed_from_message(message.base),
        sealing=_sealing_from_message(message.sealing),
        upload_token=fields.token(message.upload_token, "upload token"),
        deadline=message.deadline_ms / 1000,
        if_accepted=window_from_message(message.if_accepted),
        if_rejected=window_from_message(message.if_rejected),
        private_round=descriptor_from_message(message.private_round) if message.HasField("private_round") else None,
    )


def _sealing_from_message(message: pb.Sealing) -> Sealing:
    sealing = Sealing(fields.text(message.suite, "suite"), message.public_key)
    if message.key_id != sealing.key_id:
        raise MalformedMessage("the recipient's key doesn't go by the key id that stands beside it")
    return sealing


# Reports.


def report_begin_to_message(begin: ReportBegin) -> pb.ReportBegin:
    """Encode the question before an upload."""
    return pb.ReportBegin(
        session_id=begin.session_id,
        report_id=begin.report_id,
        upload_token=begin.upload_token,
        sealed_size=begin.sealed_size,
        sealed_digest=begin.sealed_digest,
    )


def report_begin_from_message(message: pb.ReportBegin) -> ReportBegin:
    """Decode the question before an upload."""
    if not _REPORT_ID.fullmatch(message.report_id):
        raise MalformedMessage("a report id is 32 lower-case hex digits")
    return ReportBegin(
        session_id=name(message.session_id, "session"),
        report_id=message.report_id,
        upload_token=fields.token(message.upload_token, "upload token"),
        sealed_size=fields.count(message.sealed_size, "sealed size"),
        sealed_digest=parse_digest(message.sealed_digest),
    )


def update_to_bytes(update: Update) -> bytes:
    """What is sealed into a report."""
    body = pb.UpdateBody(delta=update.delta.to_vector().tobytes(), weight=update.weight, metrics=dict(update.metrics))
    return body.SerializeToString(deterministic=True)


def update_from_bytes(data: bytes, shapes: Shapes, max_weight: float) -> Update:
    """Decode an opened report of a model with these shapes (none, for an evaluation).

    Raises:
        MalformedMessage: not an update.
        WeightsMismatch: too many or too few numbers.
        NotFinite: NaN or infinity in the delta, the weight or a metric.
        OutOfBounds: a weight outside 0 < weight <= max_weight, or negative counts.
    """
    body = parse(pb.UpdateBody, data)
    data = body.delta  # protobuf copies it each time that it is asked for
    if len(data) % 4:
        raise WeightsMismatch(f"a delta of {len(data)} bytes isn't made of float32 numbers")
    delta = Weights.from_vector(np.frombuffer(data, "<f4"), shapes)
    require_finite(delta)
    return Update(delta, _weight(body.weight, max_weight), _metrics(dict(sorted(body.metrics.items()))))


def _weight(weight: float, most: float) -> float:
    if not 0 < fields.finite(weight, "a report's weight") <= most:
        raise OutOfBounds(f"a report with weight {weight}; it must be above 0 and at most {most}")
    return weight


def _metrics(metrics: Metrics) -> Metrics:
    fields.few(metrics, "metrics")
    for metric, value in metrics.items():
        fields.finite(value, f"metric {fields.text(metric, 'metric')!r}")
        if is_count(metric) and value < 0:
            raise OutOfBounds(f"metric {metric!r} is {value}; a count can't be negative")
    return metrics


# Small parts.


def _milliseconds(instant: float) -> int:
    return round(instant * 1000)


def _require_present(message: Message, *parts: str) -> None:
    for part in parts:
        if not message.HasField(part):
            raise MalformedMessage(f"the {message.DESCRIPTOR.name} lacks its {part}; nothing stands in for it")
