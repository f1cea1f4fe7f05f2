"""The release desk: versions become releases, releases get listed and signed, and a channel has its head.

The store says which releases there are to be; the listing (TUF) says which are authentic. `settle` brings the second
to the first, as far as the signers' keys lie here, and may be called at any time: after a crash it goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import sqlalchemy as sa

from umbel.clock import Clock, is_recent
from umbel.errors import NotFound, WrongState
from umbel.listing import ListedRelease
from umbel_server import audit, heads, rollout_records
from umbel_server.key_audit import KeyAudit
from umbel_server.keyring import Keyring, rule_of
from umbel_server.registry import Registry
from umbel_server.renewal import renew
from umbel_server.repository import Repository, role_of
from umbel_server.requests import ANY, Call, answered, enter, require_revision
from umbel_server.rollout import GOING_BACK
from umbel_server.rollout_spec import EVERYBODY, Audience
from umbel_server.store import Store
from umbel_server.tables import LISTED, RELEASES, VERSIONS
from umbel_server.versions import Version, require_open, require_releasable

KEPT_LISTED: Final = 64
"""Releases of a channel that stay listed behind its head; devices read the whole list, of 2 MB at most."""
RENEWAL_SECONDS: Final = 3_600.0
"""How often to look whether an offline role's date comes near."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A release that was prepared, and the one to go back with: a higher number with the content of before."""

    number: int
    revert: int
    """0 where there is nothing to go back to."""
    head: int
    """What the devices have now; 0 for nothing."""


class ReleaseDesk:
    """Releases for devices to adopt."""

    def __init__(self, store: Store, registry: Registry, repository: Repository, keys: Keyring, clock: Clock) -> None:
        self.repository = repository
        self._store = store
        self._registry = registry
        self._keys = keys
        self._clock = clock
        self._listed: dict[str, dict[int, ListedRelease]] = {}
        self._renewed_at = 0.0
        self._key_audit = KeyAudit(store, repository)

    # Reading.

    def listed(self, model: str) -> dict[int, ListedRelease]:
        """What devices can verify of a model, by number."""
        if model not in self._listed:
            self._listed[model] = {release.number: release for release in self.repository.releases(model)}
        return self._listed[model]

    def head(self, connection: sa.Connection, audience: Audience) -> int:
        """The release that an audience's devices get whom no rollout takes; 0 for none."""
        return heads.read(connection).of(audience)

    def head_version(self, connection: sa.Connection, audience: Audience) -> Version:
        """The version of that release; raises `NotFound` where nothing was released yet."""
        head = self.head(connection, audience)
        if not head:
            raise NotFound(f"nobody has a release of {audience.model!r} on {audience} yet")
        return self._registry.version(connection, audience.model, self._version_of(connection, audience.model, head))

    def require_ahead(self, connection: sa.Connection, audience: Audience, release: int, revert: int) -> None:
        """Refuse a move that was prepared for another state of its audience than it is in now.

        Raises:
            WrongState: the audience has moved past `release`, or `revert` doesn't bring back what devices have now.
            NotFound: there is no release `revert`.
        """
        head = self.head(connection, audience)
        ended = [it for it in rollout_records.let_go(connection) if it.stage in GOING_BACK]
        # Some of its devices went back with these, whatever the others stand at.
        passed = max([head, *(it.spec.revert_release for it in ended if it.spec.audience == audience)])
        where = f"{audience.model} VERSION --channel {audience.channel} --population {audience.population}"
        again = f"`umbel releases prepare {where}` makes both anew"
        at = f"{audience} is at release {passed} already"
        if release <= passed:
            raise WrongState(f"{at}, and devices only move to higher ones, not to {release}; {again}")
        if revert and head and not self._same_content(connection, audience.model, head, revert):
            raise WrongState(f"{at}, and release {revert} brings back something else than that; {again}")

    def waiting(self, connection: sa.Connection, model: str = "") -> list[ListedRelease]:
        """Releases that nobody has signed yet, lowest number first: those above what is listed."""
        models = [model] if model else connection.scalars(sa.select(LISTED.c.model).distinct()).all()
        above = [(LISTED.c.model == it) & (LISTED.c.number > max(self.listed(it), default=0)) for it in models]
        query = (
            sa.select(LISTED, RELEASES.c.version, RELEASES.c.channel, VERSIONS.c.bundle, VERSIONS.c.manifest_size)
            .join(RELEASES, (RELEASES.c.model == LISTED.c.model) & (RELEASES.c.number == LISTED.c.number))
            .join(VERSIONS, (VERSIONS.c.model == LISTED.c.model) & (VERSIONS.c.number == RELEASES.c.version))
            .where(sa.or_(sa.false(), *above))
            .order_by(LISTED.c.model, LISTED.c.number)
        )
        return [ListedRelease(**row) for row in connection.execute(query).mappings()]

    # Changing.

    def prepare(
        self,
        connection: sa.Connection,
        number: int,
        audience: Audience,
        actor: str,
        now: float,
        *,
        way_back: bool = True,
        call: Call = ANY,
    ) -> Prepared:
        """Make a version a release, and beside it the one that brings back what an audience has. Nobody gets it yet.

        Raises:
            NotFound: no such version.
            WrongState: a candidate, or a refused version.
            NotAllowed: a channel that the coordinator keeps for its rounds.
        """
        model, channel, _ = audience
        require_open(channel)
        version = self._registry.version(connection, model, number)
        require_releasable(version)
        head = self.head(connection, audience)
        forward = self._add(connection, version, channel, now, content_of=0, from_number=0)
        revert = 0
        if head and way_back:
            before = self._registry.version(connection, model, self._version_of(connection, model, head))
            revert = self._add(connection, before, channel, now, content_of=head, from_number=forward)
        body = {"version": number, "channel": channel, "number": forward, "revert": revert}
        body |= {"population": audience.population} if audience.population != EVERYBODY else {}
        audit.append(connection, now, actor, "release.prepare", model, body, call.request_id)
        return Prepared(forward, revert, head)

    def open(self, connection: sa.Connection, audience: Audience, number: int) -> None:
        """Make a release an audience's head: from now on all its devices get it.

        Raises:
            WrongState: the head is newer.
        """
        before = self.head(connection, audience)
        if number < before:
            raise WrongState(f"{audience} is at release {before} already; numbers rise")
        heads.move(connection, audience, number)

    def take_back(self, connection: sa.Connection, audience: Audience, number: int, revert: int) -> None:
        """Give an audience `revert` in place of `number`, if that is what it gets.

        A head from before heads were kept by population is everybody's, and goes back for everybody.
        """
        written = heads.read(connection).numbers
        for whose in (audience, audience._replace(population=EVERYBODY)):
            if written.get(whose) == number:
                heads.move(connection, whose, revert)

    def who_signs(self, model: str) -> str:
        """In words: whose signatures a model's releases need, and how they get them."""
        role = role_of(model)
        here = set(self._signers_here(role))
        elsewhere = [it.key_id[:8] for it in self.repository.key_status() if it.role == role and it.key_id not in here]
        return (
            f"{role} needs {rule_of(role).threshold} of its signers, {len(here)} of their keys lie here; "
            f"elsewhere: {', '.join(elsewhere) or 'nobody yet, see `umbel keys delegate`'}. "
            f"`umbel releases draft {model} FILE`, `umbel keys sign` there, `umbel releases submit {model} FILE`"
        )

    def settle(self, now: float, checkpoint: str = "") -> None:
        """Sign what waits, where the keys lie here, and keep the online metadata fresh."""
        with self._store.reading() as connection:
            waiting = self.waiting(connection)
        for model in sorted({release.model for release in waiting}):
            self._name_signers(model, now)
            if self._can_sign(role_of(model)):
                self._sign([release for release in waiting if release.model == model], now)
        if not is_recent(self._renewed_at, now, RENEWAL_SECONDS):
            renew(self.repository, now)
            self._renewed_at = now
        self.repository.keep_fresh(now, checkpoint)
        self._key_audit.look(now)

    def draft(self, model: str, now: float) -> bytes:
        """What waits for signatures of a model's signers, to be signed on another machine.

        Raises:
            NotFound: nothing waits, or the model has no signers.
        """
        with self._store.reading() as connection:
            waiting, passed = self.waiting(connection, model), self._passed(connection, model)
        if not waiting:
            raise NotFound(f"nothing of model {model!r} waits for signatures")
        return self.repository.draft_releases(waiting, now, passed)

    def submit(self, model: str, signed: bytes, actor: str, now: float, call: Call = ANY) -> None:
        """Publish a draft that came back signed; a process that died in between finds it published already.

        Raises:
            SignatureInvalid: by too few of the model's signers.
            WrongState: somebody published in between.
        """
        with self._store.reading() as connection:
            if answered(connection, call, actor, "release.sign", model) is not None:
                return
            require_revision(connection, call, "release.sign", model)
        self.repository.publish(role_of(model), signed, now)
        self._listed.pop(model, None)
        with self._store.transaction() as connection:
            if enter(connection, replace(call, expected_revision=None), actor, "release.sign", model, now) is None:
                body = {"listed": max(self.listed(model), default=0)}
                audit.append(connection, now, actor, "release.sign", model, body, call.request_id)

    # Small parts.

    def _add(
        self,
        connection: sa.Connection,
        version: Version,
        channel: str,
        now: float,
        *,
        content_of: int,
        from_number: int,
    ) -> int:
        published = self._registry.release(connection, version, channel, now)
        row = {"model": version.model, "number": published.number, "content_of": content_of, "from_number": from_number}
        connection.execute(LISTED.insert().values(row))
        return published.number

    def _same_content(self, connection: sa.Connection, model: str, one: int, other: int) -> bool:
        return self._version_of(connection, model, one) == self._version_of(connection, model, other)

    def _version_of(self, connection: sa.Connection, model: str, number: int) -> int:
        this = (RELEASES.c.model == model) & (RELEASES.c.number == number)
        found = connection.scalar(sa.select(RELEASES.c.version).where(this))
        if found is None:
            raise NotFound(f"{model!r} has no release {number}")
        return int(found)

    def _name_signers(self, model: str, now: float) -> None:
        """For a model without signers: make their keys here, if the keys that may name them lie here too."""
        role = role_of(model)
        if model not in self.repository.models() and self._can_sign("targets"):
            signers = [signer.public_key for signer in self._keys.complete(role)]
            draft = self.repository.draft_signers(model, signers, now)
            self.repository.publish("targets", self.repository.sign(draft, "targets"), now)
        if not self.repository.has_listing(model) and self._can_sign(role):
            self.repository.publish(role, self.repository.sign(self.repository.draft_empty(model, now), role), now)

    def _can_sign(self, role: str) -> bool:
        """Whether enough of a role's keys lie here; with some of them elsewhere, drafts have to travel."""
        return len(self._signers_here(role)) >= rule_of(role).threshold

    def _signers_here(self, role: str) -> list[str]:
        """Which keys that devices trust for a role lie here; one that was replaced may still, and signs nothing."""
        return [key.key_id for key in self.repository.key_status() if key.role == role and key.held_here]

    def _sign(self, releases: list[ListedRelease], now: float) -> None:
        model = releases[0].model
        with self._store.reading() as connection:
            passed = self._passed(connection, model)
        draft = self.repository.draft_releases(releases, now, passed)
        self.repository.publish(role_of(model), self.repository.sign(draft, role_of(model)), now)
        self._listed.pop(model, None)

    def _passed(self, connection: sa.Connection, model: str) -> list[int]:
        """Listed releases that no device moves to any more: far below each head of their channel, in no rollout."""
        listed, stand = self.listed(model), heads.read(connection)
        named = [one for one in rollout_records.let_go(connection) if one.spec.model == model]
        kept = {
            number
            for one in named
            for number in (*one.releases, one.spec.revert_release)
            if number > stand.of(one.spec.audience)
        }
        for channel in {release.channel for release in listed.values()}:
            numbers = sorted(it.number for it in listed.values() if it.channel == channel)
            at = stand.of_channel(model, channel)
            kept |= {number for number in numbers if number > max(at, default=0)}
            for head in at:
                kept |= {head, *[number for number in numbers if number < head][-KEPT_LISTED:]}
        return sorted(set(listed) - kept)
