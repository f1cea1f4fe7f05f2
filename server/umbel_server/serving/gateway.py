"""The Open Inference Protocol over gRPC: messages in, a question, messages out. No decisions.

https://github.com/kserve/open-inference-protocol; `RepositoryIndex` is Triton's extension `model_repository`.
"""

from __future__ import annotations

import json
from functools import partial

from umbel.errors import UmbelError
from umbel.oip import open_inference_pb2 as pb
from umbel_server.operators import Operator, Operators
from umbel_server.rpc import Service, Stream, Unary
from umbel_server.serving.about import SERVER, about_model, index
from umbel_server.serving.inference import Inference, Question
from umbel_server.serving.tensors import add_outputs, examples_in, inputs_of
from umbel_server.token_operators import TokenOperators

_SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]


class InferenceGateway:
    """GRPCInferenceService."""

    def __init__(self, inference: Inference, operators: Operators) -> None:
        self._inference = inference
        self._served = inference.served
        self._operators = operators

    def service(self, tokens: TokenOperators | None = None) -> Service[Operator]:
        """Ready to be added to a gRPC server, for callers with certificates, or for such with tokens."""
        methods: dict[str, Unary[Operator] | Stream[Operator]] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
            "RepositoryIndex": self._repository_index,
        }
        return Service(_SERVICE, self._operators.authorize, methods, tokens.authorize if tokens else None)

    async def _server_live(self, caller: Operator, message: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, caller: Operator, message: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._served.is_ready)

    async def _server_metadata(self, caller: Operator, message: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(**SERVER, extensions=["model_repository"])

    async def _model_ready(self, caller: Operator, message: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        try:
            await self._served.answering(message.name, message.version)
        except UmbelError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def _model_metadata(self, caller: Operator, message: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        told = await about_model(self._served, message.name, message.version)
        properties = {name: json.dumps(value) for name, value in told["properties"].items()}
        return pb.ModelMetadataResponse(**(told | {"properties": properties}))

    async def _model_infer(self, caller: Operator, message: pb.ModelInferRequest) -> pb.ModelInferResponse:
        wanted = tuple(output.name for output in message.outputs)
        read, examples = partial(inputs_of, message), examples_in(message)
        question = Question(message.model_name, message.model_version, read, examples, wanted, message.id)
        answer = await self._inference.ask(caller.actor, question)
        response = pb.ModelInferResponse(
            model_name=message.model_name, model_version=str(answer.version), id=message.id
        )
        add_outputs(response, answer.outputs, raw=bool(message.raw_input_contents))
        return response

    async def _repository_index(
        self, caller: Operator, message: pb.RepositoryIndexRequest
    ) -> pb.RepositoryIndexResponse:
        models = index(self._served, only_ready=message.ready)
        return pb.RepositoryIndexResponse(models=[pb.RepositoryIndexResponse.ModelIndex(**entry) for entry in models])
