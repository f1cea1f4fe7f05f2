"""Asking models over the network by the Open Inference Protocol: real sockets, real certificates, real models."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import numpy as np
import pytest

from tests.server.identity_provider import AUDIENCE, providing
from tests.server.live import MODEL, Live, refused, serving
from tests.serving.asking import (
    ANSWERS,
    INPUTS,
    add_version,
    identity,
    logits,
    nothing_left_in_circles,
    publish,
    question,
    records,
    stub,
    until,
)
from tests.serving.wrong import WRONG
from umbel.errors import CertificateRefused, MalformedMessage, ModelUnusable, NotAllowed
from umbel.oip import open_inference_pb2 as pb
from umbel.oip import open_inference_pb2_grpc as rpc
from umbel.v1 import admin_pb2
from umbel_server.authority import key_to_pem
from umbel_server.folder import Folder
from umbel_server.identity import Identity
from umbel_server.roles import Role
from umbel_server.serving.inference import MAX_QUESTION_BYTES

TRITON_CALLER = Path(__file__).with_name("triton_caller.py")


@pytest.fixture(scope="module")
def models(live: Live, caller: Identity) -> rpc.GRPCInferenceServiceStub:
    return stub(live, caller)


def test_the_server_answers_what_the_model_answers_on_a_device(models: rpc.GRPCInferenceServiceStub) -> None:
    answer = models.ModelInfer(question(id="q-17"))
    assert (answer.model_name, answer.model_version, answer.id) == (MODEL, "1", "q-17")
    np.testing.assert_allclose(logits(answer), ANSWERS, atol=1e-4)


def test_numbers_in_lists_are_answered_in_lists(models: rpc.GRPCInferenceServiceStub) -> None:
    asked = pb.ModelInferRequest(model_name=MODEL)
    tensor = asked.inputs.add(name="x", datatype="FP32", shape=INPUTS["x"].shape)
    tensor.contents.fp32_contents.extend(INPUTS["x"].ravel().tolist())
    answer = models.ModelInfer(asked)
    assert not answer.raw_output_contents
    found = np.array(answer.outputs[0].contents.fp32_contents, np.float32).reshape(ANSWERS.shape)
    np.testing.assert_allclose(found, ANSWERS, atol=1e-4)


def test_a_channel_and_a_number_name_the_version_that_answers(models: rpc.GRPCInferenceServiceStub) -> None:
    answered = {
        asked: models.ModelInfer(question(version=asked)).model_version for asked in ("", "stable", "beta", "2")
    }
    assert answered == {"": "1", "stable": "1", "beta": "2", "2": "2"}


def test_a_model_tells_what_it_takes_and_gives(models: rpc.GRPCInferenceServiceStub) -> None:
    told = models.ModelMetadata(pb.ModelMetadataRequest(name=MODEL))
    assert (told.name, list(told.versions)) == (MODEL, ["1", "2"])
    assert [(one.name, one.datatype, list(one.shape)) for one in told.inputs] == [("x", "FP32", [-1, 6, 100])]
    assert [(one.name, one.datatype, list(one.shape)) for one in told.outputs] == [("logits", "FP32", [-1, 7])]
    properties = {name: json.loads(value) for name, value in told.properties.items()}
    assert (properties["version"], properties["channels"]) == (1, {"stable": 1, "beta": 2})
    assert properties["labels"][0] == "pendulum"


def test_live_and_ready_are_told_of_server_and_models(models: rpc.GRPCInferenceServiceStub) -> None:
    assert models.ServerLive(pb.ServerLiveRequest()).live
    assert models.ServerReady(pb.ServerReadyRequest()).ready
    assert models.ModelReady(pb.ModelReadyRequest(name=MODEL)).ready
    assert models.ModelReady(pb.ModelReadyRequest(name=MODEL, version="2")).ready
    assert not models.ModelReady(pb.ModelReadyRequest(name="nobody")).ready
    assert not models.ModelReady(pb.ModelReadyRequest(name=MODEL, version="3")).ready
    assert models.ServerMetadata(pb.ServerMetadataRequest()).name == "umbel"


@pytest.mark.parametrize("case", WRONG)
def test_what_no_model_can_answer_is_refused_by_name(models: rpc.GRPCInferenceServiceStub, case: str) -> None:
    asked, kind, words = WRONG[case]
    with refused() as found:
        models.ModelInfer(asked)
    assert type(found[0]) is kind
    with pytest.raises(kind, match=words):
        raise found[0]


def test_a_question_that_is_refused_is_let_go(models: rpc.GRPCInferenceServiceStub) -> None:
    """It may have 16 MB: many that stayed would take the coordinator down."""
    with nothing_left_in_circles():
        for _ in range(3):
            with refused():
                models.ModelInfer(question({"x": INPUTS["x"][:, :5]}))
            assert models.ServerLive(pb.ServerLiveRequest()).live, "gRPC holds on to the last calls anyway"


def test_bytes_that_are_no_question_are_refused(live: Live, caller: Identity) -> None:
    channel = live.channel(live.addresses.inference, caller.key, caller.certificate)
    with refused() as found:
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\xff\xff")
    assert type(found[0]) is MalformedMessage


def test_a_question_beyond_all_bounds_is_refused_before_it_is_read(models: rpc.GRPCInferenceServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as found:
        models.ModelInfer(pb.ModelInferRequest(raw_input_contents=[bytes(MAX_QUESTION_BYTES)]))
    assert found.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]


def test_callers_ask_models_and_may_do_nothing_else(live: Live, caller: Identity) -> None:
    for method in ("GetStatus", "ListModels", "ListAudit"):
        with refused() as found:
            getattr(live.admin(caller), method)(getattr(admin_pb2, f"{method}Request")())
        assert type(found[0]) is NotAllowed


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.CALLER], ids=lambda role: role.value)
def test_models_answer_operators_admins_and_callers_only(live: Live, role: Role) -> None:
    asking = stub(live, identity(live, role.value))
    assert asking.ModelReady(pb.ModelReadyRequest(name=MODEL)).ready
    if role in (Role.OPERATOR, Role.ADMIN):
        assert asking.ModelInfer(question()).model_version == "1"
    else:
        with refused() as found:
            asking.ModelInfer(question())
        assert type(found[0]) is NotAllowed


def test_a_revoked_caller_is_refused_from_its_next_question_on(live: Live) -> None:
    gone = identity(live, "caller", "gone")
    asking = stub(live, gone)
    asking.ModelInfer(question())
    live.admin().RevokeOperator(admin_pb2.RevokeOperatorRequest(id="gone"))
    with refused() as found:
        asking.ModelInfer(question())
    assert type(found[0]) is CertificateRefused


def test_strangers_and_devices_do_not_come_through_the_handshake(live: Live) -> None:
    device = live.device()
    for certificate in (None, device.certificate):
        key = key_to_pem(device.key) if certificate else None
        asking = rpc.GRPCInferenceServiceStub(live.channel(live.addresses.inference, key, certificate))
        with pytest.raises(grpc.RpcError) as found:
            asking.ServerLive(pb.ServerLiveRequest(), timeout=5)
        assert found.value.code() is grpc.StatusCode.UNAVAILABLE  # type: ignore[attr-defined]


def test_tritons_own_client_works_unchanged(live: Live, caller: Identity, tmp_path: Path) -> None:
    caller.write(tmp_path / "shop")
    np.savez(tmp_path / "golden.npz", x=INPUTS["x"], logits=ANSWERS)
    command = [sys.executable, TRITON_CALLER, live.addresses.inference, tmp_path / "shop", tmp_path / "golden.npz"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["live"] and told["ready"] and told["model_ready"] and not told["nobody_ready"]
    assert told["metadata"]["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1", "6", "100"]}]
    assert told["answer"] == {"id": "t-1", "version": "1", "close": True}
    assert told["index"] == [[MODEL, "1", "READY"], [MODEL, "2", "READY"]]
    assert told["refused"][0] == "StatusCode.INVALID_ARGUMENT"


def test_each_question_leaves_a_record_of_who_asked_what_and_nothing_of_what_was_in_it(live: Live) -> None:
    asking = stub(live, identity(live, "caller", "recorded"))
    asking.ModelInfer(question(id="first", version="beta"))
    with refused():
        asking.ModelInfer(question({"x": INPUTS["x"][:3, :5]}, id="second"))
    with refused():
        asking.ModelInfer(question(id="third", model="nobody"))

    until(lambda: len(records(live, "recorded")) == 3)
    found = records(live, "recorded")
    told = [(one["id"], one["model"], one["asked"], one["version"], one["examples"]) for one in found]
    assert told == [("first", MODEL, "beta", 2, 8), ("second", MODEL, "", 1, 3), ("third", "nobody", "", 0, 8)]
    assert [one["outcome"] for one in found] == ["answered", "input-mismatch", "not-found"]
    assert set(found[0]) == {
        *("at", "caller", "id", "model", "asked", "version", "examples", "waited", "ran", "outcome")
    }


def test_with_a_token_the_same_questions_are_asked_on_the_token_port(tmp_path: Path) -> None:
    with providing(tmp_path) as provider:
        roles = {"apps": "caller", "watchers": "viewer"}
        oidc = {"issuer": provider.issuer, "audience": AUDIENCE, "ca": str(provider.ca), "roles": roles}
        with serving(tmp_path / "state", oidc=oidc, token_port=0, inference_port=0) as live:
            live.add_model()
            publish(live, 1)
            tls = grpc.ssl_channel_credentials(live.parts.authorities.server.certificate_pem)
            found = {}
            for group in roles:
                token = grpc.access_token_call_credentials(provider.token(f"one-of-{group}", (group,)))
                credentials = grpc.composite_channel_credentials(tls, token)
                channel = grpc.secure_channel(live.addresses.tokens, credentials)
                live.channels.append(channel)
                found[group] = rpc.GRPCInferenceServiceStub(channel)
            until(lambda: found["watchers"].ModelReady(pb.ModelReadyRequest(name=MODEL)).ready)
            assert found["apps"].ModelInfer(question()).model_version == "1"
            with refused() as refusal:
                found["watchers"].ModelInfer(question())
            assert type(refusal[0]) is NotAllowed


# Releases move while questions come.


def test_a_new_release_takes_over_without_one_question_lost(tmp_path: Path) -> None:
    with serving(tmp_path / "state", inference_port=0) as live:
        live.add_model()
        publish(live, 1)
        asking = stub(live, live.first_admin())
        until(lambda: asking.ModelReady(pb.ModelReadyRequest(name=MODEL)).ready)
        answered: list[str] = []
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                answered.append(asking.ModelInfer(question()).model_version)

        asker = threading.Thread(target=ask)
        asker.start()
        try:
            publish(live, add_version(live, tmp_path / "two", 0.01))
            until(lambda: "2" in answered)
        finally:
            stop.set()
            asker.join()
        assert answered == sorted(answered), "no question went back to the version before"
        assert set(answered) == {"1", "2"}


def test_a_release_that_does_not_load_leaves_the_one_before_answering_until_it_is_mended(tmp_path: Path) -> None:
    with serving(tmp_path / "state", inference_port=0) as live:
        live.add_model()
        publish(live, 1)
        asking = stub(live, live.first_admin())
        until(lambda: asking.ModelReady(pb.ModelReadyRequest(name=MODEL)).ready)
        add_version(live, tmp_path / "two", 0.01)
        registry = live.parts.coordinator.registry
        version = live.do(lambda: live.parts.coordinator.operations.version(MODEL, 2))
        weights = registry.bundle(version.bundle).paths["weights.safetensors"]
        whole = weights.read_bytes()
        weights.chmod(0o600)
        # The least bit of one weight, which no golden example would show.
        weights.write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])
        publish(live, 2)

        def told() -> list[tuple[str, str, str]]:
            index = asking.RepositoryIndex(pb.RepositoryIndexRequest()).models
            return [(one.version, one.state, one.reason) for one in index]

        until(lambda: any(state == "UNAVAILABLE" for _, state, _ in told()))
        assert asking.ModelInfer(question()).model_version == "1"
        assert "isn't the one that the manifest lists" in told()[1][2] and told()[0][1] == "READY"
        assert [one.version for one in asking.RepositoryIndex(pb.RepositoryIndexRequest(ready=True)).models] == ["1"]
        with refused() as found:
            asking.ModelInfer(question(version="2"))
        assert type(found[0]) is ModelUnusable

        weights.write_bytes(whole)
        live.clock.ahead = 61.0
        until(lambda: asking.ModelInfer(question()).model_version == "2")


def test_where_no_port_is_named_no_model_is_asked(tmp_path: Path) -> None:
    with serving(tmp_path / "state") as live:
        assert live.addresses.inference == ""
        assert not Folder(live.settings.state).inferences.exists()
        who = live.first_admin()
        for address in (live.addresses.admin, live.addresses.device):
            asking = rpc.GRPCInferenceServiceStub(live.channel(address, who.key, who.certificate))
            with pytest.raises(grpc.RpcError) as found:
                asking.ServerLive(pb.ServerLiveRequest(), timeout=5)
            code = found.value.code()  # type: ignore[attr-defined]
            assert code in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE)
