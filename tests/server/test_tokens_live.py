"""The admin port for people with tokens: still TLS, the same table of roles, and `umbel` with `--token-file`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.server.identity_provider import AUDIENCE, IdentityProvider, providing
from tests.server.live import Live, refused, serving
from tests.server.test_admin import METHODS, SERVICE, call, expect_no_refusal_of_rights
from umbel import errors
from umbel.v1 import admin_pb2 as pb
from umbel.v1 import admin_pb2_grpc
from umbel_server.cli.connection import caller_of
from umbel_server.roles import ALLOWED, Role


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, IdentityProvider]]:
    folder = tmp_path_factory.mktemp("tokens")
    with providing(folder) as provider:
        oidc = {
            "issuer": provider.issuer,
            "audience": AUDIENCE,
            "ca": str(provider.ca),
            "roles": {role.value: role.value for role in Role},
        }
        with serving(folder / "state", oidc=oidc, token_port=0) as live:
            yield live, provider


def channel(live: Live, token: str, address: str = "") -> grpc.Channel:
    tls = grpc.ssl_channel_credentials(live.parts.authorities.server.certificate_pem)
    credentials = grpc.composite_channel_credentials(tls, grpc.access_token_call_credentials(token)) if token else tls
    found = grpc.secure_channel(address or live.addresses.tokens, credentials, options=(("grpc.enable_http_proxy", 0),))
    live.channels.append(found)
    return found


@pytest.mark.parametrize("role", Role, ids=lambda role: role.value)
def test_each_role_by_token_reaches_exactly_as_far_as_by_certificate(
    world: tuple[Live, IdentityProvider], role: Role
) -> None:
    live, provider = world
    walked = channel(live, provider.token(f"one-{role.value}", (role.value,)))
    for method in METHODS:
        if role in ALLOWED[method]:
            if method != "Watch":  # it would wait for something to happen
                expect_no_refusal_of_rights(walked, method)
            continue
        with refused() as found:
            call(walked, method)
        assert isinstance(found[0], errors.NotAllowed), method
        assert f"yours is {role.value}" in str(found[0])


@pytest.mark.parametrize("kind", ["nothing", "rubbish", "no group", "expired", "a device's enrolment token"])
def test_a_call_without_a_token_that_counts_opens_no_method(world: tuple[Live, IdentityProvider], kind: str) -> None:
    live, provider = world
    token = {
        "nothing": "",
        "rubbish": "rubbish",
        "no group": provider.token(groups=("lunch",)),
        "expired": provider.token(groups=("admin",), iat=1_000, exp=1_000),
        "a device's enrolment token": live.token(),
    }[kind]
    walked = channel(live, token)
    for method in METHODS:
        with refused() as found:
            call(walked, method)
        expected = errors.NotAllowed if kind == "no group" else errors.TokenRefused
        assert isinstance(found[0], expected), method


def test_two_tokens_in_one_call_are_none(world: tuple[Live, IdentityProvider]) -> None:
    live, provider = world
    header = ("authorization", f"Bearer {provider.token(groups=('admin',))}")
    path = f"/{SERVICE.full_name}/GetStatus"
    plain = channel(live, "")
    plain.unary_unary(path)(b"", metadata=(header,), timeout=10)
    for metadata in ((header, header), (("authorization", f"Basic {header[1][7:]}"),)):
        with refused() as found:
            plain.unary_unary(path)(b"", metadata=metadata, timeout=10)
        assert isinstance(found[0], errors.TokenRefused)


def test_a_token_opens_neither_the_certificate_port_nor_one_without_tls(world: tuple[Live, IdentityProvider]) -> None:
    live, provider = world
    token = provider.token(groups=("admin",))
    with pytest.raises(grpc.RpcError) as raised:
        call(channel(live, token, live.addresses.admin), "GetStatus")
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    with grpc.insecure_channel(live.addresses.tokens, options=(("grpc.enable_http_proxy", 0),)) as plain:
        with pytest.raises(grpc.RpcError) as raised:
            plain.unary_unary(f"/{SERVICE.full_name}/GetStatus")(
                b"", metadata=(("authorization", f"Bearer {token}"),), timeout=5
            )
        assert raised.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_audit_names_the_subject(world: tuple[Live, IdentityProvider]) -> None:
    live, provider = world
    stub = admin_pb2_grpc.AdminServiceStub(channel(live, provider.token("auth0|ada", ("operator",), name="root")))
    stub.CreateTokens(pb.CreateTokensRequest(population="wrists", count=1, lifetime_seconds=60))
    assert live.admin().ListAudit(pb.ListAuditRequest(limit=1)).rows[0].actor == "token:auth0|ada"


def test_watching_ends_with_the_token(world: tuple[Live, IdentityProvider]) -> None:
    live, provider = world
    watching = admin_pb2_grpc.AdminServiceStub(channel(live, provider.token(groups=("viewer",)))).Watch(
        pb.WatchRequest(), timeout=20
    )
    from tests.server.test_admin import _until_watched
    from umbel_server.events import ServerEvent

    _until_watched(live)
    live.clock.ahead = 3_600.0
    live.do(lambda: live.parts.coordinator._watchers.tell(ServerEvent(live.clock.now(), "test", "test", {})))
    try:
        with refused() as found:
            list(watching)
        assert isinstance(found[0], errors.TokenRefused)
    finally:
        live.clock.ahead = 0.0


def test_umbel_takes_a_token_by_option_by_environment_and_from_a_file(
    world: tuple[Live, IdentityProvider], tmp_path: Path
) -> None:
    live, provider = world
    file = tmp_path / "token"
    file.write_text(provider.token(groups=("viewer",)) + "\n")
    state = ["--state", str(live.settings.state)]
    elsewhere = [
        "--server",
        live.addresses.tokens,
        "--server-authority",
        str(live.settings.state / "authority/server.pem"),
    ]
    for options, environment in (
        ([*state, "--token-file", str(file)], {}),
        ([*state, "--token", file.read_text()], {}),
        (elsewhere, {"UMBEL_TOKEN": file.read_text()}),
        (elsewhere, {"UMBEL_TOKEN_FILE": str(file)}),
    ):
        done = umbel("status", *options, environment=environment)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["devices"] == 0
    refused_one = umbel("devices", "tokens", "create", "--population", "p", *state, "--token-file", str(file))
    assert refused_one.returncode == 1
    assert "yours is viewer" in refused_one.stderr
    wrong = ("--server", live.addresses.tokens, "--server-authority", str(file), "--token-file", str(file))
    assert "isn't a certificate in PEM" in umbel("status", *wrong).stderr


@pytest.mark.parametrize(
    "named,words",
    [
        ({"token": ""}, "--token holds no token"),
        ({"file": "\n"}, "token.txt holds no token"),
        ({"file": "a\nb\n"}, "token.txt holds no token"),
        ({"token": "a", "identity": Path("admin")}, "name one"),
        ({"token": "a", "file": "b"}, "name one"),
    ],
    ids=str,
)
def test_whoever_got_no_token_after_all_never_calls_as_the_folders_admin(
    tmp_path: Path, named: dict[str, Any], words: str
) -> None:
    file = tmp_path / "token.txt" if "file" in named else None
    if file:
        file.write_text(named["file"])
    with pytest.raises(errors.BadInput, match=words):
        caller_of(named.get("identity"), named.get("token"), file, None)


def umbel(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "umbel_server.cli", *arguments, "--json"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("UMBEL_")}
    return subprocess.run(
        command, env=inherited | (environment or {}), capture_output=True, text=True, timeout=60, check=False
    )


def test_without_a_provider_there_is_no_port_for_tokens(tmp_path: Path) -> None:
    with serving(tmp_path / "state") as live:
        assert live.addresses.tokens == ""
        done = umbel("status", "--state", str(live.settings.state), "--token", "x")
        assert done.returncode == 1
        assert "takes no tokens" in done.stderr
