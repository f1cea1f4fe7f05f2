"""Asks a coordinator by Triton's own client, in a process of its own, and prints what came back as JSON.

python triton_caller.py ADDRESS IDENTITY GOLDEN.npz
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from tritonclient import grpc as triton
from tritonclient.utils import InferenceServerException


def main(address: str, identity: Path, golden: Path) -> None:
    """Call everything that the protocol has."""
    client = triton.InferenceServerClient(
        address,
        ssl=True,
        root_certificates=str(identity / "server-authority.pem"),
        private_key=str(identity / "key.pem"),
        certificate_chain=str(identity / "certificate.pem"),
    )
    arrays = np.load(golden)
    asked = triton.InferInput("x", arrays["x"].shape, "FP32")
    asked.set_data_from_numpy(arrays["x"])
    answer = client.infer("smartwatch", [asked], request_id="t-1", outputs=[triton.InferRequestedOutput("logits")])
    response = answer.get_response()
    try:
        client.infer("smartwatch", [])
    except InferenceServerException as error:
        refusal = (str(error.status()), error.message())
    told = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready("smartwatch", "2"),
        "nobody_ready": client.is_model_ready("nobody"),
        "metadata": client.get_model_metadata("smartwatch", as_json=True),
        "server": client.get_server_metadata(as_json=True),
        "index": [
            (one["name"], one["version"], one["state"])
            for one in client.get_model_repository_index(as_json=True)["models"]
        ],
        "answer": {
            "id": response.id,
            "version": response.model_version,
            "close": bool(np.allclose(answer.as_numpy("logits"), arrays["logits"], atol=1e-4)),
        },
        "refused": refusal,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
