"""Who gets which release now: what a device that checks in is offered, and what its answers mean.

A rollout that takes the device goes first, then the head of its channel and population. An offer is signed for one
device, ends soon, and is only ever made for what the listing holds; it is made again at each visit until the device has
answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import sqlalchemy as sa

from umbel.identity import DeviceId
from umbel.listing import ListedRelease
from umbel.offer import Offer, SignedOffer
from umbel.visit import CheckIn, Outcome, ReleaseOutcome
from umbel_server import executions
from umbel_server.executions import HOLDS_IT, WAITING, WITHDRAWN, Execution
from umbel_server.heads import Heads
from umbel_server.releases import ReleaseDesk
from umbel_server.rollout import GOING_BACK, Rollout, Stage
from umbel_server.rollout_spec import Audience
from umbel_server.signing import ReleaseSigner
from umbel_server.store import Store
from umbel_server.waves import is_held_back, release_for, takes, wave_of

OFFER_SECONDS: Final = 3_600.0


@dataclass(frozen=True, slots=True)
class Standing:
    """What offers rest on, as of the last look at the store."""

    rollouts: tuple[Rollout, ...] = ()
    """Those that may still say what a device gets, oldest first."""
    heads: Heads = field(default_factory=Heads)
    held: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    """Population -> the model of its newest rollout."""


def standing_of(rollouts: Iterable[Rollout], heads: Heads, held: Mapping[str, str]) -> Standing:
    """What offers rest on, from all rollouts that were ever let go, oldest first."""
    found = tuple(rollouts)
    kept = tuple(it for it in found if _matters(it, heads.of(it.spec.audience)))
    return Standing(kept, heads, held, {it.spec.population: it.spec.model for it in found})


def _matters(rollout: Rollout, head: int) -> bool:
    """Whether a rollout may still say what a device gets, beside its audience's head."""
    if rollout.stage in GOING_BACK:
        # Once something newer has gone out to everybody, that is what takes the release away.
        return rollout.spec.revert_release >= head
    if rollout.stage is Stage.SUCCEEDED:
        return rollout.spec.hold_back_percent > 0 or (rollout.offers and rollout.spec.release > head)
    return True


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The release that a device should move to, and by whose doing."""

    number: int
    rollout: str = ""
    wave: int = 0


class Offers:
    """Makes offers and hears answers; `standing` is kept up to date by whoever steers."""

    def __init__(self, store: Store, desk: ReleaseDesk, signer: ReleaseSigner, chance: Callable[[int], bytes]) -> None:
        self.standing = Standing()
        self._store = store
        self._desk = desk
        self._signer = signer
        self._chance = chance

    def model_of(self, population: str) -> str:
        """The model that a population without tasks gets: that of its newest rollout; "" without one."""
        return self.standing.models.get(population, "")

    def hear(self, device: DeviceId, told: Iterable[ReleaseOutcome], now: float) -> None:
        """Take a device's answers down; each counts once, under the execution that it was offered."""
        answers = [outcome for outcome in told if outcome.execution]
        if not answers:
            return
        with self._store.transaction() as connection:
            for outcome in answers:
                executions.answer(connection, device, outcome, now)

    def offer(self, device: DeviceId, check_in: CheckIn, model: str, now: float) -> SignedOffer | None:
        """What a device may move to now; None if it is where it should be, or has answered already."""
        if model in self.standing.held:
            return None
        audience = Audience(model, check_in.channel, check_in.population)
        if not self._may_move(check_in, audience):
            return None
        with self._store.reading() as connection:
            wanted = self._wanted(connection, device, check_in, audience)
            known = executions.find(connection, model, wanted.number, device) if wanted.number else None
        release = self._desk.listed(model).get(wanted.number)
        if release is None or wanted.number <= check_in.release:
            return None
        if known is not None and known.outcome == WAITING and known.rollout == wanted.rollout:
            return self._signed(known, release, now)
        if known is not None and not _may_be_asked_again(known):
            return None
        execution = Execution(
            self._chance(16).hex(), wanted.rollout, wanted.wave, model, wanted.number, device, offered_at=now
        )
        with self._store.transaction() as connection:
            executions.offer(connection, execution)
        return self._signed(execution, release, now)

    def _may_move(self, check_in: CheckIn, audience: Audience) -> bool:
        """Whether there may be anything newer than what answers there now: most check-ins end here, unasked."""
        numbers = [self.standing.heads.of(audience)]
        for rollout in self.standing.rollouts:
            if rollout.spec.audience == audience:
                numbers += [*rollout.releases, rollout.spec.revert_release]
        return max(numbers) > check_in.release

    def _wanted(self, connection: sa.Connection, device: DeviceId, check_in: CheckIn, audience: Audience) -> _Wanted:
        head = self.standing.heads.of(audience)
        for rollout in reversed(self.standing.rollouts):
            spec = rollout.spec
            if spec.audience != audience:
                continue
            if rollout.stage in GOING_BACK and spec.revert_release and self._has(connection, rollout, device, check_in):
                return _Wanted(spec.revert_release, rollout.id, rollout.wave)
            if rollout.offers and takes(rollout, device):
                return _Wanted(release_for(rollout, device), rollout.id, wave_of(rollout, device) or 0)
            if head in (spec.release, spec.revert_release) and is_held_back(rollout, device):
                head = spec.from_release
        return _Wanted(head)

    def _has(self, connection: sa.Connection, rollout: Rollout, device: DeviceId, check_in: CheckIn) -> bool:
        """Whether a device has what a rollout takes back: it says so itself, or said so when it took it."""
        for number in rollout.releases:
            if check_in.release == number:
                return True
            known = executions.find(connection, rollout.spec.model, number, device)
            if known is not None and known.outcome in HOLDS_IT and check_in.release <= number:
                return True
        return False

    def _signed(self, execution: Execution, release: ListedRelease, now: float) -> SignedOffer:
        offer = Offer(
            execution=execution.id,
            device=execution.device,
            model=execution.model,
            number=execution.number,
            bundle=release.bundle,
            issued_at=now,
            expires_at=now + OFFER_SECONDS,
        )
        return self._signer.sign_offer(offer)


def _may_be_asked_again(known: Execution) -> bool:
    """Never answered, or lost since: a device that took a release and doesn't have it any more lost its shelf."""
    lost = known.outcome in HOLDS_IT
    on_the_way = known.outcome == Outcome.FAILED.value and known.reason.startswith("digest-mismatch")
    return lost or on_the_way or known.outcome in (WAITING, WITHDRAWN)
