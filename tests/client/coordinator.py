"""A small coordinator for tests: real values, real signatures, real seals; it does what a test tells it to.

`Coordinator` holds what a coordinator knows. `DirectChannel` joins a device to it in one process, encoding and
decoding every message; `grpc_peer.py` serves it over real sockets.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from umbel.bundle import Bundle
from umbel.digests import Digest, digest_of, verify_digest
from umbel.errors import NotFound, RoundClosed, UmbelError, Unreachable
from umbel.manifest import FileRef
from umbel.messages import (
    check_in_from_message,
    check_in_reply_from_message,
    check_in_reply_to_message,
    check_in_to_message,
    release_to_bytes,
    update_from_bytes,
)
from umbel.plan import Plan
from umbel.release import STABLE, Release, SignedRelease, sign_statement
from umbel.runtime.onnx import OnnxRuntime
from umbel.sealing import SEALED, Binding, Sealing, open_sealed
from umbel.successor import successor
from umbel.update import Update
from umbel.v1 import device_pb2 as pb
from umbel.visit import Assignment, CheckIn, CheckInReply, ReportBegin, Retry, RetryWindow
from umbel.weights import Weights
from umbel_client.channel import Traffic
from umbel_models.zoo import bundle_path

CHUNK = 4096
SOON = RetryWindow(0.0, 0.01)
POPULATION = "wrists"


@dataclass
class Coordinator:
    """What the far side knows, and what it was told."""

    now: Callable[[], float]
    release_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    sealing_key: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    blobs: dict[str, bytes] = field(default_factory=dict)
    newest: SignedRelease | None = None
    bases: dict[str, Release] = field(default_factory=dict)
    tasks: list[Plan] = field(default_factory=list)
    """Plans that the next check-ins get, one each."""
    open: dict[str, Assignment] = field(default_factory=dict)
    uploads: dict[str, bytearray] = field(default_factory=dict)
    updates: dict[str, Update] = field(default_factory=dict)
    """By report id."""
    check_ins: list[CheckIn] = field(default_factory=list)
    closed: bool = False
    """The round has enough: reports are refused before their bytes are sent."""
    break_upload_after: int = -1
    """Lose the connection once so many bytes of a report have come."""

    # What a coordinator publishes.

    def publish(
        self,
        weights: Weights | None = None,
        *,
        channel: str = STABLE,
        number: int = 0,
        labels: tuple[str, ...] | None = None,
        spoil: Callable[[bytes], bytes] | None = None,
    ) -> SignedRelease:
        """Sign a new release of the packaged model, with other weights if given; channel "candidate" isn't newest.

        Args:
            weights, channel, number: of the release.
            labels: of its model, if other than they are.
            spoil: what a hostile publisher makes of the graph that answers.
        """
        parent = Bundle.open(bundle_path("smartwatch"))
        manifest, files = parent.manifest, {n: p.read_bytes() for n, p in parent.paths.items()}
        if weights is not None:
            manifest, changed = successor(parent, weights, OnnxRuntime())
            files |= changed
        if labels is not None:
            manifest = replace(manifest, labels=labels)
        if spoil is not None:
            name = parent.graph_file("onnx", "infer")
            files[name] = spoil(files[name])
            ref = FileRef(digest_of(files[name]), len(files[name]))
            manifest = replace(manifest, files={**manifest.files, name: ref})
        for data in (manifest.to_bytes(), *files.values()):
            self.blobs[digest_of(data)] = data
        number = number or len(self.bases) + 1
        release = Release(
            manifest.model, number, number, channel, manifest.digest, len(manifest.to_bytes()), round(self.now(), 3)
        )
        signed = sign_statement(release_to_bytes(release), self.release_key)
        self.bases[manifest.digest] = release
        if channel == STABLE:
            self.newest = signed
        return signed

    # What a device asks.

    def check_in(self, message: pb.CheckInRequest) -> pb.CheckInResponse:
        check_in = check_in_from_message(message)
        self.check_ins.append(check_in)
        if not self.tasks or self.newest is None or not check_in.offers_work:
            return check_in_reply_to_message(CheckInReply(Retry(SOON, "nothing to do"), self.newest))
        number = len(self.open) + 1
        session = f"session-{number}"
        self.open[session] = Assignment(
            session_id=session,
            task="learn",
            round=number,
            plan=self.tasks.pop(0),
            base=self.newest,
            sealing=Sealing(SEALED, self.sealing_key.public_key().public_bytes_raw()),
            upload_token=b"token-" + session.encode(),
            deadline=self.now() + 600,
            if_accepted=SOON,
            if_rejected=RetryWindow(5.0, 6.0),
        )
        return check_in_reply_to_message(CheckInReply(self.open[session], self.newest))

    def read(self, digest: str, offset: int) -> bytes:
        if digest not in self.blobs:
            raise NotFound(f"no blob {digest}")
        return self.blobs[digest][offset:]

    def begin(self, begin: ReportBegin) -> int:
        assert begin.upload_token == self.open[begin.session_id].upload_token
        if begin.report_id in self.updates:
            return begin.sealed_size
        if self.closed:
            raise RoundClosed("the round has enough reports")
        return len(self.uploads.setdefault(begin.report_id, bytearray()))

    def append(self, begin: ReportBegin, chunk: bytes) -> None:
        held = self.uploads[begin.report_id]
        if 0 <= self.break_upload_after <= len(held):
            self.break_upload_after = -1
            raise Unreachable("the line went dead")
        held += chunk

    def finish(self, begin: ReportBegin) -> RetryWindow:
        if begin.report_id not in self.updates:
            sealed = bytes(self.uploads[begin.report_id])
            verify_digest(sealed, begin.sealed_digest)
            self.updates[begin.report_id] = self._opened(begin, sealed)
        return SOON

    def _opened(self, begin: ReportBegin, sealed: bytes) -> Update:
        assigned = self.open[begin.session_id]
        base = next(r for r in self.bases.values() if release_to_bytes(r) == assigned.base.statement)
        binding = Binding(assigned.task, assigned.round, begin.session_id, begin.report_id, base.bundle)
        body = pb.UpdateBody.FromString(open_sealed(sealed, self.sealing_key, binding))
        shapes = Bundle.open(bundle_path("smartwatch")).manifest.shared_shapes if body.delta else {}
        return update_from_bytes(body.SerializeToString(), shapes, assigned.plan.max_weight)


class DirectChannel:
    """A `Channel` in one process; every value is encoded and decoded. Tests may break it at any call."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.traffic = Traffic()
        self.down: UmbelError | None = None
        """What every call fails with, while set."""
        self.calls: list[str] = []
        self.tamper: Callable[[Digest, bytes], bytes] = lambda digest, data: data
        """What a hostile or broken far side makes of a fetched blob (from the offset on)."""

    async def check_in(self, check_in: CheckIn) -> CheckInReply:
        self._called("check_in")
        sent = check_in_to_message(check_in)
        answer = self.coordinator.check_in(pb.CheckInRequest.FromString(sent.SerializeToString()))
        self.traffic.up += sent.ByteSize()
        self.traffic.down += answer.ByteSize()
        return check_in_reply_from_message(pb.CheckInResponse.FromString(answer.SerializeToString()))

    async def fetch(self, digest: Digest, offset: int) -> AsyncGenerator[bytes, None]:
        self._called("fetch")
        data = self.tamper(digest, self.coordinator.read(digest, offset))
        for start in range(0, len(data), CHUNK):
            self.traffic.down += len(data[start : start + CHUNK])
            yield data[start : start + CHUNK]

    async def report(self, begin: ReportBegin, sealed: bytes) -> RetryWindow:
        self._called("report")
        for start in range(self.coordinator.begin(begin), len(sealed), CHUNK):
            self.coordinator.append(begin, sealed[start : start + CHUNK])
            self.traffic.up += len(sealed[start : start + CHUNK])
        return self.coordinator.finish(begin)

    async def renew(self, certificate_request: bytes) -> bytes:
        raise Unreachable("nobody renews here")

    async def close(self) -> None:
        pass

    def _called(self, name: str) -> None:
        if self.down is not None:
            raise self.down
        self.calls.append(name)


def held_files(home: Path) -> list[Path]:
    """Every file below a home."""
    return [path for path in home.rglob("*") if path.is_file()]


def retuned(weights: Weights, factor: float) -> Weights:
    """Other weights of the same shapes."""
    return Weights({name: array * factor for name, array in weights.arrays.items()})
