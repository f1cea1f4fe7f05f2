"""The keys of an OpenID Connect provider: discovered, fetched with bounds, kept, and fetched anew when they rotate.

Found by the provider's discovery document (OpenID Connect Discovery 1.0, section 4) and its JWK set (RFC 7517). A
provider that is slow, gone or endless costs a call an `Unavailable` and never more than `SECONDS`; keys that are known
go on being used meanwhile, for a while. A token that names an unknown key leads to one new look, and to none soon after
another, so that nobody can have the provider asked at will.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from umbel.clock import Clock, is_recent
from umbel.errors import MalformedMessage, OutOfBounds, TokenRefused, Unavailable
from umbel.http_exchange import Exchange

DISCOVERY: Final = "/.well-known/openid-configuration"
MAX_BYTES: Final = 256 << 10
MAX_KEYS: Final = 64
SECONDS: Final = 5.0
"""One deadline round each document."""
FRESH_SECONDS: Final = 600.0
"""Keys are looked at again after this time: one that the provider withdrew is forgotten by then."""
KEPT_SECONDS: Final = 6 * 3600.0
"""While the provider can't be reached, the keys that are known count so long."""
PAUSE_SECONDS: Final = 15.0
"""Between two looks, whatever is asked for."""
_PIECE: Final = 16 << 10

Get = Callable[[str], Awaitable[bytes]]
"""The document at an address; raises `Unavailable`."""


@dataclass(slots=True)
class _Known:
    keys: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    at: float = float("-inf")
    tried_at: float = float("-inf")
    problem: str = ""


class Provider:
    """One provider's keys.

    Args:
        issuer: its address, https, as it stands in its tokens.
        get: fetches a document.
        clock: says how old keys are.
    """

    def __init__(self, issuer: str, get: Get, clock: Clock) -> None:
        self._issuer = issuer
        self._get = get
        self._clock = clock
        self._known = _Known()
        self._looking = asyncio.Lock()

    async def key(self, kid: str) -> Mapping[str, Any]:
        """The key of this id, as a JWK.

        Raises:
            TokenRefused: the provider has no such key.
            Unavailable: the provider's keys can't be had, and those that are known are too old or others.
        """
        if self._wants_a_look(kid):
            async with self._looking:
                if self._wants_a_look(kid):
                    await self._look()
        known = self._known
        if not is_recent(known.at, self._clock.now(), KEPT_SECONDS):
            raise Unavailable(f"the keys of {self._issuer} can't be had: {known.problem}; try again later")
        if kid not in known.keys and known.problem:
            raise Unavailable(
                f"the token's key isn't known, and {self._issuer} can't be asked: {known.problem}; try again later"
            )
        if kid not in known.keys:
            raise TokenRefused("the token is signed with a key that its provider doesn't have (any more)")
        return known.keys[kid]

    def _wants_a_look(self, kid: str) -> bool:
        known, now = self._known, self._clock.now()
        stale = kid not in known.keys or not is_recent(known.at, now, FRESH_SECONDS)
        return stale and not is_recent(known.tried_at, now, PAUSE_SECONDS)

    async def _look(self) -> None:
        known, begun = self._known, self._clock.now()
        try:
            discovered = _json(await self._get(self._issuer.rstrip("/") + DISCOVERY))
            if discovered.get("issuer") != self._issuer:
                raise Unavailable(
                    f"its discovery document is another issuer's, {str(discovered.get('issuer'))[:200]!r}"
                )
            known.keys = _keys(_json(await self._get(_https(discovered.get("jwks_uri")))))
            known.at, known.problem = begun, ""
        except (Unavailable, MalformedMessage, OutOfBounds) as error:
            known.problem = str(error)
        finally:
            # Not before: who comes meanwhile wants a look too, and waits for this one.
            known.tried_at = begun


def _json(document: bytes) -> Mapping[str, Any]:
    try:
        tree = json.loads(document)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage("it answers with something else than JSON") from error
    if not isinstance(tree, dict):
        raise MalformedMessage("it answers with another document than it should")
    return tree


def _keys(tree: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    entries = tree.get("keys")
    if not isinstance(entries, list) or len(entries) > MAX_KEYS:
        raise OutOfBounds(f"its key set isn't a list of at most {MAX_KEYS} keys")
    named = [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("kid"), str)]
    found: dict[str, Mapping[str, Any]] = {entry["kid"]: entry for entry in named}
    if len(found) != len(named):
        raise MalformedMessage("two of its keys go by one id")
    return found


def _https(address: object) -> str:
    if not isinstance(address, str) or not address.startswith("https://"):
        raise MalformedMessage("its discovery document names no https address for its keys")
    return address


class HttpsGet:
    """GET over HTTPS: no redirects, no proxies, bounded in bytes and in time.

    Args:
        context: what the provider's certificate is held against.
        seconds: one deadline round everything, from the look-up of the name to the last byte.
    """

    def __init__(self, context: ssl.SSLContext, seconds: float = SECONDS) -> None:
        self._context = context
        self._seconds = seconds

    async def __call__(self, address: str) -> bytes:
        """The document at an address; raises `Unavailable`."""
        try:
            parts = urllib.parse.urlsplit(address)
            connection = http.client.HTTPSConnection(
                parts.hostname or "", parts.port, timeout=self._seconds, context=self._context
            )
        except (ValueError, http.client.InvalidURL) as error:
            raise Unavailable(f"{address[:200]!r} isn't an address") from error
        exchange = Exchange(connection)
        try:
            return await asyncio.wait_for(asyncio.to_thread(_document, exchange, parts), self._seconds)
        except TimeoutError as error:
            raise Unavailable(f"{parts.hostname} took longer than {self._seconds:g} seconds") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Unavailable(f"{parts.hostname} doesn't answer as it should: {error}") from error
        finally:
            exchange.end()


def _document(exchange: Exchange, address: urllib.parse.SplitResult) -> bytes:
    target = urllib.parse.urlunsplit(("", "", address.path or "/", address.query, ""))
    answer = exchange.ask(target, {"Accept": "application/json", "Connection": "close"})
    if answer.status != http.HTTPStatus.OK:
        raise Unavailable(f"{address.hostname} answered {answer.status}")
    document = bytearray()
    while piece := exchange.read(_PIECE):
        document += piece
        if len(document) > MAX_BYTES:
            raise Unavailable(f"{address.hostname} sends more than {MAX_BYTES} bytes; the rest was left")
    return bytes(document)
