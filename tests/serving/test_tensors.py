"""The Open Inference Protocol's tensors: what goes in comes out, and nothing is taken for what it isn't."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from numpy.typing import NDArray

from umbel.errors import InputMismatch
from umbel.manifest import DTYPES
from umbel.oip import open_inference_pb2 as pb
from umbel_server.serving.tensors import DATATYPES, add_outputs, inputs_of

ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=1, max_dims=3, max_side=4))
)


def sent_back(arrays: dict[str, NDArray[Any]], *, raw: bool) -> dict[str, NDArray[Any]]:
    """Through an answer, which is made into a question again."""
    answer = pb.ModelInferResponse()
    add_outputs(answer, arrays, raw=raw)
    asked = pb.ModelInferRequest(raw_input_contents=answer.raw_output_contents)
    for output in answer.outputs:
        tensor = asked.inputs.add(name=output.name, datatype=output.datatype, shape=output.shape)
        if not answer.raw_output_contents:
            tensor.contents.CopyFrom(output.contents)
    return inputs_of(pb.ModelInferRequest.FromString(asked.SerializeToString()))


def test_every_type_that_a_manifest_may_name_has_its_name_in_the_protocol() -> None:
    assert set(DATATYPES.values()) == set(DTYPES)


@given(st.dictionaries(st.sampled_from("abc"), ARRAYS, min_size=1), st.booleans())
def test_arrays_come_back_as_they_went_bit_by_bit(arrays: dict[str, NDArray[Any]], raw: bool) -> None:
    found = sent_back(arrays, raw=raw)
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        if array.dtype.kind == "f":
            np.testing.assert_array_equal(found[name], array)  # a NaN may lose its payload on its way through a list
        else:
            assert found[name].tobytes() == array.tobytes()


def test_numbers_travel_little_endian_and_row_major() -> None:
    answer = pb.ModelInferResponse()
    columns = np.asfortranarray(np.array([[1, 2], [3, 4]], np.int32))
    add_outputs(answer, {"y": columns}, raw=True)
    assert answer.raw_output_contents[0].hex() == "01000000020000000300000004000000"


def test_half_numbers_travel_raw_whatever_was_asked_for() -> None:
    answer = pb.ModelInferResponse()
    add_outputs(answer, {"y": np.ones(2, np.float16), "z": np.ones(1, np.float32)}, raw=False)
    assert [len(data) for data in answer.raw_output_contents] == [4, 4]


def test_any_byte_but_zero_is_true_and_becomes_one() -> None:
    asked = pb.ModelInferRequest(raw_input_contents=[b"\x00\x01\xff"])
    asked.inputs.add(name="x", datatype="BOOL", shape=[3])
    assert inputs_of(asked)["x"].tobytes() == b"\x00\x01\x01"


@given(ARRAYS, st.lists(st.integers(-3, 2**62), max_size=4))
@example(np.array([], np.float32), [0, 2**61])  # more than numpy can address, although nothing is in it
def test_bytes_that_do_not_fill_the_shape_are_refused(array: NDArray[Any], shape: list[int]) -> None:
    asked = pb.ModelInferRequest(raw_input_contents=[array.tobytes()])
    asked.inputs.add(name="x", datatype={v: k for k, v in DATATYPES.items()}[array.dtype.name], shape=shape)
    try:
        found = inputs_of(asked)["x"]
    except InputMismatch:
        return
    assert list(found.shape) == shape and found.nbytes == array.nbytes


def test_more_outputs_than_memory_are_never_made() -> None:
    asked = pb.ModelInferRequest(raw_input_contents=[b""])
    asked.inputs.add(name="x", datatype="FP32", shape=[2**62, 2**62, 2**62])
    with pytest.raises(InputMismatch, match="bytes; there are 0"):
        inputs_of(asked)
