"""Checks of single fields that came from elsewhere: each returns what it was given, or raises a `BadInput`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sized
from dataclasses import fields
from typing import Any, Final

from umbel.errors import MalformedMessage, NotFinite, OutOfBounds

MAX_TEXT: Final = 256
MAX_ENTRIES: Final = 256
MAX_TOKEN_BYTES: Final = 256
MAX_COUNT: Final = 2**63 - 1
"""The largest integer that both databases hold."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def name(text: str, what: str) -> str:
    """Check a name that may become part of a path or a query: letters, digits, dots, dashes, 100 at most."""
    if not is_name(text):
        raise MalformedMessage(f"{what} {text[:80]!r} isn't a name: letters, digits, '.', '_' and '-', 100 at most")
    return text


def is_name(text: str) -> bool:
    """Whether `name` would let it pass."""
    return _NAME.fullmatch(text) is not None


def text(value: str, what: str) -> str:
    """Check words for a person: short, and without anything that could rewrite a log line or a terminal."""
    if len(value) > MAX_TEXT:
        raise OutOfBounds(f"{what} of {len(value)} characters; the limit is {MAX_TEXT}")
    if not value.isprintable():
        raise MalformedMessage(f"{what} {value[:80]!r} holds control characters; send printable text")
    return value


def as_text(value: str) -> str:
    """Make words for a person pass `text`: unprintable characters become blanks, what is too long is cut."""
    if len(value) <= MAX_TEXT and value.isprintable():
        return value
    return "".join(letter if letter.isprintable() else " " for letter in value[:MAX_TEXT])


def count(value: int, what: str, *, least: int = 0) -> int:
    """Check an integer that will be stored."""
    if not least <= value <= MAX_COUNT:
        raise OutOfBounds(f"{what} is {value}; it must lie between {least} and {MAX_COUNT}")
    return value


def token(value: bytes, what: str) -> bytes:
    """Check a bearer secret's length; whether it is the right one is for its issuer to say."""
    if not 0 < len(value) <= MAX_TOKEN_BYTES:
        raise OutOfBounds(f"{what} of {len(value)} bytes; send 1 to {MAX_TOKEN_BYTES}")
    return value


def finite(value: float, what: str) -> float:
    """Check a number that will be summed."""
    if not math.isfinite(value):
        raise NotFinite(f"{what} is {value}")
    return value


def few(entries: Sized, what: str) -> None:
    """Check the length of a list or map."""
    if len(entries) > MAX_ENTRIES:
        raise OutOfBounds(f"{len(entries)} entries in {what}; the limit is {MAX_ENTRIES}")


def known(kind: type, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a file that the dataclass `kind` has fields for; a newer version may have written others."""
    return {entry.name: tree[entry.name] for entry in fields(kind) if entry.name in tree}
