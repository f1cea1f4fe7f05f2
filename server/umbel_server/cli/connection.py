"""The operator's end of the admin port."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from umbel.errors import NotFound, UmbelError, Unreachable, from_code
from umbel.v1.admin_pb2_grpc import AdminServiceStub
from umbel_server.identity import Addresses, Identity

ERROR_KEY = "umbel-error"


@contextmanager
def connect(state: Path, identity: Path | None, server: str) -> Iterator[tuple[AdminServiceStub, Identity]]:
    """A connection to a coordinator's admin port, and who calls; refusals are raised here as they were raised there.

    Args:
        state: a coordinator's folder on this machine, for its address and first admin's identity.
        identity: the folder of another identity; `None` for the first admin's.
        server: host:port; empty for the address in `state`.

    Raises:
        NotFound: no identity, or no coordinator running.
        UmbelError: whatever the coordinator answers.
    """
    who = Identity.read(identity or state / "admin")
    address = server or Addresses.read(state).admin
    credentials = grpc.ssl_channel_credentials(who.server_authority, who.key, who.certificate)
    # An operator's connection goes straight to the coordinator, whatever proxy the environment names.
    with grpc.secure_channel(address, credentials, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            yield AdminServiceStub(channel), who
        except grpc.RpcError as error:
            raise _raised(error, address) from error


def _raised(error: grpc.RpcError, address: str) -> UmbelError:
    if not isinstance(error, grpc.Call):
        return UmbelError(str(error))
    metadata = dict(error.trailing_metadata() or ())
    code, details = metadata.get(ERROR_KEY), error.details() or ""
    if isinstance(code, str):
        return from_code(code, details)
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        hint = "is it running, and is this certificate an operator's of this coordinator?"
        return Unreachable(f"no answer from the coordinator at {address}; {hint} ({details})")
    return UmbelError(f"{error.code().name}: {details}")


def quiet_grpc() -> None:
    """Keep gRPC's own log of failed handshakes off an operator's screen: the error says it already."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def state_folder(state: Path | None) -> Path:
    """The coordinator's folder: as chosen, or by `UMBEL_STATE`, or here.

    Raises:
        NotFound: it isn't there.
    """
    folder = state or Path(os.environ.get("UMBEL_STATE", "umbel-state"))
    if state is None and not folder.exists():
        raise NotFound(f"{folder} isn't there; name the coordinator's folder with --state or UMBEL_STATE")
    return folder
