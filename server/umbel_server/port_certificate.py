"""The certificate of a coordinator's own ports: kept in memory only, and made anew long before it ends.

No file to leak, and nothing for a person to renew. Each TLS handshake asks for the newest; connections that stand keep
theirs.
"""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Sequence
from tempfile import NamedTemporaryFile
from typing import Final

import grpc
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from umbel.clock import Clock, is_recent
from umbel_server.authority import SERVER_SECONDS, Authority, key_to_pem

RENEW_AFTER: Final = SERVER_SECONDS / 2
"""Seconds."""


class PortCertificate:
    """Key and certificate for TLS, the same for all ports.

    Args:
        authority: issues it; what devices and operators pin.
        names: host names and addresses by which the ports are reached.
        clock: tells when it has to be made anew.

    Raises:
        MalformedMessage: a name that no server can have.
    """

    def __init__(self, authority: Authority, names: Sequence[str], clock: Clock) -> None:
        self._authority, self._names, self._clock = authority, names, clock
        self._newest = self._made()

    def credentials(self, client_authority: bytes | None) -> grpc.ServerCredentials:
        """For one port.

        Args:
            client_authority: PEM; callers must have a certificate of it. None: they come without one.
        """
        shown = self._current()

        def newest() -> grpc.ServerCertificateConfiguration | None:
            """What gRPC asks at each handshake, from threads of its own; None leaves it as it is."""
            nonlocal shown
            before, shown = shown, self._current()
            return None if shown is before else _configuration(shown, client_authority)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(shown, client_authority),
            newest,  # type: ignore[arg-type] # the stubs leave out None, which gRPC's own page names
            require_client_authentication=client_authority is not None,
        )

    def context(self, client_authority: bytes, *, required: bool) -> ssl.SSLContext:
        """For a port that isn't gRPC's.

        Args:
            client_authority: PEM; callers' certificates must be of it.
            required: False lets callers in without one.
        """
        shown = self._current()
        context = newest = _context(shown, client_authority, required)

        def show_newest(handshake: ssl.SSLObject, name: str | None, at_first: ssl.SSLContext) -> None:
            """Called in each handshake, whether a name was asked for or not."""
            nonlocal shown, newest
            if shown is not (current := self._current()):
                shown, newest = current, _context(current, client_authority, required)
            handshake.context = newest

        context.sni_callback = show_newest
        return context

    def _current(self) -> tuple[bytes, bytes]:
        made_at, newest = self._newest
        # Also after a clock that was ahead was set right: it may begin in the future, and nobody would believe it. Two
        # handshakes that come just then may each make one, of which either is good.
        if not is_recent(made_at, self._clock.now(), RENEW_AFTER):
            _, newest = self._newest = self._made()
        return newest

    def _made(self) -> tuple[float, tuple[bytes, bytes]]:
        key, now = ec.generate_private_key(ec.SECP256R1()), self._clock.now()
        return now, (key_to_pem(key), self._authority.issue_server(key.public_key(), self._names, now))


def _configuration(pair: tuple[bytes, bytes], client_authority: bytes | None) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([pair], root_certificates=client_authority)


def _context(pair: tuple[bytes, bytes], client_authority: bytes, required: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL
    context.load_verify_locations(cadata=client_authority.decode())
    context.set_alpn_protocols(["http/1.1"])
    key, certificate = pair
    # Python's ssl reads keys from files only: this one can't be read by anybody else, nor by anybody afterwards.
    password = secrets.token_bytes(32).hex().encode()
    hidden = serialization.load_pem_private_key(key, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(password),
    )
    with NamedTemporaryFile() as file:
        file.write(hidden + certificate)
        file.flush()
        context.load_cert_chain(file.name, password=password)
    return context
