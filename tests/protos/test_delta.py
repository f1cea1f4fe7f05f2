"""A delta makes the very file that was promised, or is refused before anybody uses what it made."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.delta import (
    ADD,
    BLOCK_BYTES,
    KEEP,
    MAGIC,
    MAX_SEGMENTS,
    XOR,
    Ends,
    added,
    is_worth_it,
    rebuild,
    segment,
    write_delta,
    write_lossless,
    xored,
)
from umbel.digests import Digest, digest_of
from umbel.errors import (
    BY_CODE,
    DigestMismatch,
    MalformedMessage,
    NotFinite,
    OutOfBounds,
    UmbelError,
    WeightsMismatch,
)
from umbel.manifest import FileRef
from umbel.quantised import LEVELS, quantise
from umbel.randomness import generator
from umbel.weights import Weights

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[1] / "vectors" / "delta.json").read_text("utf-8"))
HEADER_BYTES = 96


def lossless(base: bytes, target: bytes) -> bytes:
    out = io.BytesIO()
    write_lossless(Ends(digest_of(base), digest_of(target), len(target)), io.BytesIO(base), io.BytesIO(target), out)
    return out.getvalue()


def of_segments(base: bytes, target: bytes, *pieces: bytes, size: int | None = None) -> bytes:
    """A delta of any segments, whatever they say."""
    out, payload = io.BytesIO(), b"".join(pieces)
    ends = Ends(digest_of(base), digest_of(target), len(target))
    write_delta(ends, [payload], len(payload) if size is None else size, out)
    return out.getvalue()


def rebuilt(delta: bytes, base: bytes, target: bytes, base_digest: Digest | None = None) -> bytes:
    out = io.BytesIO()
    ref = FileRef(digest_of(target), len(target))
    rebuild(io.BytesIO(delta), io.BytesIO(base), out, base_digest or digest_of(base), ref)
    return out.getvalue()


def two_versions(size: int = 4096) -> tuple[bytes, bytes]:
    chance = generator("delta", size)
    old = chance.normal(0, 0.1, size).astype("<f4")
    return old.tobytes(), (old + chance.normal(0, 1e-4, size).astype("<f4")).tobytes()


def weights(scale: float = 0.0, **shapes: tuple[int, ...]) -> Weights:
    """The same base for the same shapes; `scale` moves it."""
    chance, moves = generator("weights"), generator("moves")
    shapes = shapes or {"p_conv": (8, 3, 9), "p_bias": (7,), "b_mean": (80,), "p_dense": (64, 40)}
    base = {name: chance.normal(0, 1, shape) for name, shape in shapes.items()}
    return Weights({name: array + scale * moves.normal(0, 1, array.shape) for name, array in base.items()})


# What a delta is for.


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1))
def test_any_two_files_of_one_size_have_a_delta(base: bytes, seed: int) -> None:
    target = np.random.Generator(np.random.PCG64(seed)).bytes(len(base))
    assert not base or rebuilt(lossless(base, target), base, target) == target


@pytest.mark.parametrize("beyond", [-1, 0, 1, 6])
def test_blocks_fit_together_at_their_edges(beyond: int) -> None:
    base, target = two_versions(BLOCK_BYTES // 2)
    base, target = base[: BLOCK_BYTES + beyond], target[: BLOCK_BYTES + beyond]
    assert rebuilt(lossless(base, target), base, target) == target


def test_a_small_step_makes_a_small_delta_and_where_nothing_moved_next_to_none() -> None:
    base, target = two_versions(100_000)
    assert is_worth_it(len(lossless(base, target)), len(target))
    assert len(lossless(base, base[:-400] + target[-400:])) < len(base) / 100


def test_a_delta_is_worth_it_below_seventy_per_cent_only() -> None:
    assert is_worth_it(699, 1000)
    assert not is_worth_it(700, 1000)


def test_rebuilding_takes_a_few_blocks_of_memory_not_a_file() -> None:
    base, target = two_versions(4_000_000)
    delta = lossless(base, target)
    sink = type("Nowhere", (), {"write": lambda self, data: None})()
    tracemalloc.start()
    ref = FileRef(digest_of(target), len(target))
    rebuild(io.BytesIO(delta), io.BytesIO(base), sink, digest_of(base), ref)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * BLOCK_BYTES < len(target)


# Attacks.


def test_a_delta_of_another_base_is_refused_before_it_is_decompressed() -> None:
    base, target = two_versions()
    with pytest.raises(MalformedMessage, match="not these files"):
        rebuilt(lossless(target, target), base, target)


def test_a_delta_to_another_file_is_refused() -> None:
    base, target = two_versions()
    with pytest.raises(MalformedMessage, match="not these files"):
        rebuilt(lossless(base, base), base, target)


def test_a_delta_that_yields_other_content_is_refused() -> None:
    base, target = two_versions()
    other = bytes(reversed(target))
    with pytest.raises(DigestMismatch):
        rebuilt(of_segments(base, target, segment(XOR, len(base)), xored(base, other)), base, target)


def test_a_base_that_rotted_makes_a_file_that_is_refused() -> None:
    base, target = two_versions()
    rotten = base[:100] + bytes([base[100] ^ 1]) + base[101:]
    with pytest.raises(DigestMismatch):
        rebuilt(lossless(base, target), rotten, target, digest_of(base))


def test_a_base_of_another_shape_is_refused() -> None:
    base, target = two_versions()
    with pytest.raises(MalformedMessage, match="the base ends"):
        rebuilt(lossless(base, target), base[:-4], target, digest_of(base))
    longer = target + b"1234"
    with pytest.raises(OutOfBounds, match="the file has"):
        rebuild(
            io.BytesIO(lossless(base, target)),
            io.BytesIO(base),
            io.BytesIO(),
            digest_of(base),
            FileRef(digest_of(target), len(longer)),
        )


@pytest.mark.parametrize("kept", [0, 10, HEADER_BYTES, HEADER_BYTES + 5, -1])
def test_a_truncated_delta_is_refused(kept: int) -> None:
    base, target = two_versions()
    with pytest.raises(MalformedMessage):
        rebuilt(lossless(base, target)[:kept], base, target)


@settings(max_examples=150)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_tampered_delta_makes_the_promised_file_or_an_error_of_ours(place: int, change: int) -> None:
    base, target = two_versions(512)
    delta = bytearray(lossless(base, target))
    delta[place % len(delta)] ^= change
    with contextlib.suppress(UmbelError):
        assert rebuilt(bytes(delta), base, target) == target


class Counting:
    """Counts what is written, and keeps none of it."""

    def __init__(self) -> None:
        self.bytes = 0

    def write(self, data: bytes) -> None:
        self.bytes += len(data)


def bomb(base: bytes, target: bytes, *, said: int) -> bytes:
    """A gigabyte of nothing in a few kilobytes, under a header that is in order."""
    compress = zstandard.ZstdCompressor().compressobj()
    packed = b"".join(compress.compress(bytes(1 << 20)) for _ in range(1 << 10)) + compress.flush()
    head = struct.pack(
        "<16s32s32sQQ", MAGIC, bytes.fromhex(digest_of(base)), bytes.fromhex(digest_of(target)), len(target), said
    )
    return head + packed


def test_a_decompression_bomb_is_left_after_what_the_header_may_say() -> None:
    base, target = two_versions()
    with pytest.raises(OutOfBounds, match="out of"):
        rebuilt(bomb(base, target, said=1 << 30), base, target)
    sink = Counting()
    ref = FileRef(digest_of(target), len(target))
    with pytest.raises(UmbelError):
        rebuild(io.BytesIO(bomb(base, target, said=len(target))), io.BytesIO(base), sink, digest_of(base), ref)
    assert sink.bytes <= len(target)


def test_a_delta_that_goes_on_after_the_file_is_whole_is_refused() -> None:
    base, target = two_versions()
    good = segment(XOR, len(base)) + xored(base, target)
    with pytest.raises(OutOfBounds, match="goes on"):
        rebuilt(of_segments(base, target, good, b"\0"), base, target)
    with pytest.raises(OutOfBounds, match="goes on"):
        rebuilt(of_segments(base, target, good, b"\0", size=len(good)), base, target)


def test_a_frame_that_asks_for_a_huge_window_is_refused() -> None:
    base, target = two_versions(1 << 16)
    payload = segment(XOR, len(base)) + xored(base, target)
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=25, write_content_size=False)
    compress = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    greedy = lossless(base, target)[:HEADER_BYTES] + compress.compress(payload) + compress.flush()
    with pytest.raises(MalformedMessage, match="too much memory"):
        rebuilt(greedy, base, target)


@pytest.mark.parametrize("head", [
    segment(KEEP, 0), segment(KEEP, 1 << 40), segment(XOR, 2**64 - 1), segment(ADD, 2**62, 4), segment(ADD, 3, 0),
    segment(KEEP, 8, 8), segment(3, 8), segment(ADD, 0, 9), segment(ADD, 2**63, 2**63),
])  # fmt: skip
def test_a_segment_that_makes_no_sense_is_refused(head: bytes) -> None:
    base, target = two_versions()
    with pytest.raises((OutOfBounds, MalformedMessage)):
        rebuilt(of_segments(base, target, head, bytes(64)), base, target)


def test_endless_small_segments_are_refused() -> None:
    base = target = bytes(MAX_SEGMENTS + 1)
    assert rebuilt(of_segments(base[1:], target[1:], segment(KEEP, 1) * MAX_SEGMENTS), base[1:], target[1:])
    with pytest.raises(OutOfBounds, match="more than"):
        rebuilt(of_segments(base, target, segment(KEEP, 1) * (MAX_SEGMENTS + 1)), base, target)


# Quantised releases.


def test_a_quantised_file_is_what_its_delta_rebuilds_and_lies_within_half_a_step() -> None:
    base, new = weights(), weights(0.01)
    made = quantise(base.to_bytes(), new.to_bytes())
    assert rebuilt(made.delta, base.to_bytes(), made.weights) == made.weights
    found = Weights.from_bytes(made.weights)
    assert found.shapes == base.shapes
    for name in ("p_conv", "p_dense"):
        step = np.abs(new[name] - base[name]).reshape(len(new[name]), -1).max(axis=1) / LEVELS
        off = np.abs(found[name] - new[name]).reshape(len(step), -1)
        assert (off <= step[:, None] * 0.51 + 1e-6).all()
    assert np.array_equal(found["p_bias"], new["p_bias"]), "small arrays travel exactly"


def test_a_quantised_delta_is_a_fraction_of_the_lossless_one() -> None:
    base, new = weights(p_dense=(500, 500)), weights(0.01, p_dense=(500, 500))
    small = quantise(base.to_bytes(), new.to_bytes()).delta
    assert len(small) < 0.3 * len(base.to_bytes())
    assert len(small) < 0.5 * len(lossless(base.to_bytes(), new.to_bytes()))


def test_the_arithmetic_is_one_rounded_multiplication_and_one_rounded_addition() -> None:
    """In exact arithmetic, or with a fused multiply-add, each of these would come out otherwise."""
    chance = generator("arithmetic")
    base, scale = chance.normal(0, 1, 1000).astype("<f4"), np.float32(1 / 300)
    steps = chance.integers(-127, 128, 1000).astype(np.int8)
    product = np.array([np.float32(float(step) * float(scale)) for step in steps])
    expected = np.array([np.float32(float(b) + float(p)) for b, p in zip(base, product, strict=True)])
    fused = (base.astype(np.float64) + steps.astype(np.float64) * float(scale)).astype(np.float32)
    assert np.array_equal(added(base, steps, scale), expected)
    assert not np.array_equal(expected, fused)


def test_rows_longer_than_a_block_come_out_the_same() -> None:
    shape = {"p_long": (2, BLOCK_BYTES // 4 + 7)}
    base, new = weights(**shape), weights(0.01, **shape)
    made = quantise(base.to_bytes(), new.to_bytes())
    assert rebuilt(made.delta, base.to_bytes(), made.weights) == made.weights


def test_weights_of_another_shape_or_without_end_are_not_quantised() -> None:
    base = weights().to_bytes()
    with pytest.raises(WeightsMismatch):
        quantise(base, weights(p_dense=(64, 41)).to_bytes())
    endless = {name: array.copy() for name, array in weights().arrays.items()}
    endless["p_dense"][0, 0] = np.inf
    with pytest.raises(NotFinite):
        quantise(base, Weights(endless).to_bytes())
    for odd in (b"", b"\xff" * 16, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 4) + b'{"a"'):
        with pytest.raises(MalformedMessage):
            quantise(odd, odd)


# For devices in other languages.


@pytest.mark.parametrize("case", VECTORS["vectors"], ids=[case["name"] for case in VECTORS["vectors"]])
def test_a_committed_vector_rebuilds_as_it_says(case: dict[str, Any]) -> None:
    base, delta = bytes.fromhex(VECTORS["context"]["base"]), bytes.fromhex(case["hex"])
    out = io.BytesIO()
    ref = FileRef(Digest(case["target"]), case["size"])
    if "error" in case:
        with pytest.raises(UmbelError) as caught:
            rebuild(io.BytesIO(delta), io.BytesIO(base), out, digest_of(base), ref)
        assert type(caught.value) is BY_CODE[case["error"]]
    else:
        rebuild(io.BytesIO(delta), io.BytesIO(base), out, digest_of(base), ref)
        assert out.getvalue().hex() == case["value"]


def test_there_are_good_vectors_and_bad_ones() -> None:
    assert sum("value" in case for case in VECTORS["vectors"]) >= 3
    assert sum("error" in case for case in VECTORS["vectors"]) >= 8
