"""Tensors in JSON and behind it: what goes in comes out, and nothing is taken for what it isn't."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray

from umbel.errors import InputMismatch, MalformedMessage
from umbel.manifest import DTYPES
from umbel_server.serving.inference import Answer
from umbel_server.serving.rest_messages import AT_ONCE, Asked, read, written

ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=1, max_dims=3, max_side=4))
)


def sent_back(arrays: dict[str, NDArray[Any]], in_bytes: dict[str, bool]) -> dict[str, NDArray[Any]]:
    """Through an answer, which is made into a question again."""
    text, binary = written(Answer(1, arrays), Asked("", (), in_bytes, False), "m")
    told = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    return read(json.dumps({"inputs": told["outputs"]}).encode(), memoryview(b"".join(binary))).arrays()


@given(st.dictionaries(st.sampled_from("abc"), st.tuples(ARRAYS, st.booleans()), min_size=1))
def test_arrays_come_back_as_they_went_bit_by_bit(sent: dict[str, tuple[NDArray[Any], bool]]) -> None:
    arrays = {name: array for name, (array, _) in sent.items()}
    found = sent_back(arrays, {name: raw or arrays[name].dtype == np.float16 for name, (_, raw) in sent.items()})
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        if array.dtype.kind == "f":
            np.testing.assert_array_equal(found[name], array)  # a NaN may lose its payload on its way through JSON
        else:
            assert found[name].tobytes() == array.tobytes()


def test_what_json_has_no_number_for_is_written_so_that_numpy_reads_it() -> None:
    strange = np.array([1.5, np.nan, np.inf, -np.inf], np.float32)
    text, _ = written(Answer(3, {"y": strange}), Asked("", (), {}, False), "m")
    (output,) = json.loads(text)["outputs"]
    assert output["data"] == [1.5, "NaN", "Infinity", "-Infinity"]
    np.testing.assert_array_equal(np.array(output["data"], np.float32), strange)
    bare = text.replace(b'"NaN"', b"NaN").replace(b'"Infinity"', b"Infinity")
    asked = read(bare.replace(b"outputs", b"inputs"), memoryview(b""))
    np.testing.assert_array_equal(asked.arrays()["y"], strange)


def test_numbers_that_are_written_piece_by_piece_are_all_there() -> None:
    many = np.arange(2 * AT_ONCE + 3, dtype=np.int64)
    np.testing.assert_array_equal(sent_back({"y": many}, {})["y"], many)


def test_half_numbers_travel_in_bytes_or_not_at_all() -> None:
    halves = {"y": np.ones(2, np.float16)}
    with pytest.raises(InputMismatch, match="FP16, which travels as binary data only"):
        written(Answer(1, halves), Asked("", (), {}, False), "m")
    assert sent_back(halves, {"y": True})["y"].tobytes() == halves["y"].tobytes()


def asked(**changed: Any) -> bytes:
    told = {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]} | changed
    return json.dumps({"inputs": [{name: one for name, one in told.items() if one is not ...}]}).encode()


SIZE = {"binary_data_size": 16}
NO_TENSORS = {
    "a number for text": (asked(data=["1", "2", "3", "4"]), "no FP32: str"),
    "a truth for a number": (asked(data=[True, 2, 3, 4]), "no FP32: bool"),
    "a number for a truth": (asked(datatype="BOOL"), "no BOOL: int"),
    "nothing for a number": (asked(data=[None, 2, 3, 4]), "no FP32: NoneType"),
    "a fraction for a whole number": (asked(datatype="INT32", data=[1.5, 2, 3, 4]), "no INT32: float"),
    "NaN for a whole number": (asked(datatype="INT64", data=["NaN", 2, 3, 4]), "no INT64: str"),
    "a number with no room": (asked(data=[1e300, 2, 3, 4]), "no FP32"),
    "a whole number with no room": (asked(data=[10**400, 2, 3, 4]), "no FP32"),
    "more than a byte": (asked(datatype="UINT8", data=[256, 2, 3, 4]), "no UINT8"),
    "a type of others": (asked(datatype="FP64"), "models here take FP32"),
    "half numbers in JSON": (asked(datatype="FP16"), "FP16, which travels as binary data only"),
    "too few numbers": (asked(data=[1, 2, 3]), "takes 4 numbers; there are 3"),
    "lists of other sizes": (asked(data=[[1, 2, 3, 4]]), "lists of"),
    "lists of unequal sizes": (asked(data=[[1, 2, 3], [4]]), "nested"),
    "lists among numbers": (asked(data=[1, [2], 3, 4]), "no FP32: list"),
    "numbers among lists": (asked(data=[[1, 2], 3]), "nested"),
    "lists too deep": (asked(data=[[[1], [2]], [[3], [4]]]), "nested"),
    "sizes without end": (asked(shape=[2**62] * 100_000), "100000 sizes; 64 are the most"),
    "a size of nothing": (asked(shape=[0, 2], data=[]), "1 or more"),
    "bytes that aren't there": (asked(parameters=SIZE, data=...), "says 16 bytes of binary data; there are 4"),
    "bytes less than none": (asked(parameters={"binary_data_size": -4}, data=...), "says -4 bytes"),
    "bytes that nobody claims": (asked(), "0 bytes of binary data; there are 4"),
    "one input twice": (
        json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}] * 2}).encode(),
        "twice",
    ),
    "data twice": (asked(parameters={"binary_data_size": 4}), "either data or"),
    "no data": (asked(data=...), "either data or"),
}


@pytest.mark.parametrize("case", NO_TENSORS)
def test_data_that_are_not_what_they_are_called_are_refused(case: str) -> None:
    text, words = NO_TENSORS[case]
    with pytest.raises(InputMismatch, match=words):
        read(text, memoryview(b"1234" if "bytes" in case or case == "data twice" else b"")).arrays()


NO_QUESTIONS = {
    "no JSON": (b"{", "isn't JSON"),
    "no text": (b"\xff\xfe\xff", "isn't JSON"),
    "no object": (b"[]", "isn't a JSON object"),
    "one name twice": (b'{"inputs":[],"inputs":[]}', "one name stands twice"),
    "one name twice, inside": (b'{"inputs":[{"name":"x","name":"y"}]}', "one name stands twice"),
    "lists without end": (b"[" * 200_000, "isn't JSON"),
    "objects without end": (b'{"a":' * 200_000, "isn't JSON"),
    "digits without end": (b'{"inputs":' + b"9" * 10_000 + b"}", "isn't JSON"),
    "no inputs": (b"{}", "no 'inputs'"),
    "inputs that are none": (b'{"inputs":{"x":1}}', "'inputs' is no list"),
    "an input that is none": (b'{"inputs":["x"]}', "no JSON object"),
    "a name that is none": (asked(name=7), "'name' is no str"),
    "no name": (asked(name=...), "no 'name'"),
    "a size that is none": (asked(shape=[2, True]), "isn't a list of sizes"),
    "a size that is text": (asked(shape=["2", 2]), "isn't a list of sizes"),
    "a size with no room": (asked(shape=[2**63]), "isn't a list of sizes"),
    "a number of bytes that is none": (asked(parameters={"binary_data_size": "16"}), "is no int"),
    "an id that is none": (b'{"id":7,"inputs":[]}', "'id' is no str"),
    "an output that is none": (b'{"inputs":[],"outputs":["y"]}', "no JSON object"),
    "a wish that is none": (b'{"inputs":[],"parameters":{"binary_data_output":1}}', "is no bool"),
}


@pytest.mark.parametrize("case", NO_QUESTIONS)
def test_what_is_no_question_is_refused(case: str) -> None:
    text, words = NO_QUESTIONS[case]
    with pytest.raises(MalformedMessage, match=words) as found:
        read(text, memoryview(b""))
    assert len(str(found.value)) < 400
