"""The Open Inference Protocol over gRPC: messages in, a question, messages out. No decisions.

https://github.com/kserve/open-inference-protocol; `RepositoryIndex` is Triton's extension `model_repository`.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Final

from umbel.errors import UmbelError
from umbel.manifest import TensorSpec
from umbel.oip import open_inference_pb2 as pb
from umbel.version import VERSION
from umbel_server.operators import Operator, Operators
from umbel_server.rpc import Service, Stream, Unary
from umbel_server.serving.inference import Inference, Question
from umbel_server.serving.tensors import add_outputs, datatype_of, examples_in, inputs_of
from umbel_server.token_operators import TokenOperators

EXTENSIONS: Final = ("model_repository",)
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
        return pb.ServerMetadataResponse(name="umbel", version=VERSION, extensions=EXTENSIONS)

    async def _model_ready(self, caller: Operator, message: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        try:
            await self._served.answering(message.name, message.version)
        except UmbelError:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    async def _model_metadata(self, caller: Operator, message: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        answering = await self._served.answering(message.name, message.version)
        manifest = answering.loaded.manifest
        offered = self._served.catalogue.model(message.name)
        channels = {channel: release.version for channel, release in offered.channels.items()}
        properties = {"version": answering.version, "channels": channels, "labels": list(manifest.labels)}
        return pb.ModelMetadataResponse(
            name=message.name,
            versions=[str(version) for version in sorted(offered.versions)],
            platform="onnxruntime_onnx",
            inputs=[_tensor(spec) for spec in manifest.inputs],
            outputs=[_tensor(spec) for spec in manifest.outputs],
            properties={name: json.dumps(value) for name, value in properties.items()},
        )

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
        response = pb.RepositoryIndexResponse()
        for model, offered in sorted(self._served.catalogue.models.items()):
            for version, release in sorted(offered.versions.items()):
                reason = self._served.why_not(release)
                if not (message.ready and reason):
                    state = "UNAVAILABLE" if reason else "READY"
                    response.models.add(name=model, version=str(version), state=state, reason=reason)
        return response


def _tensor(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    shape = [-1 if size is None else size for size in spec.shape]
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=datatype_of(spec.dtype), shape=shape)
