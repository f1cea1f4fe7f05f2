"""Offline roles are believed for months, not for ever: who signs them anew, and when.

Where enough of a role's keys lie here (development), the coordinator does it once half of the time is over. Elsewhere a
draft travels: `umbel keys renew ROLE --draft FILE`, `umbel keys sign` on the signers' machines, `umbel keys publish`.
"""

from __future__ import annotations

from umbel_server.keyring import Keyring, rule_of
from umbel_server.repository import Repository


def due(repository: Repository, now: float) -> list[str]:
    """The offline roles whose time is half over; root first."""
    return [
        it.role
        for it in repository.freshness()
        if (rule := rule_of(it.role)).offline and it.expires_at - now < rule.lifetime_seconds / 2
    ]


def renew(repository: Repository, keys: Keyring, now: float) -> list[str]:
    """Sign anew what is due and can be signed here; which roles that were."""
    done = []
    for role in due(repository, now):
        trusted = {it.key_id for it in repository.key_status() if it.role == role and it.held_here}
        if len(trusted) >= rule_of(role).threshold:
            repository.publish(role, repository.sign(repository.draft_renewal(role, now), role), now)
            done.append(role)
    return done
