"""The Open Inference Protocol over HTTP: requests in, a question, answers out. No decisions.

https://github.com/kserve/open-inference-protocol, with Triton's extensions `model_repository` (its index) and
`binary_tensor_data`. Who asks, and what a refusal says, are as over gRPC: the caller is looked at before a byte of the
body is, `{"error": …}` holds the message, and the header `umbel-error` the code.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any, Final

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Route

from umbel.errors import ERROR_KEY, MalformedMessage, NotFound, OutOfBounds, Status, UmbelError, Unreachable
from umbel.oip import open_inference_pb2 as pb
from umbel_server.operators import Operator, Operators
from umbel_server.passing import told_outside
from umbel_server.rpc import Call, Watch, bearer
from umbel_server.serving.about import SERVER, about_model, index
from umbel_server.serving.http_exchange import Body, Reply, Room, connection_of
from umbel_server.serving.inference import MAX_QUESTION_BYTES, Inference, Question
from umbel_server.serving.rest_messages import AT_ONCE, read, read_json, written
from umbel_server.token_operators import TokenOperators

SERVICE: Final = "InferenceOverHTTP"
"""What calls are counted under."""
METHODS: Final = tuple(method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods)
MAX_JSON_BYTES: Final = 8 << 20
"""JSON is read in one go, in which nothing else happens in this process; larger questions travel as binary data."""
HELD_BYTES: Final = 16 * MAX_QUESTION_BYTES
"""Of all questions that are here at a time, in bodies."""
_LENGTH: Final = "inference-header-content-length"
_STATUS: Final = MappingProxyType(
    {
        Status.INVALID_ARGUMENT: 400,
        Status.UNAUTHENTICATED: 401,
        Status.PERMISSION_DENIED: 403,
        Status.NOT_FOUND: 404,
        Status.UNAVAILABLE: 503,
    }
)
_OF_KIND: Final = MappingProxyType({OutOfBounds: 413, Unreachable: 408})

_log = structlog.get_logger(__name__)

Method = Callable[[Operator, Request, Body], Awaitable[Reply]]


class RestGateway:
    """The same service as `InferenceGateway`.

    Args:
        inference: answers.
        operators: who may ask, by certificate.
        tokens: who may ask by token; None for nobody.
        watch: counts calls.
    """

    def __init__(
        self, inference: Inference, operators: Operators, tokens: TokenOperators | None, watch: Watch = nullcontext
    ) -> None:
        self._inference = inference
        self._served = inference.served
        self._operators = operators
        self._tokens = tokens
        self._watch = watch
        self._room = Room(HELD_BYTES)

    def app(self) -> Starlette:
        """For an `HttpsPort`."""
        model = "/v2/models/{model}"
        routes = [
            self._route("GET", "/v2", "ServerMetadata", self._server_metadata),
            self._route("GET", "/v2/", "ServerMetadata", self._server_metadata),
            self._route("GET", "/v2/health/live", "ServerLive", self._server_live),
            self._route("GET", "/v2/health/ready", "ServerReady", self._server_ready),
            self._route("POST", "/v2/repository/index", "RepositoryIndex", self._repository_index),
        ]
        for path in (model, model + "/versions/{version}"):
            routes += [
                self._route("GET", path, "ModelMetadata", self._model_metadata),
                self._route("GET", path + "/ready", "ModelReady", self._model_ready),
                self._route("POST", path + "/infer", "ModelInfer", self._model_infer),
            ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _nothing_there})
        app.router.redirect_slashes = False
        return app

    def _route(self, verb: str, path: str, name: str, method: Method) -> Route:
        async def answer(request: Request) -> Reply:
            connection_of(request).task = asyncio.current_task()
            body = Body(request)
            with self._watch(call := Call(SERVICE, name)):
                try:
                    body.require_plain()
                    caller = await self._caller(name, request)
                    reply = await method(caller, request, body)
                    call.status = "OK"
                except Exception as error:  # noqa: BLE001 - the edge: whatever it is, the caller gets a status
                    told = told_outside(_log, error, f"{SERVICE}/{name}")
                    call.status, call.error = told.status.name, told.code
                    reply = _refusal(told)
                finally:
                    self._room.take(-body.size)
                call.received, call.sent = body.size, len(reply)
            return await body.left_by(reply)

        return Route(path, answer, methods=[verb])

    async def _caller(self, method: str, request: Request) -> Operator:
        sent, certificate = request.headers.getlist("authorization"), connection_of(request).certificate
        if self._tokens is not None and (sent or certificate is None):
            return await self._tokens.authorize(method, bearer(sent))
        return self._operators.authorize(method, certificate)

    async def _server_live(self, caller: Operator, request: Request, body: Body) -> Reply:
        return _says({"live": True})

    async def _server_ready(self, caller: Operator, request: Request, body: Body) -> Reply:
        ready = self._served.is_ready
        return _says({"ready": ready}, 200 if ready else 503)

    async def _server_metadata(self, caller: Operator, request: Request, body: Body) -> Reply:
        return _says(SERVER | {"extensions": ["model_repository", "binary_tensor_data"]})

    async def _model_ready(self, caller: Operator, request: Request, body: Body) -> Reply:
        model, version = _asked_for(request)
        await self._served.answering(model, version)
        return _says({"name": model, "ready": True})

    async def _model_metadata(self, caller: Operator, request: Request, body: Body) -> Reply:
        return _says(await about_model(self._served, *_asked_for(request)))

    async def _model_infer(self, caller: Operator, request: Request, body: Body) -> Reply:
        length = _length_of_json(request)
        sent = await body.read(MAX_JSON_BYTES if length is None else MAX_QUESTION_BYTES, self._room)
        asked = read(*_split(sent, length))
        model, version = _asked_for(request)
        question = Question(model, version, asked.arrays, asked.examples, tuple(asked.outputs), asked.id)
        answer = await self._inference.ask(caller.actor, question)
        if sum(array.size for array in answer.outputs.values()) <= AT_ONCE:
            text, binary = written(answer, asked, model)
        else:
            text, binary = await asyncio.to_thread(written, answer, asked, model)
        if not binary:
            return Reply([text])
        return Reply([text, *binary], headers={_LENGTH: str(len(text))}, media_type="application/octet-stream")

    async def _repository_index(self, caller: Operator, request: Request, body: Body) -> Reply:
        sent = await body.read(MAX_JSON_BYTES, self._room)
        only_ready = read_json(sent).get("ready", False) if sent else False
        return _says(index(self._served, only_ready=only_ready is True))


def _asked_for(request: Request) -> tuple[str, str]:
    return request.path_params["model"], request.path_params.get("version", "")


def _length_of_json(request: Request) -> int | None:
    """How long the JSON is that binary data follow; None if there is nothing but JSON."""
    said = request.headers.getlist(_LENGTH)
    if not said:
        return None
    if len(said) > 1 or not (said[0].isascii() and said[0].isdecimal() and len(said[0]) < 12):
        raise MalformedMessage(f"{_LENGTH} must be there once, and say a number of bytes")
    return int(said[0])


def _split(body: bytes, length: int | None) -> tuple[bytes, memoryview]:
    length = len(body) if length is None else length
    if length > len(body):
        raise MalformedMessage(f"{_LENGTH} says {length}; the body has {len(body)} bytes")
    if length > MAX_JSON_BYTES:
        raise OutOfBounds(
            f"{length} bytes of JSON; {MAX_JSON_BYTES >> 20} MB are the most, send tensors as binary data"
        )
    return body[:length], memoryview(body)[length:]


async def _nothing_there(request: Request, error: Exception) -> Reply:
    """What is said to a path or a verb that isn't the protocol's."""
    assert isinstance(error, HTTPException)  # noqa: S101 - tells mypy what Starlette knows
    reply = _refusal(NotFound(f"{request.method} {request.url.path[:200]} isn't part of this"), error.status_code)
    reply.headers.update(error.headers or {})
    return await Body(request).left_by(reply)


def _refusal(error: UmbelError, status: int | None = None) -> Reply:
    status = status or _OF_KIND.get(type(error)) or _STATUS.get(error.status, 500)
    headers = {ERROR_KEY: error.code} | ({"www-authenticate": "Bearer"} if status == 401 else {})
    return _says({"error": str(error)}, status, headers)


def _says(told: Any, status: int = 200, headers: dict[str, str] | None = None) -> Reply:
    return Reply([json.dumps(told).encode()], status, headers)
