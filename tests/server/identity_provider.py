"""A small OpenID Connect provider: real keys and documents over real HTTPS on this machine; it can also misbehave."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import trustme
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

AUDIENCE = "umbel-coordinator"


@dataclass
class IdentityProvider:
    """The provider, at `issuer`."""

    issuer: str
    ca: Path
    keys: dict[str, Any] = field(default_factory=dict)
    """Key id -> private key; what its key set publishes."""
    asked: list[str] = field(default_factory=list)
    documents: dict[str, bytes] = field(default_factory=dict)
    """Path -> what is answered instead."""
    drip: float = 0.0
    """Seconds before each byte of an answer."""
    down: bool = False

    def __post_init__(self) -> None:
        self.rotate("first")

    def rotate(self, kid: str, *, keep: bool = False) -> None:
        """A new key; the old ones are withdrawn, unless they are kept."""
        self.keys = (self.keys if keep else {}) | {kid: rsa.generate_private_key(65537, 2048)}

    def answer(self, path: str) -> bytes | None:
        self.asked.append(path)
        if path in self.documents:
            return self.documents[path]
        if path == "/.well-known/openid-configuration":
            return json.dumps({"issuer": self.issuer, "jwks_uri": f"{self.issuer}/keys"}).encode()
        return (
            json.dumps({"keys": [jwk(kid, key) for kid, key in self.keys.items()]}).encode()
            if path == "/keys"
            else None
        )

    def token(self, subject: str = "ada", groups: object = ("umbel-operators",), kid: str = "", **changes: Any) -> str:
        """An access token as the provider would sign it; `changes` of claims, None for one that is left out."""
        kid = kid or next(reversed(self.keys))
        return sign(self.claims(subject, groups, **changes), self.keys[kid], kid)

    def claims(self, subject: str = "ada", groups: object = (), **changes: Any) -> dict[str, Any]:
        now = int(time.time())
        claims = {"iss": self.issuer, "aud": AUDIENCE, "sub": subject, "iat": now, "exp": now + 600}
        listed = list(groups) if isinstance(groups, tuple) else groups
        merged = claims | {"groups": listed, "tid": "our-tenant"} | changes
        return {name: value for name, value in merged.items() if value is not None}


def jwk(kid: str, key: Any) -> dict[str, Any]:
    """The public half of a key, as key sets hold it."""
    kind = RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else ECAlgorithm
    return json.loads(kind.to_jwk(key.public_key())) | {"kid": kid, "use": "sig"}


def sign(claims: dict[str, Any], key: Any, kid: str | None, algorithm: str = "", **headers: Any) -> str:
    usual = "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "RS256"
    return jwt.encode(claims, key, algorithm or usual, headers={**({"kid": kid} if kid else {}), **headers})


@contextlib.contextmanager
def providing(folder: Path) -> Iterator[IdentityProvider]:
    """Run one until the end of the block."""
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    ca = folder / "provider-ca.pem"
    ca.write_bytes(authority.cert_pem.bytes())

    class Handler(BaseHTTPRequestHandler):
        def setup(self) -> None:
            self.request = context.wrap_socket(self.request, server_side=True)
            super().setup()

        def finish(self) -> None:
            with contextlib.suppress(OSError):
                super().finish()
            self.request.close()

        def do_GET(self) -> None:
            body = provider.answer(self.path)
            if body is None or provider.down:
                self.send_error(503 if provider.down else 404)
                return
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                if not provider.drip:
                    self.wfile.write(body)
                    return
                for byte in body:
                    time.sleep(provider.drip)
                    self.wfile.write(bytes([byte]))

        def log_message(self, *arguments: object) -> None:
            del arguments

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, address: object) -> None:
            del request, address

    server = Quiet(("localhost", 0), Handler)
    provider = IdentityProvider(f"https://localhost:{server.server_port}", ca)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="identity provider")
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
