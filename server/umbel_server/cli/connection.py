"""The operator's end of the admin port."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from umbel.errors import (
    ERROR_KEY,
    BadInput,
    CertificateRefused,
    MalformedMessage,
    NotFound,
    UmbelError,
    Unreachable,
    foreign,
    from_code,
)
from umbel.v1.admin_pb2_grpc import AdminServiceStub
from umbel_server.files import read_file
from umbel_server.identity import SERVER_AUTHORITY_FILE, Addresses, Identity

_OPTIONS: Final = (
    # An operator's connection goes straight to the coordinator, whatever proxy the environment names.
    ("grpc.enable_http_proxy", 0),
    # A coordinator that vanished or hangs ends a command, and what watches it, within half a minute.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
)
_CODES = grpc.StatusCode
_NO_WORD = (_CODES.UNAVAILABLE, _CODES.INTERNAL, _CODES.UNKNOWN, _CODES.CANCELLED, _CODES.DEADLINE_EXCEEDED)


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom an operator calls as: with a certificate, or with a token."""

    identity: Path | None = None
    """The folder of an identity; `None` for the first admin's."""
    token: str = ""
    """Of the team's identity provider, in place of an identity."""
    authority: Path | None = None
    """With a token: the coordinator's server authority, PEM; `None` for the one in the coordinator's folder."""

    def __repr__(self) -> str:
        return f"Caller(identity={self.identity})"

    @property
    def needs_folder(self) -> bool:
        """Whether the coordinator's own folder has to tell who calls, or whom to trust."""
        return self.authority is None if self.token else self.identity is None

    def read(self, state: Path) -> Identity:
        """What to call with; a token has neither certificate nor key. Raises `NotFound`."""
        if not self.token:
            return Identity.read(self.identity or state / "admin")
        return Identity(b"", b"", read_file(self.authority or state / "admin" / SERVER_AUTHORITY_FILE))


@contextmanager
def connect(state: Path, caller: Caller, server: str) -> Iterator[tuple[AdminServiceStub, Identity]]:
    """A connection to a coordinator's admin port, and who calls; refusals are raised here as they were raised there.

    Args:
        state: a coordinator's folder on this machine, for what isn't named otherwise.
        caller: whom to call as.
        server: host:port; empty for the address in `state`.

    Raises:
        NotFound: no identity, or no coordinator running.
        UmbelError: whatever the coordinator answers.
    """
    who = caller.read(state)
    address = server or _address(state, caller)
    if caller.token:
        tls = grpc.ssl_channel_credentials(who.server_authority)
        credentials = grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(caller.token))
    else:
        credentials = grpc.ssl_channel_credentials(who.server_authority, who.key, who.certificate)
    with grpc.secure_channel(address, credentials, options=_OPTIONS) as channel:
        try:
            yield AdminServiceStub(channel), who
        except grpc.RpcError as error:
            raise _raised(error, address, who) from error


def _address(state: Path, caller: Caller) -> str:
    addresses = Addresses.read(state)
    if caller.token and not addresses.tokens:
        raise NotFound(
            "this coordinator takes no tokens; its settings need an `oidc`, see docs/how-to/log-in-by-token.md"
        )
    return addresses.tokens if caller.token else addresses.admin


def caller_of(identity: Path | None, token: str | None, token_file: Path | None, authority: Path | None) -> Caller:
    """Whom these options and variables say to call as.

    Raises:
        NotFound: the token's file isn't there.
        BadInput: two are named; or what is named holds no token, and nobody is to call as somebody else then.
    """
    if sum(named is not None for named in (identity, token, token_file)) > 1:
        raise BadInput(
            "name one to call with: an identity, a token or a token's file; UMBEL_… in the environment count"
        )
    if token is None and token_file is None:
        return Caller(identity)
    text = (token if token_file is None else read_file(token_file).decode(errors="replace")) or ""
    if not text.strip() or not text.strip().isascii() or not text.strip().isprintable():
        raise BadInput(f"{token_file or '--token'} holds no token; a token is one line of ASCII, get a new one")
    return Caller(token=text.strip(), authority=authority)


def _raised(error: grpc.RpcError, address: str, who: Identity) -> UmbelError:
    if not isinstance(error, grpc.Call):
        return UmbelError(str(error))
    metadata = dict(error.trailing_metadata() or ())
    code, details = metadata.get(ERROR_KEY), foreign(error.details() or "")
    if isinstance(code, str):
        return from_code(code, details)
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        if "WRONG_VERSION_NUMBER" in details:
            return Unreachable(f"what answers at {address} speaks no TLS, so it is no coordinator; is the port right?")
        if not _is_certificate(who.server_authority):
            return MalformedMessage("the server authority to call with isn't a certificate in PEM; get its file again")
        if who.certificate and _has_ended(who.certificate):
            hint = "on its machine, `umbel operators renew` gives it a new term"
            return CertificateRefused(f"the certificate that this calls with has ended; {hint}")
        hint = "is it running, are both clocks right, and is this certificate (or this port, for a token)?"
        return Unreachable(f"no answer from the coordinator at {address}; {hint} ({details})")
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return BadInput(f"{address} doesn't know this call; is it the admin port, of a coordinator as new as this?")
    return UmbelError(f"{error.code().name}: {details}")


def is_refusal(error: Exception) -> bool:
    """Whether the coordinator itself said no; not where it may have done what was asked, and its answer was lost."""
    return isinstance(error, grpc.RpcError) and isinstance(error, grpc.Call) and error.code() not in _NO_WORD


def _is_certificate(pem: bytes) -> bool:
    from umbel_server.authority import end_of

    with suppress(MalformedMessage):
        return bool(end_of(pem))
    return False


def _has_ended(certificate: bytes) -> bool:
    from umbel.clock import SystemClock
    from umbel_server.authority import end_of

    return end_of(certificate) <= SystemClock().now()


def state_folder(state: Path | None) -> Path:
    """The coordinator's folder: as chosen, or by `UMBEL_STATE`, or here.

    Raises:
        NotFound: it isn't there.
    """
    folder = state or Path(os.environ.get("UMBEL_STATE", "umbel-state"))
    if state is None and not folder.exists():
        raise NotFound(f"{folder} isn't there; name the coordinator's folder with --state or UMBEL_STATE")
    return folder
