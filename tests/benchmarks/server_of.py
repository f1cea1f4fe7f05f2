"""The servers that `coordinator.py` asks, each a process on one core: `umbel`, or an `echo` of the same messages.

Writes its address and its devices' certificates to `benchmark.json` in its folder, prints "ready", and stops when its
standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from umbel.clock import SystemClock
from umbel.digests import Digest
from umbel.messages import check_in_reply_to_message, release_to_bytes, window_to_message
from umbel.plan import Plan
from umbel.release import STABLE, Release, SignedRelease
from umbel.sealing import SEALED, Sealing
from umbel.v1 import device_pb2 as pb
from umbel.v1 import device_pb2_grpc as rpc
from umbel.visit import Assignment, CheckInReply, Retry, RetryWindow
from umbel_models.zoo import bundle_path
from umbel_server.app import Server, build
from umbel_server.authority import PeerKind, key_to_pem, make_request
from umbel_server.folder import Folder
from umbel_server.settings import Settings
from umbel_server.task import Task

POPULATION = "wearers"


async def umbel(folder: Path, count: int) -> None:
    """A coordinator with one task, whose round wants every device."""
    clock = SystemClock()
    Folder.create(folder, (), clock.now())
    settings = Settings(state=folder, device_port=0, enrol_port=0, admin_port=0, stop_seconds=0.0, log_level="error")
    parts = build(settings, clock)
    tokens, _ = parts.access.create_tokens("benchmark", POPULATION, count, 3600.0)
    devices = []
    for token in tokens:
        key = ec.generate_private_key(ec.SECP256R1())
        enrolled = parts.access.enrol(token, make_request(key), b"")
        devices.append({"certificate": enrolled.certificate_chain.decode(), "key": key_to_pem(key).decode()})
    operations = parts.coordinator.operations
    operations.add_model("smartwatch", bundle_path("smartwatch"), "benchmark")
    operations.create_task(
        Task("bench", POPULATION, "smartwatch", goal=count + 1, deadline_seconds=3600.0, updates_private=False),
        "benchmark",
    )
    server = Server(settings, parts, clock)
    addresses = await server.start()
    tell(folder, addresses.device, parts.access.server_authority.decode(), devices)
    await ended()
    await server.stop()


class Echo(rpc.DeviceServiceServicer):
    """Answers of the usual sizes, to whatever is asked."""

    def __init__(self) -> None:
        window = RetryWindow(1.0, 2.0)
        release = Release("smartwatch", 1, 1, STABLE, Digest("0" * 64), 3000, 1.0)
        base = SignedRelease(release_to_bytes(release), "0" * 16, bytes(64))
        sealing = Sealing(SEALED, bytes([9]) + bytes(31))
        work = Assignment("0" * 32, "bench", 1, Plan(), base, sealing, bytes(32), 2e9, window, window)
        self._work = check_in_reply_to_message(CheckInReply(work))
        self._none = check_in_reply_to_message(CheckInReply(Retry(window), base))
        self._accepted = pb.ReportResponse(accepted=pb.ReportAccepted(next=window_to_message(window)))

    async def CheckIn(self, request: pb.CheckInRequest, context: object) -> pb.CheckInResponse:  # noqa: N802
        return self._work if request.offers_work else self._none

    async def Report(  # noqa: N802
        self, requests: AsyncIterator[pb.ReportRequest], context: object
    ) -> AsyncIterator[pb.ReportResponse]:
        await anext(requests)
        yield pb.ReportResponse(proceed=pb.ReportProceed(offset=0))
        async for _ in requests:
            pass
        yield self._accepted


async def echo(folder: Path, count: int) -> None:
    """A gRPC server with the same certificates that stores nothing."""
    clock = SystemClock()
    Folder.create(folder, (), clock.now())
    authorities = Folder(folder).authorities()
    devices = []
    for _ in range(count):
        key = ec.generate_private_key(ec.SECP256R1())
        chain = authorities.device.issue(key.public_key(), PeerKind.DEVICE, POPULATION, clock.now(), 3600.0)
        devices.append({"certificate": chain.decode(), "key": key_to_pem(key).decode()})
    key = ec.generate_private_key(ec.SECP256R1())
    chain = authorities.server.issue_server(key.public_key(), ("127.0.0.1",), clock.now())
    server = grpc.aio.server()
    rpc.add_DeviceServiceServicer_to_server(Echo(), server)
    credentials = grpc.ssl_server_credentials(
        [(key_to_pem(key), chain)], authorities.device.certificate_pem, require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    tell(folder, f"127.0.0.1:{port}", authorities.server.certificate_pem.decode(), devices)
    await ended()
    await server.stop(0)


def tell(folder: Path, address: str, authority: str, devices: list[dict[str, str]]) -> None:
    told = {"address": address, "authority": authority, "devices": devices}
    folder.joinpath("benchmark.json").write_text(json.dumps(told))
    print("ready", flush=True)


async def ended() -> None:
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    asyncio.run({"umbel": umbel, "echo": echo}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3])))
