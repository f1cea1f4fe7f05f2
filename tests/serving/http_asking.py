"""Callers of a coordinator's models over HTTP, by Python's own client."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPMessage
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.server.live import Live
from umbel.errors import ERROR_KEY, UmbelError, from_code
from umbel.oip import open_inference_pb2 as pb
from umbel_server.addresses import host_and_port
from umbel_server.identity import Identity

FIELDS = ("fp32_contents", "int_contents", "int64_contents", "uint_contents", "bool_contents")


def caller_context(authority: bytes, folder: Path | None) -> ssl.SSLContext:
    """TLS that trusts the coordinator's authority, with the identity of a folder."""
    context = ssl.create_default_context(cadata=authority.decode())
    if folder is not None:
        context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


@dataclass
class Answered:
    status: int
    headers: HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def refusal(self) -> UmbelError:
        """The typed error that travelled."""
        code = self.headers[ERROR_KEY]
        assert self.status >= 400 and code, f"{self.status} {self.body[:200]!r} is no refusal"
        return from_code(code, self.json["error"])


class HttpCaller:
    """One connection, that is kept."""

    def __init__(self, address: str, context: ssl.SSLContext, token: str = "") -> None:
        host, port = host_and_port(address)
        self.connection = http.client.HTTPSConnection(host, port, context=context, timeout=20)
        self._token = token

    def __call__(self, verb: str, path: str, body: Any = None, **headers: str) -> Answered:
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        self.connection.request(verb, path, body, {name.replace("_", "-"): one for name, one in headers.items()})
        answer = self.connection.getresponse()
        return Answered(answer.status, answer.headers, answer.read())

    def get(self, path: str) -> Answered:
        return self("GET", path)

    def infer(self, asked: pb.ModelInferRequest) -> Answered:
        """A question as it would go over gRPC: raw contents as binary data, listed ones as lists."""
        version = f"/versions/{quote(asked.model_version)}" if asked.model_version else ""
        path = f"/v2/models/{quote(asked.model_name)}{version}/infer"
        raw = list(asked.raw_input_contents)
        inputs = []
        for place, tensor in enumerate(asked.inputs):
            told: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
            if tensor.HasField("contents"):
                told["data"] = [number for field in FIELDS for number in getattr(tensor.contents, field)]
            if place < len(raw):
                told["parameters"] = {"binary_data_size": len(raw[place])}
            inputs.append(told)
        question = {"inputs": inputs, "outputs": [{"name": output.name} for output in asked.outputs]}
        if asked.id:
            question["id"] = asked.id
        text = json.dumps(question).encode()
        if not raw:
            return self("POST", path, text)
        return self("POST", path, text + b"".join(raw), inference_header_content_length=str(len(text)))


@contextlib.contextmanager
def over_http(live: Live, who: Identity | None, folder: Path, token: str = "") -> Iterator[HttpCaller]:
    """Somebody who asks; their identity goes into a folder first."""
    if who is not None:
        who.write(folder)
    context = caller_context(live.parts.authorities.server.certificate_pem, folder if who else None)
    caller = HttpCaller(live.addresses.inference_http, context, token)
    try:
        yield caller
    finally:
        caller.connection.close()
