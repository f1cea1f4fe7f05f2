"""Canonical JSON: equal values have equal bytes, so they can be compared and hashed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from umbel.errors import MalformedMessage


def to_text(value: object) -> str:
    """Sorted keys, no blanks; infinities and NaN are refused, because JSON has none."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def from_text(text: str) -> dict[str, Any]:
    """Read an object.

    Raises:
        MalformedMessage: not JSON, or not an object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(f"not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise MalformedMessage("expected a JSON object")
    return dict(value)
