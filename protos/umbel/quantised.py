"""Quantised releases: weights *defined* as a base plus an int8 delta with one scale a row.

    new weights -> steps of 1/127 of each row's largest move -> delta -> base + delta = the weights that are released

Rounding is lost once, here, before anything is signed: what comes out is an ordinary weights file, whose digest every
device checks, whether it rebuilt it from the delta (`umbel.delta`, `add` segments) or fetched it whole.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from umbel.delta import ADD, KEEP, XOR, Ends, added, rebuild, segment, write_delta, xored
from umbel.digests import digest_of
from umbel.errors import MalformedMessage, NotFinite, WeightsMismatch
from umbel.manifest import FileRef

LEVELS: Final = 127
LEAST_NUMBERS: Final = 64
"""Arrays of fewer numbers travel exactly: a scale and a head would eat what int8 spares."""
LEAST_COLUMNS: Final = 16
"""Arrays of shorter rows have one scale for all."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """A weights file that is a base plus a small delta."""

    delta: bytes
    """`umbel-delta/1`, from the base to `weights`."""
    weights: bytes
    """The materialised safetensors file."""


@dataclass(frozen=True, slots=True)
class _Span:
    """A stretch of a safetensors file: an array, or what lies between (`rows` 0)."""

    start: int
    end: int
    rows: int = 0
    """Rows that have a scale each; 0 for what isn't float32, or too small to gain by int8."""


def quantise(base: bytes, new: bytes, exact: Collection[str] = ()) -> Quantised:
    """The quantised neighbour of `new`.

    Args:
        base: a safetensors file of weights that devices have.
        new: another with the same arrays.
        exact: names of arrays that come out as they are in `new`, whatever that costs.

    Raises:
        MalformedMessage: not safetensors files.
        WeightsMismatch: their arrays differ in name, shape, dtype or place.
        NotFinite: `new` minus `base` holds NaN or infinity.
    """
    spans = _spans(base, exact)
    if _header(base) != _header(new) or len(base) != len(new):
        raise WeightsMismatch("the two weights files don't hold the same arrays; release these weights in full")
    weights = bytearray(base)
    pieces = [piece for span in spans for piece in _encode(span, base, new, weights)]
    target = bytes(weights)
    ends = Ends(digest_of(base), digest_of(target), len(target))
    out = io.BytesIO()
    write_delta(ends, pieces, sum(map(len, pieces)), out)
    _require_same(out.getvalue(), base, target)
    return Quantised(out.getvalue(), target)


def _encode(span: _Span, base: bytes, new: bytes, weights: bytearray) -> Iterator[bytes]:
    old, wanted = base[span.start : span.end], new[span.start : span.end]
    if old == wanted:
        yield segment(KEEP, len(old))
    elif not span.rows:
        weights[span.start : span.end] = wanted
        yield segment(XOR, len(old))
        yield xored(old, wanted)
    else:
        here = np.frombuffer(old, "<f4").reshape(span.rows, -1)
        steps, scales = _steps(np.frombuffer(wanted, "<f4").reshape(here.shape).astype(np.float64) - here)
        weights[span.start : span.end] = added(here, steps, scales[:, None]).tobytes()
        yield segment(ADD, *here.shape)
        yield scales.tobytes()
        yield steps.tobytes()


def _steps(delta: NDArray[np.float64]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Whole steps [rows, columns], and what one of them is worth [rows]."""
    if not np.isfinite(delta).all():
        raise NotFinite("these weights, or those they start from, hold NaN or infinity")
    scales = (np.abs(delta).max(axis=1) / LEVELS).astype("<f4")
    if not np.isfinite(scales).all():
        raise NotFinite("these weights lie further from their base than float32 reaches; release them in full")
    worth = np.where(scales > 0, scales, 1.0).astype(np.float64)[:, None]
    return np.clip(np.rint(delta / worth), -LEVELS, LEVELS).astype(np.int8), scales


def _header(data: bytes) -> bytes:
    if len(data) < 8:
        raise MalformedMessage("not a safetensors file: too short")
    (length,) = struct.unpack("<Q", data[:8])
    if length > len(data) - 8:
        raise MalformedMessage("not a safetensors file: its header is longer than the file")
    return data[: 8 + length]


def _spans(data: bytes, exact: Collection[str]) -> list[_Span]:
    """The whole file as stretches, in order."""
    header = _header(data)
    try:
        tree = json.loads(header[8:])
        arrays = sorted(
            (entry["data_offsets"], "" if name in exact else entry["dtype"], entry["shape"])
            for name, entry in tree.items()
            if name != "__metadata__"
        )
        spans, place = [_Span(0, len(header))], len(header)
        for (start, end), dtype, shape in arrays:
            start, end = start + len(header), end + len(header)
            if not place <= start <= end <= len(data):
                raise ValueError("arrays overlap, or lie outside of the file")
            spans += [_Span(place, start), _Span(start, end, _rows(dtype, shape, end - start))]
            place = end
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MalformedMessage(f"not a safetensors file: {error}") from error
    return [span for span in (*spans, _Span(place, len(data))) if span.end > span.start]


def _rows(dtype: str, shape: list[int], size: int) -> int:
    numbers = math.prod(shape)
    if dtype != "F32" or numbers * 4 != size or numbers < LEAST_NUMBERS:
        return 0
    return shape[0] if len(shape) > 1 and numbers // shape[0] >= LEAST_COLUMNS else 1


def _require_same(delta: bytes, base: bytes, target: bytes) -> None:
    """What is signed is what devices will rebuild; seen here, once, rather than in the fleet."""
    out = io.BytesIO()
    ref = FileRef(digest_of(target), len(target))
    rebuild(io.BytesIO(delta), io.BytesIO(base), out, digest_of(base), ref)
