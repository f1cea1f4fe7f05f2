"""The guards of the HTTP port that models answer on: who comes in, what may be open, and what is taken for what."""

from __future__ import annotations

from typing import Final

from tests.mutation.guards import of

_PORT: Final = ("tests/serving/test_https_port.py",)
_MESSAGES: Final = ("tests/serving/test_rest_messages.py",)
_OVER_HTTP: Final = ("tests/serving/test_over_http.py",)

GUARDS: Final = (
    *of(
        "server/umbel_server/https_port.py", _PORT,
        ("so many connections", "len(self.connections) > CONNECTIONS or ", ""),
        ("nobody comes after the end", " or cast(_Connections, self.server_state).are_ending", ""),
        ("a header byte by byte", "        self.conn.receive_data(data)\n", "        self._unset_keepalive_if_required()\n        self.conn.receive_data(data)\n"),
        ("who says nothing", '        """Hang up on who takes too long."""\n        self.transport.abort()', '        """Hang up on who takes too long."""'),
        ("a handshake that stands still", "            ssl_handshake_timeout=HANDSHAKE_SECONDS,\n", ""),
        ("who hangs up is not answered", "            self.task.cancel()\n", "            pass\n"),
        ("nothing is answered after the end", "            self.cycle.keep_alive = False", "            pass"),
        ("who is idle at the end", "            connection.shutdown()\n", "            pass\n"),
        ("who is in the middle at the end", "        for connection in open_ones:\n            connection.transport.abort()\n", ""),
        ("no request in the middle of an answer", "except h11.LocalProtocolError:", "except ZeroDivisionError:"),
        ("uvicorn's log", "        self.logger = self.access_logger = _SILENT\n", ""),
        ("pieces go at once", "(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)", "(socket.IPPROTO_TCP, socket.TCP_NODELAY, 0)"),
    ),
    *of(
        "server/umbel_server/port_certificate.py", _PORT,
        ("the newest certificate over HTTP", "            handshake.context = newest\n", ""),
    ),
    *of(
        "server/umbel_server/port_certificate.py", _OVER_HTTP,
        ("a certificate is demanded", "ssl.CERT_REQUIRED if required else ssl.CERT_OPTIONAL", "ssl.CERT_OPTIONAL"),
    ),
    *of(
        "server/umbel_server/serving/http_exchange.py", _PORT,
        ("a body with two ends", '"transfer-encoding" in headers and "content-length" in headers', "False"),
        ("nothing behind two ends", " or self._is_ambiguous:", ":"),
        ("a rest is no request", "if not self._is_over or self._is_ambiguous:", "if self._is_ambiguous:"),
        ("room for bodies", "                    room.take(len(piece))\n", ""),
        ("a body without a length", "                    if self.size > most:\n                        raise _too_large(most)\n", ""),
        ("a slow body", "async with asyncio.timeout(BODY_SECONDS):", "async with asyncio.timeout(None):"),
        ("a slow reader", "async with asyncio.timeout(PIECE_SECONDS):", "async with asyncio.timeout(None):"),
        ("compressed bodies", 'if "content-encoding" in self._request.headers:', "if False:"),
        ("a body that waits to be asked for", ' and "expect" not in self._request.headers:', ":"),
    ),
    *of(
        "server/umbel_server/serving/rest.py", _PORT,
        ("room comes back", "                    self._room.take(-body.size)\n", "                    pass\n"),
        ("one length of JSON", "len(said) > 1 or ", ""),
    ),
    *of(
        "server/umbel_server/serving/rest.py", _OVER_HTTP,
        ("a token that is brought counts", "(sent or certificate is None)", "certificate is None"),
        ("so much JSON", "if length > MAX_JSON_BYTES:", "if False:"),
    ),
    *of(
        "server/umbel_server/passing.py", _OVER_HTTP,
        ("a refusal lets go", "return error.with_traceback(None)", "return error"),
    ),
    *of(
        "server/umbel_server/rpc.py", ("tests/serving/test_over_grpc.py",),
        ("a refusal over gRPC lets go", "                del sent  #", "                pass  #"),
    ),
    *of(
        "server/umbel_server/serving/tensors.py", _MESSAGES,
        ("sizes without end", "if len(shape) > _RANK:", "if False:"),
        ("a number with no room", '        with np.errstate(over="raise"):\n', "        if True:\n"),
    ),
    *of(
        "server/umbel_server/serving/rest_messages.py", _MESSAGES,
        ("one name twice", ", object_pairs_hook=_once", ""),
        ("numbers of another type", "if wrong := set(map(type, flat)) - wanted:", "if wrong := set():"),
        ("lists of other sizes", "if len(sizes) > 1 and tuple(sizes) != self.shape:", "if False:"),
        ("lists of unequal sizes", "or len(lengths) > 1:", "or False:"),
        ("bytes that nobody claims", "if place != len(rest):", "if False:"),
        ("bytes that aren't there", "if not 0 <= size <= len(rest) - place:", "if False:"),
        ("one input twice", "            if sent.name in found:", "            if False:"),
        ("either data or bytes", "if (size is None) is (data is None):", "if False:"),
    ),
)  # fmt: skip
