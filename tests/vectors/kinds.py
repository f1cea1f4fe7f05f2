"""The kinds of golden vectors: how each is decoded, and how a value is written down in JSON.

Values are trees of plain JSON: bytes in hex, enums by their value, arrays as lists of numbers, tuples as lists.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Final

from tests.protos import examples
from umbel import messages
from umbel.release import verify_statement
from umbel.sealing import open_sealed
from umbel.v1 import device_pb2 as pb
from umbel.v1 import release_pb2
from umbel.weights import Weights

FOLDER: Final = Path(__file__).parent
MAX_WEIGHT: Final = 100.0
"""The plan's largest weight, for the update vectors."""


def as_json(value: object) -> Any:
    """A value of the agreement as plain JSON."""
    match value:
        case bytes():
            return value.hex()
        case Enum():
            return value.value
        case Weights():
            return {name: array.tolist() for name, array in value.arrays.items()}
        case Mapping():
            return {key: as_json(item) for key, item in value.items()}
        case tuple():
            return [as_json(item) for item in value]
        case _ if dataclasses.is_dataclass(value):
            return {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        case _:
            return value


def _verified_release(data: bytes) -> object:
    signed = messages.signed_from_message(messages.parse(release_pb2.SignedRelease, data))
    return messages.release_from_bytes(verify_statement(signed, examples.RELEASE_KEY.public_key().public_bytes_raw()))


DECODERS: Final[Mapping[str, Callable[[bytes], object]]] = {
    "plan": lambda data: messages.plan_from_message(messages.parse(pb.Plan, data)),
    "check-in": lambda data: messages.check_in_from_message(messages.parse(pb.CheckInRequest, data)),
    "check-in-reply": lambda data: messages.check_in_reply_from_message(messages.parse(pb.CheckInResponse, data)),
    "report-begin": lambda data: messages.report_begin_from_message(messages.parse(pb.ReportBegin, data)),
    "update": lambda data: messages.update_from_bytes(data, examples.UPDATE.delta.shapes, MAX_WEIGHT),
    "signed-release": _verified_release,
    "sealed": lambda data: open_sealed(data, examples.SEALING_KEY, examples.BINDING),
}


def load(kind: str) -> dict[str, Any]:
    """The committed file of one kind."""
    tree: dict[str, Any] = json.loads((FOLDER / f"{kind}.json").read_text("utf-8"))
    return tree
