"""Canonical JSON: equal values have equal bytes, so they can be compared and hashed. And what is read from JSON or TOML
held against the dataclass that it is to fill.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final

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


_PLAIN: Final[dict[str, type | tuple[type, ...]]] = {"int": int, "float": (int, float), "str": str, "bool": bool}


def like(kind: type, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `tree`, once each is a field of the dataclass `kind` and of the plain type that it declares.

    Raises:
        TypeError, ValueError: not such a field; another type; no number.
        OverflowError: a number beyond all that a float holds.
    """
    types = {entry.name: entry.type for entry in fields(kind)}
    for name, value in tree.items():
        plain = _PLAIN.get(str(types[name])) if name in types else None
        if name not in types:
            raise TypeError(f"there is no {name!r}; known are {', '.join(types)}")
        if plain and (not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool)):
            raise TypeError(f"{name} is {value!r}, not of type {types[name]}")
        if types[name] == "float" and not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    return dict(tree)


def texts(name: str, listed: object) -> tuple[str, ...]:
    """A list of texts; raises `TypeError` for anything else, above all for one text, whose letters aren't meant."""
    if not isinstance(listed, list | tuple) or not all(isinstance(one, str) for one in listed):
        raise TypeError(f"{name} is {listed!r:.80}, not a list of texts")
    return tuple(listed)
