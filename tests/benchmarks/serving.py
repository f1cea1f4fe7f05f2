"""Answers over the network (Open Inference Protocol, gRPC, mutual TLS) by a coordinator held to one core.

Beside it, on the same core, a gRPC server that gives back as many bytes and does nothing, and the bare session of the
same model in a loop: what an answer costs beyond the two is ours. Asked from another core, 16 calls at a time. One
Python client can't keep a server busy, so the server's processor time per answer is compared.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from tests.benchmarks.coordinator import processor_seconds
from tests.benchmarks.harness import ROOT, Table, seconds
from tests.benchmarks.server_of import ended
from tests.serving.asking import moved_bundle
from umbel.bundle import Bundle
from umbel.clock import SystemClock
from umbel.oip import open_inference_pb2 as pb
from umbel.runtime.onnx import OnnxRuntime
from umbel_models.zoo import bundle_path
from umbel_server.app import Server, build
from umbel_server.cli.serving import log_to_stderr
from umbel_server.folder import Folder
from umbel_server.identity import Identity
from umbel_server.port_certificate import PortCertificate
from umbel_server.settings import Settings

MODEL, METHOD = "smartwatch", "/inference.GRPCInferenceService/ModelInfer"
CALLS, AT_ONCE, TURNS = 1_500, 16, 3
BATCHES = (1, 32)
ANSWER_BYTES = 100


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds an answer."""

    wall: float
    processor: float


def run() -> Table:
    found: dict[tuple[str, int], list[Measured]] = {}
    with _serving("echo") as echo, _serving("umbel") as umbel:
        for _ in range(TURNS):  # in turns, so that whatever else the machine does falls on both alike
            for batch in BATCHES:
                found.setdefault(("echo", batch), []).append(_timed(echo, _question(batch)))
                found.setdefault(("umbel", batch), []).append(_timed(umbel, _question(batch)))
        usual, slowest = _slowest_while_a_version_takes_over(umbel)
    bare = {batch: min(_bare(batch) for _ in range(TURNS)) for batch in BATCHES}
    best = {key: min(times, key=lambda one: one.processor) for key, times in found.items()}
    rows: list[tuple[str | float, ...]] = []
    for batch in BATCHES:
        for kind in ("echo", "umbel"):
            one = best[kind, batch]
            rows.append((f"{kind}, batch {batch}", 1 / one.wall, 1e6 * one.processor))
        rows.append((f"bare session in a loop, batch {batch}", 1 / bare[batch], 1e6 * bare[batch]))
    rows.append(("an answer, by one who waits for each, usual", 1 / usual, 1e6 * usual))
    rows.append(("the slowest while a new version takes over", 1 / slowest, 1e6 * slowest))
    ratios = {
        f"batch {batch}: an answer's processor time / an echo's and a bare run's": best["umbel", batch].processor
        / (best["echo", batch].processor + bare[batch])
        for batch in BATCHES
    }
    columns = ("way", "per second", "us of processor each")
    return Table("Answers over the network: smartwatch, mutual TLS, one core", columns, rows, ratios)


def _question(batch: int) -> bytes:
    x = np.random.default_rng(0).normal(0, 1, (batch, 6, 100)).astype(np.float32)
    asked = pb.ModelInferRequest(model_name=MODEL, raw_input_contents=[x.tobytes()])
    asked.inputs.add(name="x", datatype="FP32", shape=x.shape)
    return asked.SerializeToString()


def _bare(batch: int) -> float:
    bundle = Bundle.open(bundle_path(MODEL))
    session = OnnxRuntime().infer(bundle, bundle.weights())
    inputs = {"x": np.zeros((batch, 6, 100), np.float32)}
    session(inputs)
    return seconds(lambda: [session(inputs) for _ in range(CALLS)]) / CALLS


@dataclass(frozen=True, slots=True)
class _Asked:
    """A server, and how it is asked."""

    folder: Path
    pid: int
    ask: Any
    """A call of gRPC's own: bytes in, bytes out."""


def _timed(server: _Asked, question: bytes) -> Measured:
    ask = server.ask
    for _ in range(50):
        ask(question)
    before, began, waiting = processor_seconds(server.pid), time.perf_counter(), []
    for _ in range(CALLS):
        waiting.append(ask.future(question))
        if len(waiting) >= AT_ONCE:
            waiting.pop(0).result()
    for future in waiting:
        future.result()
    return Measured((time.perf_counter() - began) / CALLS, (processor_seconds(server.pid) - before) / CALLS)


def _slowest_while_a_version_takes_over(server: _Asked) -> tuple[float, float]:
    """Median of the answers before, and the slowest from the release on until the new version answers."""
    question = _question(1)
    taken: list[float] = []
    versions: list[str] = []

    def one() -> float:
        began = time.perf_counter()
        answer = server.ask(question)
        took = time.perf_counter() - began
        versions.append(pb.ModelInferResponse.FromString(answer).model_version)
        return took

    before = sorted(one() for _ in range(500))
    server.folder.joinpath("release").touch()
    while versions[-1] == versions[0]:
        taken.append(one())
    taken += [one() for _ in range(100)]
    return before[len(before) // 2], max(taken)


@contextmanager
def _serving(kind: str) -> Iterator[_Asked]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        command = [sys.executable, "-m", "tests.benchmarks.serving", kind, str(folder)]
        pipe = subprocess.PIPE
        server = stack.enter_context(subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe))
        assert server.stdin is not None and server.stdout is not None
        stack.callback(server.stdin.close)
        address = json.loads(server.stdout.readline())["address"]
        who = Identity.read(Folder(folder / "state").first_admin)
        credentials = grpc.ssl_channel_credentials(who.server_authority, who.key, who.certificate)
        options = (("grpc.enable_http_proxy", 0),)
        channel = stack.enter_context(grpc.secure_channel(address, credentials, options=options))
        asked = _Asked(folder, server.pid, channel.unary_unary(METHOD))
        while not _answers(asked):
            time.sleep(0.1)
        yield asked


def _answers(server: _Asked) -> bool:
    """Whether it has loaded its model; raises what it says otherwise."""
    try:
        server.ask(_question(1))
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:  # type: ignore[attr-defined]
            raise
        return False
    return True


# The servers, each a process of its own.


async def umbel(folder: Path) -> None:
    """A coordinator with the model on `stable`; once a file `release` is there, the next version is released."""
    clock = SystemClock()
    Folder.create(folder / "state", (), clock.now())
    ports = {"device_port": 0, "enrol_port": 0, "admin_port": 0, "inference_port": 0}
    settings = Settings(state=folder / "state", stop_seconds=0.0, log_level="error", **ports)  # type: ignore[arg-type]
    parts = build(settings, clock)
    operations = parts.coordinator.operations
    operations.add_model(MODEL, bundle_path(MODEL), "benchmark")
    operations.add_version(MODEL, 1, moved_bundle(folder / "next", 0.01), "benchmark")
    operations.publish(MODEL, 1, "stable", "benchmark")
    parts.coordinator.rollouts.reconcile()  # type: ignore[union-attr]
    server = Server(settings, parts, clock)
    addresses = await server.start()
    print(json.dumps({"address": addresses.inference}), flush=True)

    async def release() -> None:
        while not folder.joinpath("release").exists():  # noqa: ASYNC110 - another process makes it
            await asyncio.sleep(0.1)
        operations.publish(MODEL, 2, "stable", "benchmark")

    releasing = asyncio.create_task(release())
    await ended()
    releasing.cancel()
    await server.stop()


async def echo(folder: Path) -> None:
    """A gRPC server with the same certificates that gives back a few bytes."""
    clock = SystemClock()
    made = Folder.create(folder / "state", (), clock.now()).authorities()
    answer = bytes(ANSWER_BYTES)

    async def infer(question: bytes, context: object) -> bytes:
        return answer

    server = grpc.aio.server()
    service, method = METHOD.strip("/").split("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(infer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    certificate = PortCertificate(made.server, ("localhost", "127.0.0.1"), clock)
    port = server.add_secure_port("127.0.0.1:0", certificate.credentials(made.operator.certificate_pem))
    await server.start()
    print(json.dumps({"address": f"127.0.0.1:{port}"}), flush=True)
    await ended()
    await server.stop(0)


if __name__ == "__main__":
    log_to_stderr("error")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    asyncio.run({"umbel": umbel, "echo": echo}[sys.argv[1]](Path(sys.argv[2])))
