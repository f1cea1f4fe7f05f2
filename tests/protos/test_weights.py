"""Weights add, scale, clip and travel without changing what they mean."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from umbel.errors import MalformedMessage, NotFinite, WeightsMismatch
from umbel.weights import Weights, require_finite, require_shapes

_numbers = st.floats(-1e3, 1e3, width=32)
_shapes = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
    max_size=4,
)


def _of(shapes: dict[str, tuple[int, ...]]) -> st.SearchStrategy[Weights]:
    each = {name: arrays.arrays(np.float32, shape, elements=_numbers) for name, shape in shapes.items()}
    return st.fixed_dictionaries(each).map(Weights)


weights = _shapes.flatmap(_of)
pairs = _shapes.flatmap(lambda shapes: st.tuples(_of(shapes), _of(shapes)))


def of_file(data: bytes) -> Weights:
    """From a file that is gone when they are looked at."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        path.write_bytes(data)
        return Weights.of_file(path)


def mapped(data: bytes) -> Weights:
    """From a file that counts as a large one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("umbel.weights._MAPPED", 0)
        return of_file(data)


READERS = pytest.mark.parametrize("read", [Weights.from_bytes, of_file, mapped])
Read = Callable[[bytes], Weights]


@READERS
@given(weights)
def test_weights_survive_their_bytes(read: Read, value: Weights) -> None:
    again = read(value.to_bytes())
    assert again == value
    assert again.shapes == value.shapes
    assert again.to_bytes() == value.to_bytes()


@given(weights)
def test_weights_survive_being_one_flat_vector(value: Weights) -> None:
    vector = value.to_vector()
    assert vector.shape == (value.size,)
    assert Weights.from_vector(vector, value.shapes) == value


@given(pairs)
def test_new_minus_old_plus_old_is_new(pair: tuple[Weights, Weights]) -> None:
    new, old = pair
    back = (new - old) + old
    for name in new:
        np.testing.assert_allclose(back[name], new[name], atol=1e-3)


@given(weights, st.floats(0.001, 1e3))
def test_clipping_holds_the_bound_and_keeps_the_direction(value: Weights, bound: float) -> None:
    clipped = value.clipped(bound)
    assert clipped.norm() <= bound * (1 + 1e-5)
    if value.norm() > bound:
        for name in value:
            np.testing.assert_allclose(clipped[name], value[name] * (bound / value.norm()), rtol=1e-4, atol=1e-30)
    else:
        assert clipped is value


def test_the_order_of_names_does_not_matter() -> None:
    a, b = np.ones(2, np.float32), np.zeros(3, np.float32)
    assert Weights({"a": a, "b": b}).to_bytes() == Weights({"b": b, "a": a}).to_bytes()
    assert list(Weights({"b": b, "a": a})) == ["a", "b"]


@READERS
def test_arrays_can_not_be_written_through(read: Read) -> None:
    value = read(Weights({"p_a": np.ones(3, np.float32)}).to_bytes())
    with pytest.raises(ValueError, match="read-only"):
        value["p_a"][0] = 2.0


@READERS
@pytest.mark.parametrize("data", [b"", b"junk", b"\xff" * 64, (2**40).to_bytes(8, "little") + b"{}"])
def test_bytes_that_are_no_weights_are_malformed(read: Read, data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        read(data)


@READERS
@given(st.data())
def test_a_cut_or_bent_file_never_becomes_other_shapes(read: Read, data: st.DataObject) -> None:
    value = Weights({"p_a": np.arange(6, dtype=np.float32).reshape(2, 3), "p_b": np.ones(2, np.float32)})
    raw = bytearray(value.to_bytes())
    cut = data.draw(st.integers(0, len(raw) - 1))
    for bent in (raw[:cut], raw + b"more"):
        with pytest.raises(MalformedMessage):
            read(bytes(bent))


@READERS
def test_other_dtypes_are_malformed(read: Read) -> None:
    with pytest.raises(MalformedMessage, match=r"float64|F64"):
        read(safetensors.numpy.save({"p_a": np.ones(2)}))


def test_a_model_that_lies_in_a_file_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    path, size = tmp_path / "weights", 64 << 20
    path.write_bytes(Weights({"p_a": np.ones(size // 4, np.float32)}).to_bytes())
    process = psutil.Process()
    before = _own(process)
    value = Weights.of_file(path)
    assert value["p_a"].sum() == size // 4
    assert _own(process) - before < size // 8


def _own(process: psutil.Process) -> int:
    """What it holds in memory that stands in no file."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "'p_a' is missing"),
        ({"p_a": (2,), "p_b": (1,)}, "'p_b' is not part"),
        ({"p_a": (3,)}, r"has shape \(3,\)"),
    ],
)
def test_the_first_difference_is_named(found: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(WeightsMismatch, match=message):
        require_shapes(found, {"p_a": (2,)})


def test_a_vector_of_another_length_is_a_mismatch() -> None:
    with pytest.raises(WeightsMismatch, match="expected 2"):
        Weights.from_vector(np.zeros(3, np.float32), {"p_a": (2,)})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_array_that_is_not_finite_is_named(bad: float) -> None:
    value = Weights({"p_a": np.zeros(3, np.float32), "p_b": np.array([0, bad], np.float32)})
    assert not value.is_finite()
    with pytest.raises(NotFinite, match="p_b"):
        require_finite(value)
