"""Behaviour of real devices, in the form that FedScale publishes (`FedScale/dataset`, arXiv:2105.11367).

A file maps a client's name to `{duration, finish_time, active: [...], inactive: [...]}`: seconds at which it becomes
free, and at which that ends, within a time that repeats after `finish_time`. As JSON, or as the pickle that FedScale
hands out, which is read without running anything that it may carry.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from umbel.errors import MalformedMessage, NotFound

_BEFORE_JSON: Final = b" \t\r\n" + codecs.BOM_UTF8


@dataclass(frozen=True, slots=True)
class Trace:
    """When one device was free."""

    length: float
    """Seconds after which it repeats."""
    intervals: tuple[tuple[float, float], ...]
    """Beginnings, rising, each with the next end, in seconds from 0 to `length`."""


class _Plain(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts; whatever names a class or a function is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse."""
        raise pickle.UnpicklingError(f"it names {module}.{name}; a trace is made of plain values")


def read_traces(path: Path) -> tuple[Trace, ...]:
    """The traces in a file, in the order of their clients' names.

    Raises:
        NotFound: there is no such file.
        MalformedMessage: it isn't a file of traces; says which client's, and what.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NotFound(f"no trace file at {path} ({error.strerror})") from None
    try:
        tree = json.loads(data) if data.lstrip(_BEFORE_JSON)[:1] in (b"{", b"[") else _Plain(io.BytesIO(data)).load()
    except Exception as error:  # damaged pickles fail in any way that there is
        raise MalformedMessage(f"{path} is neither JSON nor a plain pickle: {error}") from error
    if not isinstance(tree, dict) or not tree:
        raise MalformedMessage(f"{path} holds no clients; it should map names to traces")
    return tuple(_trace(str(name), tree[name]) for name in sorted(tree, key=str))


def _trace(name: str, entry: Any) -> Trace:
    try:
        length = _seconds(entry.get("finish_time") or entry["duration"])
        begins, ends = ([_seconds(at) for at in entry[key]] for key in ("active", "inactive"))
    except (AttributeError, KeyError, TypeError, OverflowError) as error:
        raise MalformedMessage(f"trace of {name!r}: needs finish_time, active and inactive ({error!r})") from error
    if length < 1:
        raise MalformedMessage(f"trace of {name!r}: finish_time is {length}; it must be a second at least")
    intervals: list[tuple[float, float]] = []
    for begin in sorted(begins):
        end = min((at for at in ends if at > begin), default=length)
        if not 0 <= begin < end <= length:
            raise MalformedMessage(f"trace of {name!r}: free from {begin} to {end}, outside of 0 to {length}")
        intervals.append((begin, end))
    return Trace(length, tuple(intervals))


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no number of seconds")
    return float(value)
