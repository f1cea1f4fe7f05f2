"""Canonical JSON: equal values have equal bytes, so they can be compared and hashed. And what is read from JSON or TOML
held against the dataclass that it is to fill.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, Final

from umbel.errors import MalformedMessage, OutOfBounds


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


def like(kind: type, tree: object, what: str) -> dict[str, Any]:
    """The entries of `tree`, once each is a field of the dataclass `kind` and of the plain type that it declares, and
    each field without a default is there.

    Raises:
        MalformedMessage: no table; a name that isn't a field, or isn't there; a value of another type.
        OutOfBounds: a number that is none, or without bounds.
    """
    if not isinstance(tree, Mapping):
        raise MalformedMessage(f"{what} is {tree!r}; it must be a table")
    types = {entry.name: str(entry.type) for entry in fields(kind)}
    needed = [entry.name for entry in fields(kind) if entry.default is MISSING is entry.default_factory]
    if lacking := [name for name in needed if name not in tree]:
        raise MalformedMessage(f"{what} lacks {', '.join(lacking)}")
    for name, value in tree.items():
        if name not in types:
            raise MalformedMessage(f"{what} has no {name!r}; it has {', '.join(types)}")
        if not _fits(value, types[name]):
            raise MalformedMessage(f"{name} of {what} is {value!r}, not of type {types[name]}")
        # Neither NaN, nor a whole number beyond all that a float holds.
        if isinstance(value, int | float) and not abs(value) <= sys.float_info.max:
            raise OutOfBounds(f"{name} of {what} is {value}; it must be a number of a float's size")
    return dict(tree)


def texts(name: str, listed: object) -> tuple[str, ...]:
    """A list of texts; raises `TypeError` for anything else, above all for one text, whose letters aren't meant."""
    if not isinstance(listed, list | tuple) or not all(isinstance(one, str) for one in listed):
        raise TypeError(f"{name} is {listed!r:.80}, not a list of texts")
    return tuple(listed)


def _fits(value: object, declared: str) -> bool:
    if isinstance(value, bool):
        return declared not in ("int", "float", "str")
    return isinstance(value, _PLAIN.get(declared, object))
