"""Questions that no model can answer, and what is said to them, over gRPC or HTTP."""

from __future__ import annotations

from tests.serving.asking import INPUTS, MODEL, question
from umbel.errors import InputMismatch, NotFound
from umbel.oip import open_inference_pb2 as pb


def raw_of(count: int) -> pb.ModelInferRequest:
    asked = question()
    asked.raw_input_contents[:] = [b"\0" * size for size in (4,) * count]
    return asked


def with_input(**changed: object) -> pb.ModelInferRequest:
    asked = question()
    for name, value in changed.items():
        if name == "shape":
            asked.inputs[0].shape[:] = value  # type: ignore[index]
        else:
            setattr(asked.inputs[0], name, value)
    return asked


def listed(datatype: str, field: str, values: list[object]) -> pb.ModelInferRequest:
    asked = pb.ModelInferRequest(model_name=MODEL)
    tensor = asked.inputs.add(name="x", datatype=datatype, shape=[len(values)])
    getattr(tensor.contents, field).extend(values)
    return asked


def both_ways() -> pb.ModelInferRequest:
    asked = question()
    asked.inputs[0].contents.fp32_contents.append(1.0)
    return asked


def twice() -> pb.ModelInferRequest:
    asked = question()
    asked.inputs.append(asked.inputs[0])
    asked.raw_input_contents.append(asked.raw_input_contents[0])
    return asked


WRONG = {
    "another model": (question(model="nobody"), NotFound, "there are smartwatch"),
    "no model": (question(model=""), NotFound, "no model ''|isn't part"),
    "another version": (question(version="3"), NotFound, "there are 1, 2"),
    "a version of many digits": (question(version="9" * 400), NotFound, "no released version"),
    "another channel": (question(version="gamma"), NotFound, "there are beta, stable"),
    "no input": (question({}), InputMismatch, "'x' is missing; give float32"),
    "another input": (question({**INPUTS, "z": INPUTS["x"]}), InputMismatch, "'z'"),
    "another shape": (question({"x": INPUTS["x"][:, :5]}), InputMismatch, r"give float32 \[batch, 6, 100\]"),
    "no example": (question({"x": INPUTS["x"][:0]}), InputMismatch, "must be 1 or more"),
    "a shape that says more": (with_input(shape=[9, 6, 100]), InputMismatch, "takes 21600 bytes; there are 19200"),
    "a shape beyond all bounds": (with_input(shape=[2**62, 6, 100]), InputMismatch, "bytes; there are"),
    "a negative shape": (with_input(shape=[-8, 6, -100]), InputMismatch, "must be 1 or more"),
    "another type": (with_input(datatype="INT32"), InputMismatch, "is int32"),
    "no type of ours": (with_input(datatype="BYTES"), InputMismatch, "models here take FP32"),
    "too few raw": (raw_of(0), InputMismatch, "takes 4800 numbers; there are 0|either data or a binary_data_size"),
    "too many raw": (raw_of(2), InputMismatch, "raw contents for 2|bytes of binary data; there are 8"),
    "both ways": (both_ways(), InputMismatch, "both raw and listed|either data or a binary_data_size"),
    "one name twice": (twice(), InputMismatch, "twice"),
    "half numbers in a list": (listed("FP16", "fp32_contents", [1.0]), InputMismatch, "raw only|as binary data only"),
    "more than a byte": (listed("UINT8", "uint_contents", [256]), InputMismatch, "no UINT8"),
    "another output": (question(outputs=[{"name": "y"}]), InputMismatch, "has no output 'y'; it has"),
}
