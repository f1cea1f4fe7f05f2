"""Deltas: how a file becomes its next version, in a fraction of its bytes (`umbel-delta/1`).

    header (96 bytes)    magic[16] | SHA-256 of the base[32] | of the target[32] | size u64 | payload size u64
    one zstd frame       segments, until `size` bytes of the target are covered:
                         kind u8, a u64, b u64, then
        0 keep   nothing              `a` bytes of the base as they are
        1 xor    `a` bytes            in blocks of 2^20, each XORed with the base and byte-shuffled
        2 add    `a` float32, a·b i8  `a` rows of `b` float32: base + i8 * the row's scale

Base and target have the same size, numbers are little-endian, byte i of a block of n = 4·m + r bytes is found at
(i mod 4)·m + i div 4, its last r bytes in their own places. `add` is one float32 multiplication, rounded, then one
float32 addition, rounded (to nearest, ties to even; never fused): IEEE 754 makes it the same everywhere, so a release
may be *defined* by such a delta. Whoever rebuilds knows the target's size and digest beforehand from a signed source
and believes nothing else: not a byte more is written, and no more memory is used than a few blocks, a zstd window and
the scales of one segment.

Source of XOR with byte shuffle: Bitshuffle and Blosc, which shuffle numbers alike; zstd: RFC 8878.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Final, Protocol

import numpy as np
import zstandard
from numpy.typing import NDArray

from umbel.digests import Digest
from umbel.errors import DigestMismatch, MalformedMessage, OutOfBounds
from umbel.manifest import FileRef

MAGIC: Final = b"umbel-delta/1\0\0\0"
BLOCK_BYTES: Final = 1 << 20
MAX_WINDOW_BYTES: Final = 1 << 23
"""A frame that asks for more memory to be decompressed is refused."""
MAX_SEGMENTS: Final = 1 << 16
KEEP: Final = 0
XOR: Final = 1
ADD: Final = 2
_HEADER: Final = struct.Struct("<16s32s32sQQ")
_SEGMENT: Final = struct.Struct("<BQQ")
_LEVEL: Final = 3
_WINDOW_LOG: Final = 21
_SPARE: Final = MAX_SEGMENTS * _SEGMENT.size
"""How much longer than the target a payload may be."""


def is_worth_it(delta_size: int, full_size: int) -> bool:
    """Whether a delta is offered, and taken: only below 70 % of the file that it stands for."""
    return delta_size * 10 < full_size * 7


# Making.


@dataclass(frozen=True, slots=True)
class Ends:
    """The two files that a delta lies between; both have `size` bytes."""

    base: Digest
    target: Digest
    size: int


class Sink(Protocol):
    """Where a delta is written to."""

    def write(self, data: bytes, /) -> object:
        """Take the next bytes."""


def write_delta(ends: Ends, payload: Iterable[bytes], payload_size: int, out: Sink) -> None:
    """Write a delta of segments that are encoded already; `payload` comes in pieces of any length."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL, window_log=_WINDOW_LOG, write_content_size=False, write_checksum=False
    )
    compress = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    base, target = bytes.fromhex(ends.base), bytes.fromhex(ends.target)
    out.write(_HEADER.pack(MAGIC, base, target, ends.size, payload_size))
    for piece in payload:
        out.write(compress.compress(piece))
    out.write(compress.flush())


def write_lossless(ends: Ends, base: IO[bytes], target: IO[bytes], out: Sink) -> None:
    """Write the delta of any two files of one size; reads both once, in blocks.

    Raises:
        OutOfBounds: one of them is shorter than `ends` says.
    """
    write_delta(ends, _xored(ends.size, base, target), _SEGMENT.size + ends.size, out)


def segment(kind: int, a: int, b: int = 0) -> bytes:
    """The head of one segment."""
    return _SEGMENT.pack(kind, a, b)


def xored(base: bytes, target: bytes) -> bytes:
    """The content of an `xor` segment between two pieces of one length."""
    pairs = ((base[at : at + BLOCK_BYTES], target[at : at + BLOCK_BYTES]) for at in range(0, len(base), BLOCK_BYTES))
    return b"".join(_shuffled(_xor(old, new)) for old, new in pairs)


def _xored(size: int, base: IO[bytes], target: IO[bytes]) -> Iterable[bytes]:
    yield segment(XOR, size)
    left = size
    while left:
        length = min(left, BLOCK_BYTES)
        yield _shuffled(_xor(_exactly(base.read, length, "the base"), _exactly(target.read, length, "the target")))
        left -= length


# Rebuilding.


def rebuild(delta: IO[bytes], base: IO[bytes], out: Sink, base_digest: Digest, target: FileRef) -> None:
    """Write the file that a delta makes of its base; only after this returns may it be used.

    Args:
        delta: untrusted.
        base: the file that `base_digest` names, at its beginning.
        out: where the target goes, in blocks; never more than `target.size` bytes.
        base_digest: what the base is here.
        target: what is to come out, from a signed source.

    Raises:
        MalformedMessage: not a delta, or one between other files, or one that was cut off.
        OutOfBounds: it makes more or less than `target.size` bytes, or asks for too much memory.
        DigestMismatch: what came out isn't the target.
    """
    payload_size = _verify_header(_exactly(delta.read, _HEADER.size, "the delta"), base_digest, target)
    window = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    digest = hashlib.sha256()

    def put(data: bytes) -> None:
        digest.update(data)
        out.write(data)

    with window.stream_reader(delta, read_size=BLOCK_BYTES >> 3, closefd=False) as frame:
        _Rebuilding(_Payload(frame, payload_size), base, put).run(target.size)
    if digest.hexdigest() != target.digest:
        raise DigestMismatch(f"the delta made another file than {target.digest}; fetch that one whole")


def _verify_header(header: bytes, base: Digest, target: FileRef) -> int:
    magic, found_base, found_target, size, payload_size = _HEADER.unpack(header)
    if magic != MAGIC:
        raise MalformedMessage("not a delta of a form that is known here; fetch the file whole")
    if found_base.hex() != base or found_target.hex() != target.digest:
        raise MalformedMessage(f"a delta from {found_base.hex()[:12]} to {found_target.hex()[:12]}; not these files")
    if size != target.size or not 0 < payload_size <= size + _SPARE:
        raise OutOfBounds(f"a delta to {size} bytes out of {payload_size}; the file has {target.size}")
    return int(payload_size)


class _Payload:
    """The decompressed stream, of which not one byte more is read than was announced."""

    def __init__(self, frame: zstandard.ZstdDecompressionReader, size: int) -> None:
        self._frame = frame
        self._left = size

    def read(self, count: int) -> bytes:
        if count > self._left:
            raise OutOfBounds("the delta's segments are longer than it said")
        self._left -= count
        try:
            return _exactly(self._frame.read, count, "the delta")
        except zstandard.ZstdError as error:
            raise MalformedMessage(f"the delta doesn't decompress: {error}") from error

    def finish(self) -> None:
        try:
            more = self._left or self._frame.read(1)
        except zstandard.ZstdError as error:
            raise MalformedMessage(f"the delta doesn't end well: {error}") from error
        if more:
            raise OutOfBounds("the delta goes on after the file is whole")


class _Rebuilding:
    """Segment after segment, in blocks."""

    def __init__(self, payload: _Payload, base: IO[bytes], put: Callable[[bytes], None]) -> None:
        self._payload = payload
        self._base = base
        self._put = put

    def run(self, size: int) -> None:
        left = size
        for _ in range(MAX_SEGMENTS):
            if not left:
                break
            kind, a, b = _SEGMENT.unpack(self._payload.read(_SEGMENT.size))
            left -= self._step(kind, a, b, left)
        if left:
            raise OutOfBounds(f"a delta of more than {MAX_SEGMENTS} segments")
        self._payload.finish()

    def _step(self, kind: int, a: int, b: int, left: int) -> int:
        """Carry one segment out; returns how many bytes of the target it made."""
        if kind not in (KEEP, XOR, ADD) or (b > 0) != (kind == ADD):
            raise MalformedMessage(f"a segment of kind {kind} isn't known here; fetch the file whole")
        made = 4 * a * b if kind == ADD else a
        if not 0 < made <= left:
            raise OutOfBounds(f"a segment of {made} bytes, where {left} are missing")
        if kind == ADD:
            self._add(a, b)
        else:
            for start in range(0, a, BLOCK_BYTES):
                self._block(min(BLOCK_BYTES, a - start), kind)
        return made

    def _block(self, length: int, kind: int) -> None:
        old = self._old(length)
        self._put(old if kind == KEEP else _xor(old, _unshuffled(self._payload.read(length))))

    def _add(self, rows: int, columns: int) -> None:
        scales = np.frombuffer(self._payload.read(4 * rows), "<f4")
        most = max(1, (BLOCK_BYTES >> 2) // columns)
        for row in range(0, rows, most):
            part = scales[row : row + most]
            if columns <= BLOCK_BYTES >> 2:
                self._put_sum(np.repeat(part, columns))
                continue
            for column in range(0, columns, BLOCK_BYTES >> 2):
                self._put_sum(np.repeat(part, min(BLOCK_BYTES >> 2, columns - column)))

    def _put_sum(self, scales: NDArray[np.float32]) -> None:
        steps = np.frombuffer(self._payload.read(len(scales)), np.int8)
        self._put(added(np.frombuffer(self._old(4 * len(scales)), "<f4"), steps, scales).tobytes())

    def _old(self, length: int) -> bytes:
        return _exactly(self._base.read, length, "the base")


def added(
    base: NDArray[np.float32], steps: NDArray[np.int8], scales: NDArray[np.float32] | np.float32
) -> NDArray[np.float32]:
    """What an `add` segment means: a rounded multiplication, then a rounded addition, both float32."""
    with np.errstate(all="ignore"):
        moved = steps.astype("<f4") * scales
        moved += base
    return moved


# Small parts.


def _exactly(read: Callable[[int], bytes], count: int, what: str) -> bytes:
    pieces, missing = [], count
    while missing:
        piece = read(missing)
        if not piece:
            raise MalformedMessage(f"{what} ends {missing} bytes early")
        pieces.append(piece)
        missing -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _xor(one: bytes, other: bytes) -> bytes:
    return np.bitwise_xor(np.frombuffer(one, np.uint8), np.frombuffer(other, np.uint8)).tobytes()


def _shuffled(block: bytes) -> bytes:
    """First every first byte of four, then every second, …: what changes little lies together."""
    whole = len(block) & ~3
    planes = np.frombuffer(block, np.uint8, whole).reshape(-1, 4).T
    return planes.tobytes() + block[whole:]


def _unshuffled(block: bytes) -> bytes:
    whole = len(block) & ~3
    numbers = np.frombuffer(block, np.uint8, whole).reshape(4, -1).T
    return numbers.tobytes() + block[whole:]
