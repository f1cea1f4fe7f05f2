"""Write the golden vectors: encoded messages, and what each must decode to or be refused with.

    python -m tests.vectors.generate

Bytes come out the same at every run. A change of a committed vector is a change of the wire: read
docs/reference/wire-evolution.md before you commit one. Other implementations of the agreement may test against these
files; the keys and settings that they need stand in `context`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from google.protobuf.message import Message

from tests.protos import examples
from tests.vectors.kinds import DECODERS, FOLDER, MAX_WEIGHT, as_json
from umbel import messages
from umbel.errors import UmbelError
from umbel.file_delta import file_delta_to_message
from umbel.plan import Kind, Plan
from umbel.release import sign_statement
from umbel.sealing import SEALED, Sealing
from umbel.update import Update
from umbel.v1 import device_pb2 as pb
from umbel.visit import Health
from umbel.weights import Weights

M = TypeVar("M", bound=Message)
Vectors = Iterator[tuple[str, bytes]]


def encoded(message: Message) -> bytes:
    """The bytes of a message, the same at every run."""
    return message.SerializeToString(deterministic=True)


def spoilt(message: M, change: Callable[[M], object]) -> bytes:
    """The bytes of a good message after one change."""
    copy = type(message)()
    copy.CopyFrom(message)
    change(copy)
    return encoded(copy)


def plans() -> Vectors:
    """Plans: full, empty of options, and what must not be run."""
    good = messages.plan_to_message(examples.PLAN)
    yield "train", encoded(good)
    yield "evaluate with defaults", encoded(messages.plan_to_message(Plan(kind=Kind.EVALUATE)))
    yield "with a field of a newer peer", encoded(good) + bytes([0xA0, 0x06, 0x2A])
    yield "empty", b""
    yield "truncated", encoded(good)[:-3]
    yield "unknown kind", spoilt(good, lambda plan: setattr(plan, "kind", 99))
    yield "batch of none", spoilt(good, lambda plan: setattr(plan, "batch_size", 0))
    yield "endless clip norm", spoilt(good, lambda plan: setattr(plan, "clip_norm", math.inf))
    yield "learning rate that is no number", spoilt(good, lambda plan: plan.hyperparameters.update({"lr": math.nan}))
    yield "hyper-parameter named like a path", spoilt(good, lambda plan: plan.hyperparameters.update({"../lr": 1.0}))


def check_ins() -> Vectors:
    """Check-ins: full, least, and names, lists and letters that must not get in."""
    good = messages.check_in_to_message(examples.CHECK_IN)
    least = pb.CheckInRequest(protocol=1, population="p", channel="stable")
    record = pb.SessionRecord(task="exercises", round=1, shape="-")
    yield "full", encoded(good)
    yield "least", encoded(least)
    yield (
        "with health",
        encoded(messages.check_in_to_message(replace(examples.CHECK_IN, health=Health(0.9, 0.02, 81.5)))),
    )
    yield "no time at all for an answer", spoilt(least, lambda m: setattr(m.health, "latency_seconds", 0.0))
    yield "endless memory", spoilt(least, lambda m: setattr(m.health, "memory_mb", math.inf))
    yield "empty", b""
    yield "truncated", encoded(good)[:-5]
    yield "not a message", bytes.fromhex("ffffffffffffffffffff")
    yield "population named like a path", spoilt(good, lambda m: setattr(m, "population", "../../etc"))
    yield "no channel", spoilt(good, lambda m: m.ClearField("channel"))
    yield "no protocol", spoilt(good, lambda m: m.ClearField("protocol"))
    yield "bad digest", spoilt(good, lambda m: m.held_bundles.append("A" * 64))
    yield "unknown event in a shape", spoilt(good, lambda m: setattr(m.sessions[0], "shape", "-?"))
    yield "unknown outcome", spoilt(good, lambda m: setattr(m.outcomes[0], "outcome", 99))
    yield "escape sequence in a reason", spoilt(good, lambda m: setattr(m.outcomes[0], "reason", "\x1b[2J"))
    yield "round that no database holds", spoilt(good, lambda m: setattr(m.sessions[0], "round", 2**63))
    yield "too many sessions", spoilt(least, lambda m: m.sessions.extend([record] * 257))
    yield "text too long", spoilt(good, lambda m: setattr(m, "sdk", "x" * 257))


def check_in_replies() -> Vectors:
    """Answers to check-ins: work, a window, and parts that are absent where nothing may stand in for them."""
    work, later = (messages.check_in_reply_to_message(answer) for answer in (examples.WORK, examples.LATER))
    yield "work", encoded(work)
    yield "later", encoded(later)
    yield "later, and nothing released", spoilt(later, lambda m: m.ClearField("newest"))
    yield "neither work nor a window", b""
    yield "truncated", encoded(work)[:-1]
    yield "no plan", spoilt(work, lambda m: m.assignment.ClearField("plan"))
    yield "no base", spoilt(work, lambda m: m.assignment.ClearField("base"))
    yield "no sealing", spoilt(work, lambda m: m.assignment.ClearField("sealing"))
    yield "no upload token", spoilt(work, lambda m: m.assignment.ClearField("upload_token"))
    yield "key under another key's name", spoilt(work, lambda m: setattr(m.assignment.sealing, "key_id", "0" * 16))
    yield "session named like a path", spoilt(work, lambda m: setattr(m.assignment, "session_id", "a/../b"))
    yield "no window", spoilt(later, lambda m: m.retry.ClearField("window"))
    yield "window that ends before it begins", spoilt(later, lambda m: setattr(m.retry.window, "latest_seconds", 1.0))
    yield "window that never ends", spoilt(later, lambda m: setattr(m.retry.window, "latest_seconds", math.inf))
    hint = file_delta_to_message(examples.DELTA)
    yield "with a delta", spoilt(later, lambda m: m.deltas.append(hint))
    yield "delta named like a path", spoilt(later, lambda m: m.deltas.add(**_fields(hint, digest="../" + "0" * 61)))
    yield "delta of nothing", spoilt(later, lambda m: m.deltas.add(**_fields(hint, size=0)))
    yield "endless deltas", spoilt(later, lambda m: m.deltas.extend([hint] * 257))


def _fields(hint: pb.FileDelta, **changed: Any) -> dict[str, Any]:
    return {"base": hint.base, "target": hint.target, "digest": hint.digest, "size": hint.size} | changed


def report_begins() -> Vectors:
    """Questions before an upload."""
    good = messages.report_begin_to_message(examples.REPORT_BEGIN)
    yield "good", encoded(good)
    yield "empty", b""
    yield "report id in capitals", spoilt(good, lambda m: setattr(m, "report_id", "A" * 32))
    yield "report id like a path", spoilt(good, lambda m: setattr(m, "report_id", "../" + "0" * 29))
    yield "bad digest", spoilt(good, lambda m: setattr(m, "sealed_digest", "0" * 63))
    yield "no token", spoilt(good, lambda m: m.ClearField("upload_token"))
    yield "endless token", spoilt(good, lambda m: setattr(m, "upload_token", bytes(257)))
    yield "size that no database holds", spoilt(good, lambda m: setattr(m, "sealed_size", 2**63))


def updates() -> Vectors:
    """Opened reports: each is against the shapes and the largest weight in `context`."""
    good = messages.parse(pb.UpdateBody, messages.update_to_bytes(examples.UPDATE))
    yield "good", encoded(good)
    yield "without metrics", messages.update_to_bytes(replace(examples.UPDATE, metrics={}))
    yield "empty", b""
    yield "evaluation where training was asked", messages.update_to_bytes(Update(Weights({}), 1.0, {"examples": 1.0}))
    yield "one number short", spoilt(good, lambda m: setattr(m, "delta", m.delta[:-4]))
    yield "one byte short", spoilt(good, lambda m: setattr(m, "delta", m.delta[:-1]))
    yield "one number long", spoilt(good, lambda m: setattr(m, "delta", m.delta + bytes(4)))
    yield "delta with NaN", spoilt(good, lambda m: setattr(m, "delta", bytes.fromhex("0000c07f") + m.delta[4:]))
    yield "delta with infinity", spoilt(good, lambda m: setattr(m, "delta", m.delta[:-4] + bytes.fromhex("000080ff")))
    yield "weight NaN", spoilt(good, lambda m: setattr(m, "weight", math.nan))
    yield "weight nought", spoilt(good, lambda m: setattr(m, "weight", 0.0))
    yield "weight below nought", spoilt(good, lambda m: setattr(m, "weight", -600.0))
    yield "weight beyond the plan's", spoilt(good, lambda m: setattr(m, "weight", 1e12))
    yield "metric NaN", spoilt(good, lambda m: m.metrics.update({"loss": math.nan}))
    yield "fewer than no examples", spoilt(good, lambda m: m.metrics.update({"examples": -1.0}))
    yield "too many metrics", spoilt(good, lambda m: m.metrics.update({f"m{i}": 0.0 for i in range(257)}))


def signed_releases() -> Vectors:
    """Signed releases, verified under the public key in `context`."""
    signed = sign_statement(messages.release_to_bytes(examples.RELEASE), examples.RELEASE_KEY)
    foreign = sign_statement(signed.statement, examples.FOREIGN_RELEASE_KEY)
    nothing = sign_statement(b"no release", examples.RELEASE_KEY)
    message = messages.signed_to_message(signed)
    older = messages.release_to_bytes(replace(examples.RELEASE, number=1))
    yield "good", encoded(message)
    yield "empty", b""
    yield "foreign key", encoded(messages.signed_to_message(foreign))
    yield "foreign key under our name", spoilt(message, lambda m: setattr(m, "signature", foreign.signature))
    yield "statement changed", spoilt(message, lambda m: setattr(m, "release", older))
    yield "signature cut", spoilt(message, lambda m: setattr(m, "signature", m.signature[:-1]))
    yield "signature absent", spoilt(message, lambda m: m.ClearField("signature"))
    yield "signed, but no release", encoded(messages.signed_to_message(nothing))


def sealed_reports() -> Vectors:
    """Sealed bytes, opened with the key and for the binding in `context`; sealing draws, so one result is kept."""
    good = examples.SEALED_REPORT
    yield "good", good
    yield "empty", b""
    yield "truncated", good[:-1]
    yield "encapsulated key alone", good[:32]
    yield "bit flipped in the encapsulated key", bytes([good[0] ^ 1]) + good[1:]
    yield "bit flipped in the text", good[:40] + bytes([good[40] ^ 128]) + good[41:]
    yield "bit flipped in the tag", good[:-1] + bytes([good[-1] ^ 1])
    yield "one byte more", good + b"\0"


GENERATORS: dict[str, Callable[[], Vectors]] = {
    "plan": plans,
    "check-in": check_ins,
    "check-in-reply": check_in_replies,
    "report-begin": report_begins,
    "update": updates,
    "signed-release": signed_releases,
    "sealed": sealed_reports,
}


def contexts() -> dict[str, dict[str, Any]]:
    """What a reader needs beside the bytes, for the kinds that need something."""
    sealing = Sealing(SEALED, examples.SEALING_KEY.public_key().public_bytes_raw())
    public = examples.RELEASE_KEY.public_key().public_bytes_raw()
    return {
        "update": {"shapes": as_json(examples.UPDATE.delta.shapes), "max_weight": MAX_WEIGHT},
        "signed-release": {"public_key": public.hex()},
        "sealed": {
            "suite": sealing.suite,
            "private_key": examples.SEALING_KEY.private_bytes_raw().hex(),
            "public_key": sealing.public_key.hex(),
            "key_id": sealing.key_id,
            "binding": as_json(examples.BINDING),
            "info": examples.BINDING.info(sealing).hex(),
        },
    }


def verdict(kind: str, data: bytes) -> dict[str, Any]:
    """`value`: what the bytes decode to, or `error`: the code of the refusal."""
    try:
        return {"value": as_json(DECODERS[kind](data))}
    except UmbelError as error:
        return {"error": error.code}


def file_of(kind: str) -> str:
    """The text of one vector file."""
    cases = [{"name": name, "hex": data.hex(), **verdict(kind, data)} for name, data in GENERATORS[kind]()]
    tree = {"kind": kind, "context": contexts().get(kind, {}), "vectors": cases}
    return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    """Write every file."""
    for kind in GENERATORS:
        (FOLDER / f"{kind}.json").write_text(file_of(kind), "utf-8")
        sys.stdout.write(f"wrote {kind}.json\n")


if __name__ == "__main__":
    main()
