"""Asking models over HTTP by the Open Inference Protocol: real sockets, real certificates, real models."""

from __future__ import annotations

import json
import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict

from tests.server.identity_provider import AUDIENCE, providing
from tests.server.live import MODEL, Live, serving
from tests.serving.asking import (
    ANSWERS,
    INPUTS,
    identity,
    logits,
    nothing_left_in_circles,
    publish,
    question,
    records,
    stub,
    until,
)
from tests.serving.http_asking import HttpCaller, over_http
from tests.serving.wrong import WRONG
from umbel.errors import CertificateRefused, MalformedMessage, NotAllowed, NotFound, OutOfBounds, TokenRefused
from umbel.oip import open_inference_pb2 as pb
from umbel.oip import open_inference_pb2_grpc as rpc
from umbel_server.authority import key_to_pem
from umbel_server.identity import Identity
from umbel_server.roles import Role
from umbel_server.serving.rest import MAX_JSON_BYTES

INFER = f"/v2/models/{MODEL}/infer"
X = INPUTS["x"]
RAW = X.tobytes()


@pytest.fixture(scope="module")
def ask(live: Live, caller: Identity, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpCaller]:
    with over_http(live, caller, tmp_path_factory.mktemp("shop")) as found:
        yield found


@pytest.fixture(scope="module")
def models(live: Live, caller: Identity) -> rpc.GRPCInferenceServiceStub:
    return stub(live, caller)


def tensor(**changed: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": "FP32", "shape": list(X.shape)} | changed


IN_BYTES = tensor(parameters={"binary_data_size": len(RAW)})


@pytest.mark.parametrize(
    ("sent", "rest"),
    [(tensor(data=X.ravel().tolist()), b""), (tensor(data=X.tolist()), b""), (IN_BYTES, RAW)],
    ids=["flat", "nested", "in bytes"],
)
@pytest.mark.parametrize(
    ("wish", "in_bytes"),
    [
        ({}, False),
        ({"parameters": {"binary_data_output": True}}, True),
        ({"outputs": [{"name": "logits", "parameters": {"binary_data": True}}]}, True),
        (
            {
                "parameters": {"binary_data_output": True},
                "outputs": [{"name": "logits", "parameters": {"binary_data": False}}],
            },
            False,
        ),
    ],
    ids=["as usual", "all in bytes", "one in bytes", "all in bytes but one"],
)
def test_the_server_answers_what_the_model_answers_on_a_device(
    ask: HttpCaller, sent: dict[str, Any], rest: bytes, wish: dict[str, Any], in_bytes: bool
) -> None:
    text = json.dumps({"id": "q-17", "inputs": [sent]} | wish).encode()
    headers = {"inference_header_content_length": str(len(text))} if rest else {}
    answer = ask("POST", INFER, text + rest, **headers)
    assert answer.status == 200, answer.body
    length = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    told = json.loads(answer.body[:length])
    (output,) = told.pop("outputs")
    assert told == {"model_name": MODEL, "model_version": "1", "id": "q-17"}
    assert (output["name"], output["datatype"], output["shape"]) == ("logits", "FP32", [8, 7])
    assert (length < len(answer.body)) is in_bytes
    found = np.frombuffer(answer.body[length:], "<f4") if in_bytes else np.array(output["data"], np.float32)
    np.testing.assert_allclose(found.reshape(8, 7), ANSWERS, atol=1e-4)


def test_tritons_own_client_is_answered_byte_by_byte(ask: HttpCaller, models: rpc.GRPCInferenceServiceStub) -> None:
    """What `tritonclient.http` 2.73 sends for a question as its users write it; its dependencies don't go with ours."""
    text = (
        b'{"id":"t-1","inputs":[{"name":"x","shape":[8,6,100],"datatype":"FP32",'
        b'"parameters":{"binary_data_size":19200}}],"parameters":{"binary_data_output":true}}'
    )
    answer = ask("POST", INFER, text + RAW, inference_header_content_length=str(len(text)))
    told = (
        b'{"model_name":"smartwatch","model_version":"1","id":"t-1","outputs":[{"name":"logits","datatype":"FP32",'
        b'"shape":[8,7],"parameters":{"binary_data_size":224}}]}'
    )
    assert answer.body == told + logits(models.ModelInfer(question())).tobytes()
    assert answer.headers["inference-header-content-length"] == str(len(told))
    assert answer.headers["content-type"] == "application/octet-stream"


def test_a_channel_and_a_number_name_the_version_that_answers(ask: HttpCaller) -> None:
    found = {named: ask.infer(question(version=named)).json["model_version"] for named in ("", "stable", "beta", "2")}
    assert found == {"": "1", "stable": "1", "beta": "2", "2": "2"}


def test_what_is_told_of_server_and_models_is_as_over_grpc(
    ask: HttpCaller, models: rpc.GRPCInferenceServiceStub
) -> None:
    over_grpc = MessageToDict(models.ModelMetadata(pb.ModelMetadataRequest(name=MODEL, version="beta")))
    over_grpc["properties"] = {name: json.loads(text) for name, text in over_grpc["properties"].items()}
    for one in (*over_grpc["inputs"], *over_grpc["outputs"]):
        one["shape"] = list(map(int, one["shape"]))
    assert ask.get(f"/v2/models/{MODEL}/versions/beta").json == over_grpc
    for path in ("/v2", "/v2/"):  # the protocol's pages say the first, its OpenAPI file the second
        assert ask.get(path).json["extensions"] == ["model_repository", "binary_tensor_data"]
    listed = MessageToDict(models.RepositoryIndex(pb.RepositoryIndexRequest()))["models"]
    for body in (b"", b"{}", b'{"ready":true}'):
        assert ask("POST", "/v2/repository/index", body).json == [{**one, "reason": ""} for one in listed]


def test_live_and_ready_are_told_of_server_and_models(ask: HttpCaller) -> None:
    assert ask.get("/v2/health/live").json == {"live": True}
    assert ask.get("/v2/health/ready").json == {"ready": True}
    assert ask.get(f"/v2/models/{MODEL}/ready").json == {"name": MODEL, "ready": True}
    assert ask.get(f"/v2/models/{MODEL}/versions/2/ready").status == 200
    for missing in ("/v2/models/nobody/ready", f"/v2/models/{MODEL}/versions/3/ready"):
        assert type(ask.get(missing).refusal) is NotFound and ask.get(missing).status == 404


@pytest.mark.parametrize("case", WRONG)
def test_what_no_model_can_answer_is_refused_by_name(ask: HttpCaller, case: str) -> None:
    asked, kind, words = WRONG[case]
    answer = ask.infer(asked)
    assert answer.status == (404 if kind is NotFound else 400)
    with pytest.raises(kind, match=words) as found:
        raise answer.refusal
    assert type(found.value) is kind


def test_a_question_that_is_refused_is_let_go(ask: HttpCaller) -> None:
    with nothing_left_in_circles():
        assert ask.infer(question({"x": X[:, :5]})).status == 400
        assert ask.get("/v2").status == 200


@pytest.mark.parametrize(
    ("verb", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/health/live/", 404),
        ("GET", "/v2/models", 404),
        ("GET", INFER, 405),
        ("PUT", "/v2", 405),
    ],
)
def test_what_is_not_there_is_refused_in_the_same_form(ask: HttpCaller, verb: str, path: str, status: int) -> None:
    answer = ask(verb, path, b"{}" if verb == "PUT" else None)
    assert answer.status == status and type(answer.refusal) is NotFound
    assert (answer.headers["allow"] is not None) is (status == 405)


def test_bodies_beyond_the_limits_are_refused_and_the_next_question_is_answered(ask: HttpCaller) -> None:
    for body in (bytes(MAX_JSON_BYTES + 1), iter([bytes(1 << 20)] * 9)):  # by its length, and in chunks without one
        answer = ask("POST", INFER, body)
        assert answer.status == 413 and type(answer.refusal) is OutOfBounds
    much = ask("POST", INFER, bytes(MAX_JSON_BYTES + 2), inference_header_content_length=str(MAX_JSON_BYTES + 1))
    assert much.status == 413
    assert ask.infer(question()).status == 200


@pytest.mark.parametrize("length", ["-1", "1e3", "99999", "", "2,2", "9" * 50, "٣"])
def test_a_length_of_json_that_can_not_be_is_refused(ask: HttpCaller, length: str) -> None:
    answer = ask("POST", INFER, b"{}", inference_header_content_length=length.encode())  # type: ignore[arg-type]
    assert answer.status == 400 and type(answer.refusal) is MalformedMessage


def test_strangers_and_devices_do_not_come_through_the_handshake(live: Live, tmp_path: Path) -> None:
    device = live.device()
    as_device = Identity(device.certificate, key_to_pem(device.key), b"")
    for who in (None, as_device):
        with over_http(live, who, tmp_path / "who") as ask, pytest.raises((ssl.SSLError, OSError)):
            ask.get("/v2")


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.CALLER], ids=lambda role: role.value)
def test_models_answer_operators_admins_and_callers_only(live: Live, tmp_path: Path, role: Role) -> None:
    with over_http(live, identity(live, role.value, f"http-{role.value}"), tmp_path / "who") as ask:
        assert ask.get(f"/v2/models/{MODEL}/ready").status == 200
        answer = ask.infer(question())
        if role in (Role.OPERATOR, Role.ADMIN):
            assert answer.status == 200
        else:
            assert answer.status == 403 and type(answer.refusal) is NotAllowed


def test_who_was_revoked_is_refused_on_a_connection_that_stands(live: Live, tmp_path: Path) -> None:
    with over_http(live, identity(live, "caller", "goes"), tmp_path / "goes") as ask:
        assert ask.get("/v2").status == 200
        operators = live.parts.operators
        gone = next(one for one in operators.all() if one.name == "goes")
        live.do(lambda: operators.revoke(next(one for one in operators.all() if one.role is Role.ADMIN), gone.id))
        answer = ask.infer(question())
        assert answer.status == 401 and type(answer.refusal) is CertificateRefused


def test_each_question_leaves_the_same_record(live: Live, tmp_path: Path) -> None:
    with over_http(live, identity(live, "caller", "http-recorded"), tmp_path / "who") as ask:
        ask.infer(question(id="first", version="beta"))
        ask.infer(question({"x": X[:3, :5]}, id="second"))
        ask.infer(question(id="third", model="nobody"))

    until(lambda: len(records(live, "http-recorded")) == 3)
    found = records(live, "http-recorded")
    told = [(one["id"], one["asked"], one["version"], one["examples"], one["outcome"]) for one in found]
    assert told == [
        ("first", "beta", 2, 8, "answered"),
        ("second", "", 1, 3, "input-mismatch"),
        ("third", "", 0, 8, "not-found"),
    ]


def test_with_an_identity_provider_a_token_does_as_well_on_the_same_port(tmp_path: Path) -> None:
    """And the port for gRPC may stay closed."""
    with providing(tmp_path) as provider:
        roles = {"apps": "caller", "watchers": "viewer"}
        oidc = {"issuer": provider.issuer, "audience": AUDIENCE, "ca": str(provider.ca), "roles": roles}
        with serving(tmp_path / "state", oidc=oidc, token_port=0, inference_http_port=0, metrics_port=0) as live:
            assert live.addresses.inference == ""
            live.add_model()
            publish(live, 1)

            def status(who: Identity | None, token: str) -> int:
                with over_http(live, who, tmp_path / "who", token) as ask:
                    return ask.infer(question()).status

            admin, app = live.first_admin(), provider.token("an-app", ("apps",))
            until(lambda: status(admin, "") == 200)
            assert status(None, app) == 200
            assert status(None, provider.token("a-watcher", ("watchers",))) == 403
            assert status(admin, "not a token") == 401, "who brings a token is asked for it"
            with over_http(live, None, tmp_path / "who") as ask:
                answer = ask.infer(question())
                assert answer.status == 401 and type(answer.refusal) is TokenRefused
                assert answer.headers["www-authenticate"] == "Bearer"
            with urllib.request.urlopen(f"http://{live.addresses.metrics}/metrics", timeout=20) as page:
                refused = 'error="token-refused",method="ModelInfer",service="InferenceOverHTTP"'
                assert f'umbel_rpc_calls_total{{{refused},status="UNAUTHENTICATED"}} 2.0' in page.read().decode()
