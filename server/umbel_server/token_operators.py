"""Operators who come with a token of the team's identity provider instead of a certificate.

Who they are and what they may is the provider's to say, by groups; nothing is written down here but what they do. The
audit names them by their subject (`token:…`), which no provider gives out twice, and never by a name that people can
change themselves: two persons are told apart by it.
"""

from __future__ import annotations

import hashlib

from umbel.clock import Clock
from umbel.errors import TokenRefused
from umbel.identity import DeviceId
from umbel_server.operators import Operator
from umbel_server.provider import Provider
from umbel_server.roles import require_role
from umbel_server.tokens import TokenRules, key_id, verify


class TokenOperators:
    """Lets operators in by their tokens.

    Args:
        rules: which tokens count.
        provider: has the keys that they are signed with.
        clock: says what the date is.
    """

    def __init__(self, rules: TokenRules, provider: Provider, clock: Clock) -> None:
        self._rules = rules
        self._provider = provider
        self._clock = clock

    async def authorize(self, method: str, token: str) -> Operator:
        """Who calls `method`, once it has been shown that they may.

        Raises:
            TokenRefused: no token, or one that doesn't count here.
            NotAllowed: none of their groups has a role that reaches.
            Unavailable: the provider's keys can't be had.
        """
        if not token:
            raise TokenRefused("call with a token of your identity provider: --token-file, or UMBEL_TOKEN")
        key = await self._provider.key(key_id(token, self._rules))
        now = self._clock.now()
        person = verify(token, key, self._rules, now)
        role = person.role_for(method)
        require_role(method, role)
        identity = hashlib.sha256(f"{self._rules.issuer}\0{person.subject}".encode()).hexdigest()[:32]
        return Operator(DeviceId(identity), person.subject, role, now, kind="token", until=person.expires_at)
