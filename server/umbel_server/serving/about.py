"""What a server and its models tell of themselves, whichever way they are asked."""

from __future__ import annotations

from typing import Any, Final

from umbel.manifest import TensorSpec
from umbel.version import VERSION
from umbel_server.serving.served import ServedModels
from umbel_server.serving.tensors import datatype_of

SERVER: Final = {"name": "umbel", "version": VERSION}


async def about_model(served: ServedModels, model: str, version: str) -> dict[str, Any]:
    """The fields of the protocol's model metadata; raises `NotFound` or `Unavailable`."""
    answering = await served.answering(model, version)
    manifest = answering.loaded.manifest
    offered = served.catalogue.model(model)
    return {
        "name": model,
        "versions": [str(version) for version in sorted(offered.versions)],
        "platform": "onnxruntime_onnx",
        "inputs": [_tensor(spec) for spec in manifest.inputs],
        "outputs": [_tensor(spec) for spec in manifest.outputs],
        "properties": {
            "version": answering.version,
            "channels": {channel: release.version for channel, release in offered.channels.items()},
            "labels": list(manifest.labels),
        },
    }


def index(served: ServedModels, *, only_ready: bool) -> list[dict[str, str]]:
    """All released versions of all models, as Triton's repository index lists them."""
    found = []
    for model, offered in sorted(served.catalogue.models.items()):
        for version, release in sorted(offered.versions.items()):
            reason = served.why_not(release)
            state = "UNAVAILABLE" if reason else "READY"
            found.append({"name": model, "version": str(version), "state": state, "reason": reason})
    return [entry for entry in found if entry["state"] == "READY" or not only_ready]


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    shape = [-1 if size is None else size for size in spec.shape]
    return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": shape}
