"""Callers of a coordinator's models, and models to ask for."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray

from tests.server.live import MODEL, Live
from umbel.bundle import Bundle, write_bundle
from umbel.oip import open_inference_pb2 as pb
from umbel.oip import open_inference_pb2_grpc as rpc
from umbel.runtime.onnx import OnnxRuntime
from umbel.successor import successor
from umbel.v1 import admin_pb2
from umbel.weights import Weights
from umbel_models.zoo import bundle_path
from umbel_server.authority import key_to_pem, make_request
from umbel_server.folder import Folder
from umbel_server.identity import Identity

BUNDLE = Bundle.open(bundle_path(MODEL))
INPUTS = {name: array.copy() for name, array in BUNDLE.golden().inputs.items()}
ANSWERS = BUNDLE.golden().outputs["logits"]


def identity(live: Live, role: str, name: str = "") -> Identity:
    """Somebody new with a role."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = admin_pb2.AddOperatorRequest(name=name or f"a-{role}", role=role, certificate_request=make_request(key))
    certificate = live.admin().AddOperator(request).certificate_chain
    return Identity(certificate, key_to_pem(key), live.parts.authorities.server.certificate_pem)


def stub(live: Live, who: Identity) -> rpc.GRPCInferenceServiceStub:
    return rpc.GRPCInferenceServiceStub(live.channel(live.addresses.inference, who.key, who.certificate))


def question(
    inputs: dict[str, NDArray[Any]] | None = None, version: str = "", model: str = MODEL, **fields: Any
) -> pb.ModelInferRequest:
    """A question with raw inputs; the golden ones, unless told otherwise."""
    asked = pb.ModelInferRequest(model_name=model, model_version=version, **fields)
    for name, array in (INPUTS if inputs is None else inputs).items():
        asked.inputs.add(name=name, datatype="FP32", shape=array.shape)
        asked.raw_input_contents.append(array.tobytes())
    return asked


def logits(answer: pb.ModelInferResponse) -> NDArray[np.float32]:
    """The raw numbers of an answer."""
    (output,), (data,) = answer.outputs, answer.raw_output_contents
    return np.frombuffer(data, "<f4").reshape(tuple(output.shape))


def moved_bundle(folder: Path, by: float) -> Path:
    """The next version of the model: all its weights a little larger."""
    weights = BUNDLE.shared_weights()
    moved = Weights({name: array + np.float32(by) for name, array in weights.arrays.items()})
    manifest, changed = successor(BUNDLE, moved, OnnxRuntime())
    files = {name: path.read_bytes() for name, path in BUNDLE.paths.items()} | dict(changed)
    write_bundle(folder, manifest, {name: files[name] for name in manifest.files})
    return folder


def add_version(live: Live, folder: Path, by: float) -> int:
    """Register such a version, for the coordinator to release."""
    bundle, operations = moved_bundle(folder, by), live.parts.coordinator.operations
    return live.do(lambda: operations.add_version(MODEL, 1, bundle, "operator:test").number)


def publish(live: Live, version: int, channel: str = "stable") -> None:
    operations = live.parts.coordinator.operations
    live.do(lambda: operations.publish(MODEL, version, channel, "operator:test"))


@contextmanager
def nothing_left_in_circles() -> Iterator[None]:
    """Fails where what was sent inside is still there, and would be until Python looks for cycles."""
    gc.collect()
    gc.disable()
    try:
        yield
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        frames = [one for one in gc.garbage if isinstance(one, FrameType) and "umbel_server" in one.f_code.co_filename]
        held = [(one.f_code.co_name, name) for one in frames for name, value in one.f_locals.items() if _is_long(value)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not held


def _is_long(value: object) -> bool:
    return isinstance(value, bytes | memoryview) and len(value) > 10_000


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.02)


def records(live: Live, caller: str) -> list[dict[str, Any]]:
    """What the coordinator has written of an operator's questions, in their order."""
    files = sorted(Folder(live.settings.state).inferences.glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line for line in lines if line["caller"] == f"operator:{caller}"]
