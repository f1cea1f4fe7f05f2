"""A real coordinator and a real helper as processes of their own, and devices whose secrets the one who asks knows."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from tests.server.processes import wait_until
from umbel.clock import SystemClock
from umbel.descriptor import RoundDescriptor, rd_of
from umbel.digests import digest_of
from umbel.secure_sum import Fresh, Participant, encode_update, seal_report
from umbel.visit import Assignment, CheckIn, ReportBegin
from umbel_client.cli import main as umbel_device
from umbel_client.enrolment import IdentityKeeper, load_identity
from umbel_client.files import Disk
from umbel_client.grpc_channel import GrpcChannel
from umbel_client.private import PrivacyPolicy, load_pinned, verify_round
from umbel_client.trust import Trust
from umbel_models.zoo import bundle_path
from umbel_simulations.demo.operator import UMBEL, HelperOperator, Operator
from umbel_simulations.demo.programs import Programs

POPULATION, MODEL, TASK = "wrists", "smartwatch", "learn"
_TASK = """\
name = "learn"
population = "wrists"
model = "smartwatch"
rounds = 1
goal = {goal}
minimum = {minimum}

[plan]
clip_norm = 1.0
max_weight = 1.0

[validation]
max_accuracy_drop = 1.0
max_step_ratio = 0.0
"""


@dataclass
class Parties:
    """Where both live, and which processes they are."""

    operator: Operator
    helper: HelperOperator
    leader_process: int
    helper_process: int


@contextmanager
def parties(folder: Path, goal: int, minimum: int) -> Iterator[Parties]:
    """Both running, with a private task whose first round both have signed."""
    operator, helper = Operator(folder / "leader"), HelperOperator(folder / "helper")
    operator.init()
    helper.init(operator.release_key, minimum)
    with Programs(folder / "logs") as programs:
        programs.start("helper", [*UMBEL, "helper", "run", "--state", str(helper.state)])
        wait_until(helper.listens, "the helper listens")
        ready = folder / "ready.json"
        ports = [f"--{port}-port=0" for port in ("device", "enrol", "admin")]
        serve = ["serve", "--state", str(operator.state), "--helper", str(helper.card), "--ready-file", str(ready)]
        programs.start("leader", [*UMBEL, *serve, *ports])
        wait_until(ready.exists, "the coordinator listens")
        operator.call("models", "add", str(bundle_path(MODEL)), "--name", MODEL)
        (folder / "task.toml").write_text(_TASK.format(goal=goal, minimum=minimum))
        operator.call("tasks", "create", "--file", str(folder / "task.toml"))
        yield Parties(operator, helper, *(programs._running[name].pid for name in ("leader", "helper")))


@dataclass
class KnownDevice:
    """An enrolled device that draws its update, and tells all its secrets."""

    home: Path
    seed: int
    update: NDArray[np.float32] = field(init=False)
    clear: bytes = b""
    """The encoded update before it was masked."""
    fresh: Fresh | None = None
    report_id: bytes = b""
    body: bytes = b""
    """What is sealed to the leader inside its report, as it travels."""
    descriptor: RoundDescriptor | None = None
    rd: bytes = b""

    @classmethod
    def enrolled(cls, parties: Parties, home: Path, seed: int, code: str, token: str) -> KnownDevice:
        """Through the commands that a user types."""
        helper = ["--helper", str(parties.helper.card), "--helper-token", token]
        if umbel_device(["--home", str(home), "enrol", "--code", code, *helper]):
            raise RuntimeError(f"{home.name} wasn't enrolled")
        return cls(home, seed)

    def reports(self) -> None:
        """One visit: check in, believe the round or not, split the update, send it."""
        asyncio.run(self._visit())

    async def _visit(self) -> None:
        identity = load_identity(self.home)
        channel = GrpcChannel(identity.device_address, IdentityKeeper(self.home, identity, Disk()))
        try:
            assignment = await self._assignment(channel)
            sealed = self._sealed(assignment)
            begin = ReportBegin(
                assignment.session_id, self.report_id.hex(), assignment.upload_token, len(sealed), digest_of(sealed)
            )
            await channel.report(begin, sealed)
        finally:
            await channel.close()

    async def _assignment(self, channel: GrpcChannel) -> Assignment:
        offered = CheckIn(
            POPULATION, runtimes=("onnx",), suites=("umbel-2agg/1",), training_examples=50, held_back_examples=20
        )
        for _ in range(600):
            reply = (await channel.check_in(offered)).reply
            if isinstance(reply, Assignment):
                return reply
            await asyncio.sleep(0.1)  # the helper hasn't signed yet
        raise RuntimeError("no round was opened")

    def _sealed(self, assignment: Assignment) -> bytes:
        pinned, identity = load_pinned(self.home), load_identity(self.home)
        assert pinned is not None and assignment.private_round is not None
        base = Trust(identity.release_key).verify_base(assignment.base).bundle
        keys, floors = (identity.release_key, pinned.card.identity), PrivacyPolicy(minimum_cohort=2)
        signed, now = assignment.private_round, SystemClock().now()
        descriptor = verify_round(signed, assignment, base, POPULATION, keys, floors, now)
        chance = np.random.default_rng(self.seed)
        vector = chance.standard_normal(descriptor.size)
        self.update = (vector * 0.9 / np.linalg.norm(vector)).astype(np.float32)
        clear = encode_update(descriptor, self.update, 1, {"loss": 1.0}, chance)
        self.clear, self.fresh, self.report_id = (
            clear.to_bytes(),
            Fresh.draw(secrets.token_bytes),
            secrets.token_bytes(16),
        )
        self.descriptor, self.rd = descriptor, rd_of(signed.statement)
        device = Participant(Ed25519PrivateKey.from_private_bytes(pinned.key), pinned.certificate)
        shares = seal_report(descriptor, self.rd, self.report_id, clear, device, self.fresh)
        self.body = bytes(shares.body)
        return shares.to_bytes()
