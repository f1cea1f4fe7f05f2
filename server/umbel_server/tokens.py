"""Who a bearer token is for, and which roles it brings: JSON Web Tokens of an OpenID Connect provider, checked.

Bytes and keys in, `Person` or `TokenRefused` out; no IO, no clock. What is checked, and against what: the signature, by
a key of the provider and an algorithm of a list that holds asymmetric ones only (RFC 8725, 3.1); issuer, audience and
times (RFC 7519, 4.1); claims that tell one tenant of a shared provider from another; and a group that is mapped to a
role. Whatever is absent refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

import jwt
from jwt import PyJWK
from jwt.exceptions import PyJWTError

from umbel.clock import DAY
from umbel.errors import NotAllowed, TokenRefused
from umbel_server.roles import Role, reaches

MAX_TOKEN_CHARS: Final = 7_000
"""gRPC takes headers of 8 kB in all."""
MAX_SUBJECT_CHARS: Final = 90
MAX_GROUPS: Final = 1_000
SKEW_SECONDS: Final = 60.0
"""How far two clocks may lie apart."""
LEAST_RSA_BITS: Final = 2_048
ASYMMETRIC: Final = MappingProxyType(
    dict.fromkeys(("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"), "RSA")
    | dict.fromkeys(("ES256", "ES384", "ES512"), "EC")
    | {"EdDSA": "OKP"}
)
"""Algorithm -> type of its keys (RFC 7518, 6.1): never `none`, never one whose key is a shared secret."""

USUAL: Final = ("RS256", "PS256", "ES256", "EdDSA")
"""The algorithms that are taken unless settings choose others."""


@dataclass(frozen=True, slots=True)
class TokenRules:
    """Which tokens count, and what for."""

    issuer: str
    audience: str
    roles: Mapping[str, Role]
    """A value of the groups claim -> the role that it brings; a group that isn't here brings none."""
    groups_claim: str = "groups"
    require: Mapping[str, str] = field(default_factory=dict)
    """Claims that must be there with exactly this value, such as a tenant's id."""
    algorithms: tuple[str, ...] = USUAL
    longest_seconds: float = DAY
    """A token that was issued longer ago doesn't count, whatever it says itself: it can't be called back."""


@dataclass(frozen=True, slots=True)
class Person:
    """Who a verified token is for."""

    subject: str
    """The provider's own name for them, which it never gives to anybody else."""
    roles: frozenset[Role]
    expires_at: float
    """POSIX seconds."""

    def role_for(self, method: str) -> Role:
        """The first of their roles that reaches a method, or just the first: the table will refuse it."""
        mine = [role for role in Role if role in self.roles]
        return next((role for role in mine if reaches(method, role)), mine[0])


def key_id(token: str, rules: TokenRules) -> str:
    """Which of the provider's keys a token says it is signed with; nothing of it is believed yet.

    Raises:
        TokenRefused: not a token, or one whose header already rules it out.
    """
    if not 0 < len(token) <= MAX_TOKEN_CHARS:
        raise TokenRefused(f"a token of {len(token)} characters; send one of 1 to {MAX_TOKEN_CHARS}")
    try:
        header = jwt.get_unverified_header(token)
    except (PyJWTError, ValueError, TypeError, RecursionError) as error:
        raise TokenRefused("not a JSON Web Token; ask your provider for an access token") from error
    if header.get("alg") not in rules.algorithms or header["alg"] not in ASYMMETRIC:
        asked, taken = str(header.get("alg"))[:20], ", ".join(rules.algorithms)
        raise TokenRefused(f"the algorithm {asked!r} isn't taken here, but {taken}")
    if "crit" in header:
        raise TokenRefused("the token asks for extensions that aren't known here")
    kid = header.get("kid")
    if not isinstance(kid, str) or not kid:
        raise TokenRefused("the token doesn't name the key that signed it (`kid`)")
    return kid


def verify(token: str, key: Mapping[str, Any], rules: TokenRules, now: float) -> Person:
    """Who a token is for.

    Args:
        token: in compact form (RFC 7515).
        key: the provider's key that `key_id` asked for, as a JWK (RFC 7517).
        rules: what counts here.
        now: POSIX seconds.

    Raises:
        TokenRefused: forged, out of time, from another issuer, tenant, or for another audience.
        NotAllowed: genuine, and none of its groups has a role here.
    """
    key_id(token, rules)
    claims = _signed_claims(token, key)
    if claims.get("iss") != rules.issuer:
        named = str(claims.get("iss"))[:200]
        raise TokenRefused(f"the token's issuer is {named!r}; the one that this coordinator trusts is {rules.issuer!r}")
    if rules.audience not in _texts(claims.get("aud")):
        raise TokenRefused(f"the token isn't meant for this coordinator: its audience isn't {rules.audience!r}")
    for claim, value in rules.require.items():
        if claims.get(claim) != value:
            raise TokenRefused(f"the token's {claim!r} isn't the one that this coordinator takes")
    expires_at = _require_in_time(claims, rules, now)
    subject = claims.get("sub")
    if not isinstance(subject, str) or not 0 < len(subject) <= MAX_SUBJECT_CHARS or not _plain(subject):
        raise TokenRefused("the token doesn't name its subject (`sub`) in plain text")
    groups = _texts(_claim(claims, rules.groups_claim))
    roles = frozenset(rules.roles[group] for group in groups if group in rules.roles)
    if not roles:
        raise NotAllowed(f"none of the groups of {subject!r} has a role here; ask an admin to map one")
    return Person(subject, roles, expires_at)


def _signed_claims(token: str, key: Mapping[str, Any]) -> Mapping[str, Any]:
    algorithm = jwt.get_unverified_header(token)["alg"]
    _require_fit(key, algorithm)
    try:
        public = PyJWK(dict(key), algorithm=algorithm)
        if key["kty"] == "RSA" and public.key.key_size < LEAST_RSA_BITS:
            raise TokenRefused(f"the provider's RSA key is shorter than {LEAST_RSA_BITS} bits")
        # Times are checked against the clock that is handed in, everything else where its message can be its own.
        found = jwt.decode(token, public, algorithms=[algorithm], options=_NOTHING_BUT_THE_SIGNATURE)
    except (PyJWTError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise TokenRefused("the token's signature isn't this provider's; log in again") from error
    return found


_NOTHING_BUT_THE_SIGNATURE: Final[Any] = {
    "verify_signature": True,
    **dict.fromkeys(
        ("verify_exp", "verify_nbf", "verify_iat", "verify_aud", "verify_iss", "verify_sub", "verify_jti"), False
    ),
}


def _require_fit(key: Mapping[str, Any], algorithm: str) -> None:
    """A key is used for what it says that it is for, and never for another family of algorithms."""
    uses, operations = key.get("use", "sig"), key.get("key_ops", ["verify"])
    if key.get("kty") != ASYMMETRIC[algorithm] or key.get("alg", algorithm) != algorithm:
        raise TokenRefused(f"the provider's key isn't one for {algorithm}")
    if uses != "sig" or not isinstance(operations, list) or "verify" not in operations:
        raise TokenRefused("the provider's key isn't one for signatures")


def _require_in_time(claims: Mapping[str, Any], rules: TokenRules, now: float) -> float:
    times = {name: claims[name] for name in ("exp", "iat", "nbf") if name in claims}
    if not {"exp", "iat"} <= times.keys() or any(not _is_time(value) for value in times.values()):
        raise TokenRefused("the token doesn't say from when to when it counts (`iat`, `exp`)")
    if now >= times["exp"] + SKEW_SECONDS:
        raise TokenRefused("the token has expired; log in again")
    if now < max(times["iat"], times.get("nbf", 0.0)) - SKEW_SECONDS:
        raise TokenRefused("the token doesn't count yet; look at both clocks")
    if now - times["iat"] > rules.longest_seconds:
        raise TokenRefused(f"the token is older than {rules.longest_seconds:g} seconds; log in again")
    return min(float(times["exp"]), float(times["iat"]) + rules.longest_seconds)


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e12


def _claim(claims: Mapping[str, Any], path: str) -> object:
    """A claim by its name, or by a path of names with dots between them (`realm_access.roles`)."""
    if path in claims:
        return claims[path]
    found: object = claims
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _texts(value: object) -> tuple[str, ...]:
    """The texts of a claim that may be one text or a list of them; anything else is none."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and len(value) <= MAX_GROUPS:
        return tuple(entry for entry in value if isinstance(entry, str))
    return ()


def _plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text


def known_algorithms(names: Iterable[str]) -> tuple[str, ...]:
    """These algorithms, once each is shown to be asymmetric; raises `ValueError`."""
    found = tuple(names)
    wrong = [name for name in found if name not in ASYMMETRIC]
    if wrong or not found:
        raise ValueError(f"{wrong or 'no algorithms'}: choose among {', '.join(ASYMMETRIC)}")
    return found
