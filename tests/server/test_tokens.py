"""Tokens of a team's identity provider: what lets an operator in, and every way to get in without that."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from tests.server.identity_provider import AUDIENCE, IdentityProvider, jwk, providing, sign
from umbel.clock import SystemClock
from umbel.errors import NotAllowed, OutOfBounds, TokenRefused, Unavailable
from umbel_server.operators import Operator
from umbel_server.provider import FRESH_SECONDS, KEPT_SECONDS, MAX_BYTES, PAUSE_SECONDS, HttpsGet, Provider
from umbel_server.roles import Role
from umbel_server.settings import load_settings
from umbel_server.token_operators import TokenOperators
from umbel_server.tokens import TokenRules

ROLES = {"umbel-operators": Role.OPERATOR, "umbel-approvers": Role.APPROVER, "umbel-viewers": Role.VIEWER}


@dataclass
class MovedClock:
    ahead: float = 0.0

    def now(self) -> float:
        return SystemClock().now() + self.ahead


class Door:
    """The admin port's door, with the provider that it believes."""

    def __init__(self, provider: IdentityProvider, seconds: float = 5.0) -> None:
        self.provider, self.clock = provider, MovedClock()
        self.rules = TokenRules(provider.issuer, AUDIENCE, ROLES, require={"tid": "our-tenant"})
        get = HttpsGet(ssl.create_default_context(cafile=provider.ca), seconds)
        self.keys = Provider(provider.issuer, get, self.clock)

    async def enter(self, token: str, method: str = "CreateTask", **rules: Any) -> Operator:
        return await TokenOperators(replace(self.rules, **rules), self.keys, self.clock).authorize(method, token)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IdentityProvider]:
    with providing(tmp_path_factory.mktemp("provider")) as provider:
        yield provider


@pytest.fixture
def provider(running: IdentityProvider) -> Iterator[IdentityProvider]:
    keys = running.keys
    yield running
    running.keys, running.documents, running.down, running.drip = keys, {}, False, 0.0
    running.asked.clear()


@pytest.fixture
def door(provider: IdentityProvider) -> Door:
    return Door(provider)


# Who gets in.


async def test_a_genuine_token_lets_its_subject_in_with_the_role_of_its_group(door: Door) -> None:
    found = await door.enter(door.provider.token("ada"))
    assert (found.actor, found.role) == ("token:ada", Role.OPERATOR)
    assert found.until is not None and found.until > door.clock.now()


async def test_of_several_roles_the_one_counts_that_reaches(door: Door) -> None:
    token = door.provider.token(groups=("umbel-viewers", "umbel-approvers", "lunch"))
    assert (await door.enter(token, "DecideRollout")).role is Role.APPROVER
    assert (await door.enter(token, "GetStatus")).role is Role.VIEWER
    with pytest.raises(NotAllowed):
        await door.enter(token, "CreateTask")


async def test_people_are_told_apart_by_their_subject_and_not_by_a_name_that_they_choose(door: Door) -> None:
    one = await door.enter(door.provider.token("s-1", preferred_username="grace"))
    two = await door.enter(door.provider.token("s-2", preferred_username="grace"))
    assert one.actor != two.actor and one.id != two.id


async def test_groups_may_lie_deeper(door: Door) -> None:
    token = door.provider.token(groups=None, realm_access={"roles": ["umbel-viewers"]})
    assert (await door.enter(token, "GetStatus", groups_claim="realm_access.roles")).role is Role.VIEWER


async def test_elliptic_keys_do_as_well(door: Door) -> None:
    door.provider.keys = {"curve": ec.generate_private_key(ec.SECP256R1())}
    assert (await door.enter(door.provider.token())).role is Role.OPERATOR


# Who doesn't.


def forged(claims: dict[str, Any], header: dict[str, Any], secret: bytes = b"") -> str:
    """A token by hand, as no library makes it: unsigned, or with an HMAC over `secret`."""

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    signed = f"{part(json.dumps(header).encode())}.{part(json.dumps(claims).encode())}"
    return f"{signed}.{part(hmac.digest(secret, signed.encode(), hashlib.sha256)) if secret else ''}"


@pytest.mark.parametrize("name", ["none", "None", "NONE", ""])
async def test_a_token_without_a_signature_is_refused(door: Door, name: str) -> None:
    claims = door.provider.claims(groups=("umbel-operators",))
    with pytest.raises(TokenRefused, match="algorithm"):
        await door.enter(forged(claims, {"alg": name, "kid": "first"}))


async def test_a_token_that_was_signed_with_the_public_key_as_a_secret_is_refused(door: Door) -> None:
    public = door.provider.keys["first"].public_key()
    pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    token = forged(door.provider.claims(groups=("umbel-operators",)), {"alg": "HS256", "kid": "first"}, pem)
    with pytest.raises(TokenRefused, match="algorithm"):
        await door.enter(token)


async def test_a_shared_secret_in_the_key_set_is_no_key_even_if_settings_name_its_algorithm(door: Door) -> None:
    secret = {"kty": "oct", "kid": "s", "k": base64.urlsafe_b64encode(b"x" * 32).decode()}
    door.provider.documents["/keys"] = json.dumps({"keys": [secret]}).encode()
    token = forged(door.provider.claims(groups=("umbel-operators",)), {"alg": "HS256", "kid": "s"}, b"x" * 32)
    with pytest.raises(TokenRefused):
        await door.enter(token, algorithms=("HS256",))
    with pytest.raises(TokenRefused, match="isn't one for RS256"):
        await door.enter(sign(door.provider.claims(), door.provider.keys["first"], "s"))


async def test_an_algorithm_that_settings_do_not_name_is_refused(door: Door) -> None:
    token = sign(door.provider.claims(), door.provider.keys["first"], "first", "RS512")
    with pytest.raises(TokenRefused, match=r"'RS512' isn't taken here, but RS256, PS256, ES256, EdDSA$"):
        await door.enter(token)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"iss": "https://elsewhere.example"}, "'https://elsewhere.example'; .* trusts is 'https://localhost:"),
        ({"iss": None}, "issuer is 'None'"),
        ({"aud": "another-app"}, "isn't meant"),
        ({"aud": ["another-app", 7]}, "isn't meant"),
        ({"aud": None}, "isn't meant"),
        ({"exp": 1_000}, "expired"),
        ({"exp": None}, "from when to when"),
        ({"exp": "never"}, "from when to when"),
        ({"exp": True}, "from when to when"),
        ({"iat": None}, "from when to when"),
        ({"nbf": 4e9}, "doesn't count yet"),
        ({"iat": 4e9, "exp": 5e9}, "doesn't count yet"),
        ({"iat": 1e9, "exp": 5e9}, "older than"),
        ({"tid": "another-tenant"}, "tid"),
        ({"tid": None}, "tid"),
        ({"sub": None}, "subject"),
        ({"sub": ""}, "subject"),
        ({"sub": "ada\nadmin"}, "subject"),
        ({"sub": "x" * 91}, "subject"),
    ],
    ids=str,
)
async def test_a_genuine_signature_over_the_wrong_claims_is_refused(
    door: Door, changes: dict[str, Any], words: str
) -> None:
    claims = door.provider.claims(groups=("umbel-operators",), **changes)
    # By hand: the library wouldn't sign some of these.
    claims = {name: value for name, value in claims.items() if value is not None}
    token = _signed_as_is(claims, door.provider.keys["first"])
    with pytest.raises(TokenRefused, match=words):
        await door.enter(token)


def _signed_as_is(claims: dict[str, Any], key: rsa.RSAPrivateKey) -> str:
    from jwt import PyJWS

    return PyJWS().encode(json.dumps(claims).encode(), key, "RS256", headers={"kid": "first"})


async def test_a_token_stolen_from_another_tenant_of_the_same_provider_is_refused(door: Door) -> None:
    """Same issuer, same keys, same audience, a group of the same name."""
    with pytest.raises(TokenRefused, match="tid"):
        await door.enter(door.provider.token("mallory", tid="tenant-of-mallory"))


@pytest.mark.parametrize(
    "groups", [None, (), ("lunch",), "umbel", 7, {"umbel-operators": 1}, ("umbel-operators",) * 2000]
)
async def test_a_token_without_a_group_that_has_a_role_gets_nowhere(door: Door, groups: object) -> None:
    with pytest.raises((NotAllowed, TokenRefused)):
        await door.enter(door.provider.token(groups=groups), "GetStatus")


async def test_a_key_of_somebody_else_is_refused(door: Door) -> None:
    theirs = rsa.generate_private_key(65537, 2048)
    with pytest.raises(TokenRefused, match="signature"):
        await door.enter(sign(door.provider.claims(groups=("umbel-operators",)), theirs, "first"))


async def test_a_key_that_travels_in_the_token_itself_counts_for_nothing(door: Door) -> None:
    theirs = rsa.generate_private_key(65537, 2048)
    headers = {"jwk": jwk("first", theirs), "jku": "https://elsewhere.example/keys", "x5u": "https://elsewhere.example"}
    with pytest.raises(TokenRefused, match="signature"):
        await door.enter(sign(door.provider.claims(groups=("umbel-operators",)), theirs, "first", **headers))
    assert all("elsewhere" not in path for path in door.provider.asked)


async def test_a_key_for_encryption_or_for_another_algorithm_or_too_short_is_refused(door: Door) -> None:
    key, short = door.provider.keys["first"], rsa.generate_private_key(65537, 1024)
    for wrong in (
        jwk("first", key) | {"use": "enc"},
        jwk("first", key) | {"key_ops": ["encrypt"]},
        jwk("first", key) | {"alg": "PS256"},
        jwk("first", ec.generate_private_key(ec.SECP256R1())),
        jwk("first", short),
        {"kty": "RSA", "kid": "first"},
    ):
        door.provider.documents["/keys"] = json.dumps({"keys": [wrong]}).encode()
        with pytest.raises(TokenRefused):
            await Door(door.provider).enter(door.provider.token())
    door.provider.documents["/keys"] = json.dumps({"keys": [jwk("first", short)]}).encode()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        token = sign(door.provider.claims(groups=("umbel-operators",)), short, "first")
        with pytest.raises(TokenRefused, match="2048"):
            await Door(door.provider).enter(token)


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "." * 5, "é.é.é", "x" * 8_000, '{"alg":"RS256"}'])
async def test_what_is_no_token_is_refused(door: Door, token: str) -> None:
    with pytest.raises(TokenRefused):
        await door.enter(token)
    assert door.provider.asked == [], "nothing is asked for a token that can't be one"


async def test_a_genuine_token_of_any_length_is_not_taken(door: Door) -> None:
    await door.enter(door.provider.token("ada", note="x" * 4_000))
    with pytest.raises(TokenRefused, match="characters"):
        await door.enter(door.provider.token("ada", note="x" * 7_000))


async def test_critical_extensions_and_nameless_keys_are_refused(door: Door) -> None:
    key = door.provider.keys["first"]
    for name, value in (("x", 1), ("b64", True)):
        with pytest.raises(TokenRefused):
            await door.enter(
                sign(door.provider.claims(groups=("umbel-operators",)), key, "first", crit=[name], **{name: value})
            )
    with pytest.raises(TokenRefused, match="kid"):
        await door.enter(sign(door.provider.claims(), key, None))


async def test_an_extension_that_the_library_knows_is_refused_too(door: Door) -> None:
    header = {"alg": "RS256", "kid": "first", "b64": True, "crit": ["b64"]}
    parts = (header, door.provider.claims(groups=("umbel-operators",)))
    signed = b".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in parts)
    signature = door.provider.keys["first"].sign(signed, padding.PKCS1v15(), hashes.SHA256())
    token = b".".join((signed, base64.urlsafe_b64encode(signature).rstrip(b"="))).decode()
    with pytest.raises(TokenRefused, match="extensions"):
        await door.enter(token)


# The provider's keys.


async def test_keys_are_fetched_once_and_again_only_when_they_are_old(door: Door) -> None:
    for _ in range(3):
        await door.enter(door.provider.token())
    assert len(door.provider.asked) == 2
    door.clock.ahead = FRESH_SECONDS + 1
    await door.enter(_later(door, FRESH_SECONDS + 1))
    assert len(door.provider.asked) == 4


async def test_who_comes_while_the_keys_are_fetched_waits_for_them(door: Door) -> None:
    """The first calls after a start, or after the provider's keys were replaced, come together."""
    found = await asyncio.gather(*(door.enter(door.provider.token(subject)) for subject in ("ada", "grace", "ken")))
    assert [one.actor for one in found] == ["token:ada", "token:grace", "token:ken"]
    assert len(door.provider.asked) == 2


def _later(door: Door, seconds: float) -> str:
    now = int(SystemClock().now() + seconds)
    return door.provider.token(iat=now, exp=now + 600)


async def test_a_new_key_is_found_at_once_and_a_withdrawn_one_forgotten(door: Door) -> None:
    await door.enter(door.provider.token())
    old = door.provider.keys["first"]
    door.provider.rotate("second")
    door.clock.ahead = PAUSE_SECONDS + 1
    await door.enter(door.provider.token())
    with pytest.raises(TokenRefused, match="any more"):
        await door.enter(sign(door.provider.claims(groups=("umbel-operators",)), old, "first"))


async def test_made_up_key_ids_do_not_have_the_provider_asked_again_and_again(door: Door) -> None:
    await door.enter(door.provider.token())
    for number in range(20):
        with pytest.raises(TokenRefused, match="doesn't have"):
            await door.enter(sign(door.provider.claims(), door.provider.keys["first"], f"made-up-{number}"))
    assert len(door.provider.asked) == 2


async def test_known_keys_count_for_a_while_without_the_provider_and_not_for_ever(door: Door) -> None:
    await door.enter(door.provider.token())
    door.provider.down = True
    door.clock.ahead = FRESH_SECONDS + 1
    await door.enter(_later(door, FRESH_SECONDS + 1))
    door.clock.ahead = KEPT_SECONDS + 1
    with pytest.raises(Unavailable, match="503"):
        await door.enter(_later(door, KEPT_SECONDS + 1))


async def test_a_key_that_an_unreachable_provider_may_have_is_no_forgery(door: Door) -> None:
    await door.enter(door.provider.token())
    door.provider.rotate("second", keep=True)
    door.provider.down, door.clock.ahead = True, PAUSE_SECONDS + 1
    with pytest.raises(Unavailable, match="503"):
        await door.enter(door.provider.token())
    await door.enter(door.provider.token(kid="first"))


async def test_a_key_withdrawn_while_the_clock_was_ahead_is_forgotten_once_it_is_set_right(door: Door) -> None:
    door.clock.ahead = 86_400.0
    await door.enter(_later(door, 86_400.0))
    door.clock.ahead, old = 0.0, door.provider.token()
    door.provider.rotate("second")
    with pytest.raises(TokenRefused, match="any more"):
        await door.enter(old)


@pytest.mark.parametrize(
    "path,document",
    [
        ("/keys", b'{"keys": [' + b" " * MAX_BYTES + b"]}"),
        ("/keys", json.dumps({"keys": [{"kty": "RSA", "kid": str(n)} for n in range(65)]}).encode()),
        ("/keys", b'{"keys": [{"kid": "a"}, {"kid": "a"}]}'),
        ("/keys", b"[]"),
        ("/keys", b"<html>"),
        ("/keys", b"[" * 100_000),
        ("/keys", b"{}"),
        ("/.well-known/openid-configuration", b"{}"),
    ],
    ids=["endless", "too many", "twice", "a list", "no JSON", "deep", "empty", "nothing"],
)
async def test_documents_that_are_not_what_they_should_be_leave_the_door_shut(
    door: Door, path: str, document: bytes
) -> None:
    door.provider.documents[path] = document
    with pytest.raises(Unavailable):
        await door.enter(door.provider.token())


async def test_keys_that_another_issuers_document_names_are_not_fetched(door: Door) -> None:
    document = {"issuer": "https://elsewhere.example", "jwks_uri": f"{door.provider.issuer}/keys"}
    door.provider.documents["/.well-known/openid-configuration"] = json.dumps(document).encode()
    with pytest.raises(Unavailable, match="another issuer's, 'https://elsewhere"):
        await door.enter(door.provider.token())


@pytest.mark.parametrize("address", ["http{}/keys", "file:///etc/passwd", 7, None])
async def test_keys_are_only_fetched_over_https(door: Door, address: object) -> None:
    named = address.format(door.provider.issuer.removeprefix("https")) if isinstance(address, str) else address
    document = json.dumps({"issuer": door.provider.issuer, "jwks_uri": named}).encode()
    door.provider.documents["/.well-known/openid-configuration"] = document
    with pytest.raises(Unavailable, match="names no https address"):
        await door.enter(door.provider.token())


@pytest.mark.parametrize(
    "address", ["https://[/keys", "https://a b/keys", "https://a:b/keys", f"https://{'a' * 64}/keys", "https://../keys"]
)
async def test_known_keys_count_while_the_provider_names_an_address_that_is_none(door: Door, address: str) -> None:
    await door.enter(door.provider.token())
    document = json.dumps({"issuer": door.provider.issuer, "jwks_uri": address}).encode()
    door.provider.documents["/.well-known/openid-configuration"] = document
    door.clock.ahead = FRESH_SECONDS + 1
    await door.enter(_later(door, FRESH_SECONDS + 1))


async def test_a_slow_provider_costs_no_more_than_the_deadline(provider: IdentityProvider) -> None:
    provider.drip = 0.05
    with pytest.raises(Unavailable, match="longer than"):
        await Door(provider, seconds=0.4).enter(provider.token())


async def test_a_provider_that_is_gone_or_that_is_not_who_it_says_is_unavailable(
    provider: IdentityProvider, tmp_path: Path
) -> None:
    door = Door(provider)
    door.keys = Provider(provider.issuer, HttpsGet(ssl.create_default_context()), door.clock)
    with pytest.raises(Unavailable, match="certificate"):
        await door.enter(provider.token())
    door.keys = Provider("https://localhost:1", HttpsGet(ssl.create_default_context()), door.clock)
    with pytest.raises(Unavailable, match="can't be had"):
        await door.enter(provider.token())


# Settings.


GOOD = {"issuer": "https://id.example", "audience": "umbel", "roles": {"ops": "operator"}}


def test_settings_name_a_provider(tmp_path: Path) -> None:
    found = load_settings(tmp_path, oidc=GOOD).oidc
    assert found is not None
    assert found.rules.roles == {"ops": Role.OPERATOR}
    assert "HS256" not in found.rules.algorithms


@pytest.mark.parametrize(
    "changes",
    [
        {"issuer": "http://id.example"},
        {"audience": ""},
        {"roles": {}},
        {"roles": {"ops": "root"}},
        {"algorithms": ["HS256"]},
        {"algorithms": ["none"]},
        {"algorithms": []},
        {"longest_hours": 0},
        {"surprise": 1},
    ],
    ids=str,
)
def test_settings_that_would_open_the_door_too_far_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(OutOfBounds, match="oidc"):
        load_settings(tmp_path, oidc=GOOD | changes)
