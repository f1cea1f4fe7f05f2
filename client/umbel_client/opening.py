"""The parts of a device that an app doesn't bring along; heavy ones are imported only where they are used."""

from __future__ import annotations

from pathlib import Path

from umbel.clock import Clock
from umbel.runtime import Runtime
from umbel_client.channel import Channel
from umbel_client.enrolment import Identity, IdentityKeeper
from umbel_client.examples import ExampleStore, StoreLimits
from umbel_client.listing import Listing
from umbel_client.status import StatusSource

EXAMPLES_FILE = "examples.sqlite"


def grpc_channel(identities: IdentityKeeper) -> Channel:
    """gRPC with mutual TLS, to the address that enrolment gave."""
    from umbel_client.grpc_channel import GrpcChannel

    return GrpcChannel(identities.current.device_address, identities)


def onnx_runtime() -> Runtime:
    """ONNX Runtime with one thread."""
    from umbel.runtime.onnx import OnnxRuntime

    return OnnxRuntime()


def examples_on_disk(home: Path, limits: StoreLimits | None = None) -> ExampleStore:
    """A SQLite file in the device's home."""
    from umbel_client.sqlite_examples import SqliteExamples

    return SqliteExamples(home / EXAMPLES_FILE, limits)


def linux_status(home: Path, clock: Clock) -> StatusSource:
    """This machine."""
    from umbel_client.linux import LinuxStatus

    return LinuxStatus(home, clock)


def release_listing(home: Path, identity: Identity) -> Listing | None:
    """The release listing, for a device that pinned its root at enrolment."""
    return Listing(home / "listing", identity.release_root) if identity.release_root else None
