"""Whatever bytes arrive, a decoder answers with a value or with a `UmbelError`: nothing else gets out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

from tests.protos import examples
from umbel import messages
from umbel.digests import digest_of
from umbel.errors import BadInput, UmbelError
from umbel.manifest import GOLDEN_FILE, WEIGHTS_FILE, FileRef, Manifest, TensorSpec
from umbel.randomness import generator
from umbel.v1 import device_pb2 as pb
from umbel.v1 import release_pb2
from umbel.weights import Weights

Decode = Callable[[bytes], object]
INPUTS = 5_000
"""For each decoder; 50,000 in all."""

MANIFEST = Manifest(
    model="m",
    inputs=(TensorSpec("x", "float32", (None, 6, 100)),),
    targets=(TensorSpec("y", "int64", (None,)),),
    outputs=(TensorSpec("scores", "float32", (None, 7)),),
    trainable=(TensorSpec("p_a", "float32", (2, 3)),),
    buffers=(TensorSpec("b_a", "float32", ()),),
    frozen=(),
    slots=(TensorSpec("s_a", "float32", (2, 3)),),
    hyperparameters={"lr": 0.05},
    metrics=("loss", "correct", "examples"),
    graphs={"onnx": {"infer": "infer.onnx"}},
    files={name: FileRef(digest_of(name.encode()), 10) for name in (WEIGHTS_FILE, GOLDEN_FILE, "infer.onnx")},
)

DECODERS: dict[str, tuple[Decode, bytes]] = {
    "check-in": (
        lambda data: messages.check_in_from_message(messages.parse(pb.CheckInRequest, data)),
        messages.check_in_to_message(examples.CHECK_IN).SerializeToString(),
    ),
    "assignment": (
        lambda data: messages.check_in_reply_from_message(messages.parse(pb.CheckInResponse, data)),
        messages.check_in_reply_to_message(examples.WORK).SerializeToString(),
    ),
    "retry": (
        lambda data: messages.check_in_reply_from_message(messages.parse(pb.CheckInResponse, data)),
        messages.check_in_reply_to_message(examples.LATER).SerializeToString(),
    ),
    "plan": (
        lambda data: messages.plan_from_message(messages.parse(pb.Plan, data)),
        messages.plan_to_message(examples.PLAN).SerializeToString(),
    ),
    "report-begin": (
        lambda data: messages.report_begin_from_message(messages.parse(pb.ReportBegin, data)),
        messages.report_begin_to_message(examples.REPORT_BEGIN).SerializeToString(),
    ),
    "signed-release": (
        lambda data: messages.signed_from_message(messages.parse(release_pb2.SignedRelease, data)),
        messages.signed_to_message(examples.SIGNED).SerializeToString(),
    ),
    "release": (messages.release_from_bytes, messages.release_to_bytes(examples.RELEASE)),
    "update": (
        lambda data: messages.update_from_bytes(data, examples.UPDATE.delta.shapes, 100.0),
        messages.update_to_bytes(examples.UPDATE),
    ),
    "weights": (Weights.from_bytes, examples.UPDATE.delta.to_bytes()),
    "manifest": (Manifest.from_bytes, MANIFEST.to_bytes()),
}

TOKENS = (b"\xff" * 10, b"\0", b"\x80", b"null", b"-1", b"1e999", b"1" + b"0" * 400, b"NaN", b"[]", b"{}", b'""', b"\n")


def mutations(good: bytes, *purpose: str) -> Iterator[bytes]:
    """Noise, truncations, flips, splices, and numbers at the edge, drawn by purpose: the same at every run."""
    chance = generator("fuzz", *purpose)
    for _ in range(INPUTS):
        data = bytearray(good)
        match int(chance.integers(6)):
            case 0:
                data = bytearray(chance.bytes(int(chance.integers(0, 120))))
            case 1:
                del data[int(chance.integers(len(data))) :]
            case 2:
                for _ in range(int(chance.integers(1, 5))):
                    data[int(chance.integers(len(data)))] ^= 1 << int(chance.integers(8))
            case 3:
                start, stop = sorted(int(at) for at in chance.integers(0, len(data) + 1, 2))
                data[start:stop] = good[: int(chance.integers(0, 40))]
            case 4:
                start, length = int(chance.integers(len(data))), int(chance.integers(0, 6))
                data[start : start + length] = TOKENS[int(chance.integers(len(TOKENS)))]
            case _:
                data += good[int(chance.integers(len(data))) :]
        yield bytes(data)


@pytest.mark.parametrize("kind", DECODERS)
def test_nothing_but_a_value_or_a_named_refusal_comes_out(kind: str) -> None:
    decode, good = DECODERS[kind]
    decode(good)
    refused = 0
    for data in mutations(good, kind):
        try:
            decode(data)
        except BadInput:
            refused += 1
    # Were most inputs fine, the mutations would be too tame to show anything.
    assert refused > INPUTS // 4


@pytest.mark.parametrize("kind", ["check-in", "report-begin", "update", "release"])
def test_what_a_decoder_lets_through_encodes_and_decodes_to_itself(kind: str) -> None:
    """A value that came from outside is as good as one made here: nothing in it breaks a later step."""
    encoders: dict[str, Callable[..., bytes]] = {
        "check-in": lambda value: messages.check_in_to_message(value).SerializeToString(),
        "report-begin": lambda value: messages.report_begin_to_message(value).SerializeToString(),
        "update": messages.update_to_bytes,
        "release": messages.release_to_bytes,
    }
    decode, good = DECODERS[kind]
    taken = 0
    for data in mutations(good, kind, "twice"):
        try:
            value = decode(data)
        except UmbelError:
            continue
        taken += 1
        assert decode(encoders[kind](value)) == value
    assert taken > 20


@pytest.mark.parametrize(
    "value", ["1" + "0" * 400, "1e999", "-1", "NaN", "true", "null", '"x"', r'"\ud800"', "[[[]]]", "{}"]
)
@pytest.mark.parametrize(
    "key",
    sorted(["golden_tolerance", "description", "labels", "format", "hyperparameters", "files", "graphs", "inputs"]),
)
def test_a_manifest_with_an_odd_json_value_is_refused_or_read(key: str, value: str) -> None:
    tree = json.loads(MANIFEST.to_bytes())
    tree[key] = "@"
    text = json.dumps(tree).replace('"@"', value)
    for spoilt in (text, text.replace("0.05", value), text.replace("10]", f"{value}]")):
        try:
            manifest = Manifest.from_bytes(spoilt.encode())
        except BadInput:
            continue
        assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def test_deeply_nested_json_is_refused() -> None:
    with pytest.raises(BadInput):
        Manifest.from_bytes(b"[" * 100_000)


def test_weights_of_another_dtype_are_refused() -> None:
    for dtype in (np.float64, np.float16, np.int32):
        with pytest.raises(BadInput, match="float32"):
            Weights.from_bytes(safetensors.numpy.save({"p_a": np.ones(2, dtype)}))


def test_a_manifest_that_reads_back_is_the_same() -> None:
    assert Manifest.from_bytes(MANIFEST.to_bytes()) == MANIFEST
    assert replace(MANIFEST, model="n").digest != MANIFEST.digest
