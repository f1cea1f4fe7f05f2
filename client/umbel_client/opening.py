"""The parts of a device that an app doesn't bring along; heavy ones are imported only where they are used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from umbel.clock import Clock
from umbel.runtime import Runtime
from umbel_client.channel import Channel
from umbel_client.enrolment import Identity, IdentityKeeper
from umbel_client.examples import ExampleStore, StoreLimits
from umbel_client.listing import Listing
from umbel_client.status import StatusSource

if TYPE_CHECKING:
    from umbel_client.http_mirror import Mirror

EXAMPLES_FILE = "examples.sqlite"


def grpc_channel(identities: IdentityKeeper) -> Channel:
    """gRPC with mutual TLS, to the address that enrolment gave."""
    from umbel_client.grpc_channel import GrpcChannel

    return GrpcChannel(identities.current.device_address, identities)


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """Which runtime a device runs, and with how much of the machine."""

    name: str = "onnx"
    """"onnx" or "litert"."""
    threads: int = 1


def runtime_of(settings: RuntimeSettings) -> Runtime:
    """The runtime that settings name.

    Raises:
        NotFound: no runtime goes by that name, or its package isn't installed.
        OutOfBounds: no thread.
    """
    from umbel.runtime.named import runtime_named

    return runtime_named(settings.name, settings.threads)


@dataclass(frozen=True, slots=True)
class MirrorSettings:
    """A web server that is asked before the coordinator; `umbel releases mirror` fills its folder."""

    address: str = ""
    """http(s)://host/path; empty: none."""
    seconds: float = 300.0
    """For one file, all of it."""


def mirror_of(settings: MirrorSettings) -> Mirror | None:
    """The mirror that settings name, if they do; raises `BadInput` for an address that is none."""
    if not settings.address:
        return None
    from umbel_client.http_mirror import Mirror

    return Mirror(settings.address, settings.seconds)


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
