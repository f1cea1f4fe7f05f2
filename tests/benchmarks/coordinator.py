"""Check-ins and uploads of one coordinator on one core, against a gRPC server that only answers.

Both are asked by the SDK's own `GrpcChannel` over mutual TLS, by the same devices at once, from another core; both run
in a process that is held to one core. The echo takes and gives messages of the same sizes and decides, checks and
stores nothing. An upload is a whole report of the smartwatch model (50 kB): asked for, sent, opened, checked, synced to
disk, committed, added, acknowledged. The server's processor time per call is what is compared, since one Python client
can't keep either of them busy.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks import server_of
from tests.benchmarks.harness import ROOT, Table
from umbel.digests import digest_of
from umbel.manifest import Manifest
from umbel.messages import release_from_bytes, update_to_bytes
from umbel.sealing import SEALED, Binding, seal
from umbel.update import Update
from umbel.visit import Assignment, CheckIn, ReportBegin
from umbel.weights import Weights
from umbel_client.enrolment import Identity, IdentityKeeper
from umbel_client.files import Disk
from umbel_client.grpc_channel import GrpcChannel
from umbel_models.zoo import bundle_path

DEVICES, CHECK_INS_EACH, AT_ONCE = 192, 10, 32
CHECK_IN = CheckIn(server_of.POPULATION, ("onnx",), (SEALED,), training_examples=400, held_back_examples=80)
QUESTION = CheckIn(server_of.POPULATION, ("onnx",), (SEALED,), offers_work=False)


@dataclass(frozen=True, slots=True)
class Measured:
    """So many calls, the wall's seconds and the server's processor seconds."""

    calls: int
    wall: float
    processor: float

    @property
    def row(self) -> tuple[float, float, float]:
        return self.calls / self.wall, self.calls / self.processor, 1e6 * self.processor / self.calls


def run() -> Table:
    found = {kind: asyncio.run(_measure(kind)) for kind in ("echo", "umbel")}
    rows: list[tuple[str | float, ...]] = []
    for what in ("check-ins", "uploads"):
        rows += [(f"{what}, {kind}", *found[kind][what].row) for kind in found]
    ratios = {
        f"{what}: umbel's processor time / echo's": found["umbel"][what].row[2] / found["echo"][what].row[2]
        for what in ("check-ins", "uploads")
    }
    columns = ("calls", "per second", "per core second", "us of processor each")
    return Table(f"Coordinator: {DEVICES} devices, mutual TLS, one core", columns, rows, ratios)


async def _measure(kind: str) -> dict[str, Measured]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "tests.benchmarks.server_of", kind, folder, str(DEVICES)]
        pipe = asyncio.subprocess.PIPE
        server = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=pipe, stdout=pipe)
        try:
            assert server.stdout is not None
            await server.stdout.readline()
            return await _ask(server.pid, Path(folder))
        finally:
            assert server.stdin is not None
            server.stdin.close()
            await server.wait()


async def _ask(pid: int, folder: Path) -> dict[str, Measured]:
    told = _told(folder)
    identities = [_identity(entry, told) for entry in told["devices"]]
    channels = [GrpcChannel(told["address"], IdentityKeeper(folder, one, Disk())) for one in identities]
    replies = await _all([channel.check_in(CHECK_IN) for channel in channels])  # connects, and gives out the work
    assigned = [reply.reply for reply in replies]
    questions = [channel.check_in(QUESTION) for _ in range(CHECK_INS_EACH) for channel in channels]
    check_ins = await _timed(pid, questions)
    reports = [_report(assignment) for assignment in assigned]
    uploads = await _timed(pid, [channel.report(*one) for channel, one in zip(channels, reports, strict=True)])
    await _all([channel.close() for channel in channels])
    return {"check-ins": check_ins, "uploads": uploads}


def _told(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(folder.joinpath("benchmark.json").read_text())
    return told


async def _timed(pid: int, calls: Sequence[Awaitable[object]]) -> Measured:
    loop = asyncio.get_running_loop()
    before, began = processor_seconds(pid), loop.time()
    await _all(calls)
    return Measured(len(calls), loop.time() - began, processor_seconds(pid) - before)


async def _all(calls: Sequence[Awaitable[Any]]) -> list[Any]:
    few = asyncio.Semaphore(AT_ONCE)

    async def one(call: Awaitable[Any]) -> Any:
        async with few:
            return await call

    return await asyncio.gather(*map(one, calls))


def _report(assignment: object) -> tuple[ReportBegin, bytes]:
    assert isinstance(assignment, Assignment), assignment
    manifest = Manifest.from_bytes((bundle_path("smartwatch") / "manifest.json").read_bytes())
    update = Update(Weights.zeros(manifest.shared_shapes), 400.0, {"loss": 1.0, "correct": 60.0, "examples": 80.0})
    report_id = secrets.token_hex(16)
    base = release_from_bytes(assignment.base.statement).bundle
    binding = Binding(assignment.task, assignment.round, assignment.session_id, report_id, base)
    sealed = seal(update_to_bytes(update), assignment.sealing, binding)
    token = assignment.upload_token
    return ReportBegin(assignment.session_id, report_id, token, len(sealed), digest_of(sealed)), sealed


def _identity(entry: dict[str, str], told: dict[str, Any]) -> Identity:
    chain, key = entry["certificate"].encode(), entry["key"].encode()
    return Identity(key, chain, told["authority"].encode(), bytes(32), server_of.POPULATION, told["address"])


def processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
