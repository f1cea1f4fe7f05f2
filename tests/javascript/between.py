"""What may stand between a device and its coordinator: a wire that is cut, and somebody who changes what is said.

The second has the coordinator's own certificate, as a broken-in coordinator would: TLS hides nothing from them.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from tests.javascript.devices import JavaScriptDevice
from umbel.clock import SystemClock
from umbel.errors import ERROR_KEY
from umbel_server.folder import Folder
from umbel_server.port_certificate import PortCertificate

Change = Callable[[bytes], bytes]


class Refusal(Exception):
    """What somebody in between answers instead."""

    def __init__(self, status: grpc.StatusCode, code: str = "") -> None:
        super().__init__(status, code)
        self.status, self.code = status, code


@dataclass
class Relay(grpc.GenericRpcHandler):
    """Passes every call on in the device's name, writes down what was asked, and changes what is answered."""

    channel: grpc.Channel
    answers: dict[str, Change] = field(default_factory=dict)
    """By the call's name, such as "CheckIn"."""
    asked: list[tuple[str, bytes]] = field(default_factory=list)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        name = details.method.rpartition("/")[2]

        def passed_on(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            def noted() -> Iterator[bytes]:
                for request in requests:
                    self.asked.append((name, request))
                    yield request

            try:
                for answer in self.channel.stream_stream(details.method)(noted()):
                    yield self.answers.get(name, bytes)(answer)
            except Refusal as refusal:
                context.set_trailing_metadata(((ERROR_KEY, refusal.code),) if refusal.code else ())
                context.abort(refusal.status, "refused in between")
            except grpc.RpcError as error:
                context.set_trailing_metadata(error.trailing_metadata())
                context.abort(error.code(), error.details())

        return grpc.stream_stream_rpc_method_handler(passed_on)

    def calls(self, name: str) -> list[bytes]:
        """All that was asked by one call."""
        return [request for called, request in self.asked if called == name]


@contextmanager
def relayed(device: JavaScriptDevice, state: Path, **answers: Change) -> Iterator[Relay]:
    """The device calls somebody in between, who has the coordinator's folder."""
    identity, folder = device.identity(), Folder(state)
    own = (identity["authority"].encode(), (device.home / "key.pem").read_bytes(), identity["certificate"].encode())
    with grpc.secure_channel(identity["address"], grpc.ssl_channel_credentials(*own)) as channel:
        relay = Relay(channel, answers)
        server = grpc.server(ThreadPoolExecutor(4), handlers=(relay,))
        authorities = folder.authorities()
        certificate = PortCertificate(authorities.server, ["127.0.0.1"], SystemClock())
        port = server.add_secure_port("127.0.0.1:0", certificate.credentials(authorities.device.certificate_pem))
        server.start()
        device.call_at(f"127.0.0.1:{port}")
        try:
            yield relay
        finally:
            server.stop(None).wait()
            device.call_at(identity["address"])


@contextmanager
def cut_after(device: JavaScriptDevice, limit: int) -> Iterator[list[int]]:
    """The device's connection breaks once it has sent so many bytes; gives what each of its connections had sent."""
    address = device.identity()["address"]
    host, _, port = address.rpartition(":")
    listener = socket.create_server(("127.0.0.1", 0))
    sent: list[int] = []

    def carry(source: socket.socket, target: socket.socket, most: int | None) -> None:
        total = 0
        with suppress(OSError):
            while data := source.recv(4096):
                target.sendall(data)
                total += len(data)
                if most is not None and total > most:
                    sent.append(total)
                    break
        for each in (source, target):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def listen() -> None:
        with suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = socket.create_connection((host, int(port)))
                for words in ((near, far, limit), (far, near, None)):
                    threading.Thread(target=carry, args=words, daemon=True).start()

    threading.Thread(target=listen, daemon=True).start()
    device.call_at(f"127.0.0.1:{listener.getsockname()[1]}")
    try:
        yield sent
    finally:
        listener.close()
        device.call_at(address)


def changed(kind: Any, data: bytes, change: Callable[[Any], None]) -> bytes:
    """A message with something else in it."""
    message = kind.FromString(data)
    change(message)
    return bytes(message.SerializeToString())


def flipped(data: bytes, place: int = -1) -> bytes:
    """The same bytes but for one bit."""
    copy = bytearray(data)
    copy[place] ^= 1
    return bytes(copy)
