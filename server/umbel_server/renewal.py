"""Offline roles are believed for months, not for ever: who signs them anew, and when.

Where enough of a role's keys lie here (development), the coordinator does it once half of the time is over. Elsewhere a
draft travels: `umbel keys renew ROLE --draft FILE`, `umbel keys sign` on the signers' machines, `umbel keys publish`.
"""

from __future__ import annotations

from securesystemslib.signer import Key

from umbel_server.drafts import sign_draft
from umbel_server.keyring import RULES, Keyring, rule_of
from umbel_server.repository import Repository


def due(repository: Repository, now: float) -> list[str]:
    """The offline roles whose time is half over, or which devices don't believe; root first."""
    return [
        it.role
        for it in repository.freshness()
        if (rule := rule_of(it.role)).offline
        and (it.expires_at - now < rule.lifetime_seconds / 2 or not repository.is_believed(it.role))
    ]


def renew(repository: Repository, now: float) -> list[str]:
    """Sign anew what is due and can be signed here; which roles that were."""
    done = []
    for role in due(repository, now):
        trusted = {it.key_id for it in repository.key_status() if it.role == role and it.held_here}
        if len(trusted) >= rule_of(role).threshold:
            repository.publish(role, repository.sign(repository.draft_renewal(role, now), role), now)
            done.append(role)
    return done


def rotate(repository: Repository, keys: Keyring, role: str, key_id: str, now: float) -> Key:
    """Replace a key of a role by a new one, both here; returns the new one.

    What the old key has signed ends with it. So it is signed anew first, by the keys that stay: devices find enough
    signatures at every moment. Where too few stay, the new key joins them right after.

    Raises:
        NotFound: the role has no such key.
        SignatureInvalid: too few of the keys that may replace it lie here.
    """
    signs_anew = rule_of(role).offline and role != "root" and any(it.role == role for it in repository.freshness())
    signed = signs_anew and _sign_anew(repository, keys, role, key_id, now)
    holder = "root" if role in RULES else "targets"
    made = keys.add(role, 1)[0].public_key
    repository.publish(holder, repository.sign(repository.draft_rotation(role, key_id, made, now), holder), now)
    keys.forget(key_id)
    if signs_anew and not signed:
        _sign_anew(repository, keys, role, key_id, now)
    return made


def _sign_anew(repository: Repository, keys: Keyring, role: str, without: str, now: float) -> bool:
    """Publish what a role says once more, signed without one of its keys; False if too few others lie here."""
    named = {it.key_id for it in repository.key_status() if it.role == role and it.held_here} - {without}
    signers = [signer for signer in keys.signers(role) if signer.public_key.keyid in named]
    threshold = rule_of(role).threshold
    if len(signers) < threshold:
        return False
    repository.publish(role, sign_draft(repository.draft_renewal(role, now), signers[:threshold]), now)
    return True
