"""What operators may do with releases and rollouts: each a transaction with its audit row.

A call that changes something names its request, so that it can be made again without being done twice, and the
revision that its caller has seen. `actor` is who asked, from their certificate.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Final

import sqlalchemy as sa

from umbel.clock import Clock
from umbel.errors import NotFound, WrongState
from umbel.listing import ListedRelease
from umbel_server import audit, executions, rollout, rollout_records
from umbel_server.fleet import Fleet
from umbel_server.keyring import KeyStatus
from umbel_server.registry import require_model
from umbel_server.releases import Prepared, ReleaseDesk
from umbel_server.repository import Freshness
from umbel_server.requests import ANY, Call, enter, note
from umbel_server.rollout import Rollout, Stage
from umbel_server.rollout_records import RolloutRecord
from umbel_server.rollout_spec import EVERYBODY, Audience, RolloutSpec
from umbel_server.steering import Steering
from umbel_server.store import Store
from umbel_server.waves import wave_of

SALTS_TO_TRY: Final = 64
_STOPS: Final[dict[str, Callable[[Rollout, str, float], Rollout]]] = {
    "pause": lambda found, reason, now: rollout.pause(found, reason),
    "abort": rollout.abort,
    "roll-back": rollout.roll_back,
    "cancel": lambda found, reason, now: rollout.cancel(found),
}


@dataclass(frozen=True, slots=True)
class WaveProgress:
    """How far one wave of a rollout has come."""

    wave: int
    devices: int
    """Enrolled devices that it adds to the waves before it."""
    counts: Mapping[str, int]
    """Outcome -> how many of those that were offered the release."""


@dataclass(frozen=True, slots=True)
class ListingStatus:
    """The release listing, for a person to look at."""

    freshness: tuple[Freshness, ...]
    keys: tuple[KeyStatus, ...]
    waiting: tuple[ListedRelease, ...]
    listed: tuple[ListedRelease, ...]
    held: Mapping[str, str]


class RolloutVerbs:
    """The verbs over a store, for whoever has been let in."""

    def __init__(
        self,
        store: Store,
        steering: Steering,
        desk: ReleaseDesk,
        fleet: Fleet,
        clock: Clock,
        chance: Callable[[int], bytes],
    ) -> None:
        self._store = store
        self._steering = steering
        self._desk = desk
        self._fleet = fleet
        self._clock = clock
        self._chance = chance

    # Rollouts.

    def create(self, rollout_id: str, spec: RolloutSpec, actor: str, call: Call = ANY) -> RolloutRecord:
        """Write a draft.

        Raises:
            NotFound: the releases that it names aren't prepared.
            WrongState: they were prepared for another channel, or for another state of this one.
            AlreadyExists: there is another rollout of this id.
        """
        now = self._clock.now()
        self._require_listed(spec)
        with self._store.transaction() as connection:
            if enter(connection, call, actor, "rollout.create", rollout_id, now) is not None:
                return rollout_records.get(connection, rollout_id)
            self._require_ahead(connection, spec)
            made = rollout.draft(rollout_id, spec, actor, self._salt(rollout_id, spec, now), now)
            rollout_records.insert(connection, made)
            body = {"subject": spec.subject, "release": spec.release}
            audit.append(connection, now, actor, "rollout.create", rollout_id, body, call.request_id)
        self._steering.changed(made, now)
        return RolloutRecord(made)

    def edit(
        self, rollout_id: str, spec: RolloutSpec, actor: str, revision: int, request_id: str = ""
    ) -> RolloutRecord:
        """Change a rollout that hasn't started; what was approved is so no more."""
        self._require_listed(spec)
        with self._store.reading() as connection:
            self._require_ahead(connection, spec)
        return self._steering.change(
            rollout_id, "edit", actor, revision, request_id, lambda it, now: rollout.edit(it, spec, actor)
        )

    def submit(self, rollout_id: str, actor: str, revision: int, request_id: str = "") -> RolloutRecord:
        """Ask for approval."""
        return self._steering.change(
            rollout_id, "submit", actor, revision, request_id, lambda it, now: rollout.submit(it)
        )

    def approve(self, rollout_id: str, actor: str, subject: str, revision: int, request_id: str = "") -> RolloutRecord:
        """Let it go, as it stands in `subject`; a second person's word."""
        step = lambda it, now: rollout.approve(it, actor, subject)  # noqa: E731
        return self._steering.change(rollout_id, "approve", actor, revision, request_id, step)

    def deny(self, rollout_id: str, actor: str, reason: str, revision: int, request_id: str = "") -> RolloutRecord:
        """Refuse it."""
        return self._steering.change(
            rollout_id, "deny", actor, revision, request_id, lambda it, now: rollout.deny(it, actor, reason)
        )

    def start(self, rollout_id: str, actor: str, revision: int, request_id: str = "") -> RolloutRecord:
        """Open the first wave; a paused rollout of the same devices makes room."""
        return self._steering.start(rollout_id, actor, revision, request_id)

    def promote(self, rollout_id: str, actor: str, revision: int, request_id: str = "") -> RolloutRecord:
        """Open the next wave after a gate that a person confirms."""
        return self._steering.change(
            rollout_id, "promote", actor, revision, request_id, lambda it, now: rollout.promote(it, actor, now)
        )

    def resume(self, rollout_id: str, actor: str, revision: int, request_id: str = "") -> RolloutRecord:
        """Go on with a paused rollout."""
        return self._steering.change(
            rollout_id, "resume", actor, revision, request_id, lambda it, now: rollout.resume(it, actor, now)
        )

    def stop(
        self, rollout_id: str, how: str, actor: str, reason: str, revision: int = -1, request_id: str = ""
    ) -> RolloutRecord:
        """Pause, abort, roll back or cancel, on one person's word; a revision is optional, since stopping can't wait.

        Raises:
            NotFound: there is no such way to stop.
        """
        if how not in _STOPS:
            raise NotFound(f"can't {how[:40]!r}; ways to stop are {', '.join(sorted(_STOPS))}")
        return self._steering.change(
            rollout_id, how, actor, revision, request_id, lambda it, now: _STOPS[how](it, reason, now)
        )

    def hold(self, model: str, actor: str, reason: str, call: Call = ANY) -> None:
        """Emergency: offer nothing of a model to anybody until it is lifted; raises `NotFound`."""
        now = self._clock.now()
        with self._store.transaction() as connection:
            require_model(connection, model)
            if enter(connection, call, actor, "release.hold", model, now) is None:
                rollout_records.hold(connection, model, actor, reason, now)
                audit.append(connection, now, actor, "release.hold", model, {"reason": reason}, call.request_id)
        self._steering.look()

    def lift(self, model: str, actor: str, call: Call = ANY) -> None:
        """End a hold; raises `NotFound` if there is none."""
        now = self._clock.now()
        with self._store.transaction() as connection:
            if enter(connection, call, actor, "release.lift", model, now) is None:
                rollout_records.lift(connection, model)
                audit.append(connection, now, actor, "release.lift", model, request_id=call.request_id)
        self._steering.look()

    def prepare(
        self, model: str, version: int, channel: str, actor: str, call: Call = ANY, population: str = EVERYBODY
    ) -> Prepared:
        """Make a version a release, with the one to go back with, listed and signed if the keys lie here.

        What to go back to is what a population has; without one, the newest that any of the channel has.
        """
        now, audience = self._clock.now(), Audience(model, channel, population)
        with self._store.transaction() as connection:
            before = enter(connection, call, actor, "release.prepare", model, now)
            if before is not None:
                prepared = Prepared(*json.loads(before))
            else:
                prepared = self._desk.prepare(connection, version, audience, actor, now, call=call)
                note(connection, call, json.dumps(astuple(prepared)))
        self._desk.settle(now)
        return prepared

    def listing(self) -> ListingStatus:
        """The listing: how fresh it is, who signs it, what it holds and what waits for signatures."""
        with self._store.reading() as connection:
            waiting, held = self._desk.waiting(connection), rollout_records.held(connection)
        repository = self._desk.repository
        listed = [release for model in repository.models() for release in repository.releases(model)]
        return ListingStatus(
            tuple(repository.freshness()), tuple(repository.key_status()), tuple(waiting), tuple(listed), held
        )

    def standing(self, connection: sa.Connection, model: str, number: int) -> str:
        """Whether a release is "listed", is "waiting" for signatures, or neither."""
        if number in self._desk.listed(model):
            return "listed"
        return "waiting" if any(it.number == number for it in self._desk.waiting(connection, model)) else ""

    def draft(self, model: str) -> bytes:
        """What waits for the signatures of a model's signers; raises `NotFound`."""
        return self._desk.draft(model, self._clock.now())

    def submit_listing(self, model: str, signed: bytes, actor: str, call: Call = ANY) -> None:
        """Take a signed draft; raises `SignatureInvalid` or `WrongState`."""
        self._desk.submit(model, signed, actor, self._clock.now(), call)
        self._steering.look()

    def publish(self, model: str, version: int, channel: str, actor: str, call: Call = ANY) -> int:
        """Release a version to everybody on a channel at once, without waves; its number.

        Raises:
            WrongState: a rollout on this channel is under way.
        """
        now = self._clock.now()
        with self._store.transaction() as connection:
            before = enter(connection, call, actor, "release.publish", model, now)
            if before is not None:
                return int(before)
            if (other := _steering(connection, model, channel, rollout.GOING_FORWARD)) is not None:
                raise WrongState(f"rollout {other.id} of channel {channel!r} is {other.stage.value}; end it first")
            number = self._open(connection, model, version, channel, actor, now, call)
            note(connection, call, str(number))
        self._desk.settle(now)
        self._steering.look()
        return number

    def follow(self, connection: sa.Connection, model: str, version: int, channel: str, now: float) -> None:
        """Let a task's own channel follow its rounds: an accepted version goes out at once, as if published.

        While a rollout steers the channel, it has the say, and the version waits in the registry. What was opened
        here is signed at the next look of the controller.
        """
        if _steering(connection, model, channel, rollout.UNDER_WAY) is None:
            self._open(connection, model, version, channel, audit.COORDINATOR, now)

    def _open(
        self,
        connection: sa.Connection,
        model: str,
        version: int,
        channel: str,
        actor: str,
        now: float,
        call: Call = ANY,
    ) -> int:
        everybody = Audience(model, channel)
        prepared = self._desk.prepare(connection, version, everybody, actor, now, way_back=False, call=call)
        self._desk.open(connection, everybody, prepared.number)
        body = {"version": version, "channel": channel, "number": prepared.number}
        audit.append(connection, now, actor, "release.publish", model, body, call.request_id)
        return prepared.number

    # Reading.

    def get(self, rollout_id: str) -> RolloutRecord:
        """One rollout; raises `NotFound`."""
        with self._store.reading() as connection:
            return rollout_records.get(connection, rollout_id)

    def newest(self, limit: int = 100) -> list[RolloutRecord]:
        """Rollouts, newest first."""
        with self._store.reading() as connection:
            return rollout_records.newest(connection, limit)

    def counts(self, found: Rollout) -> dict[tuple[int, str], int]:
        """(release, outcome) -> devices, for a rollout's releases and the one to go back with."""
        with self._store.reading() as connection:
            return executions.counts(connection, found.id, [*found.releases, found.spec.revert_release])

    def preview(self, found: Rollout) -> dict[int, list[str]]:
        """Wave -> the enrolled devices that it adds; a look without touching anything."""
        known = self._fleet.members(found.spec.population, self._clock.now())
        waves: dict[int, list[str]] = {index: [] for index in range(len(found.spec.waves))}
        for device in known:
            wave = wave_of(found, device)
            if wave is not None:
                waves[wave].append(device)
        return waves

    def progress(self, found: Rollout) -> list[WaveProgress]:
        """Each wave's devices, and what they did with the release so far."""
        with self._store.reading() as connection:
            moves = executions.of_rollout(connection, found.id, found.releases)
        told = Counter((move.wave, move.outcome or "waiting") for move in moves)
        return [
            WaveProgress(wave, len(devices), {outcome: n for (at, outcome), n in told.items() if at == wave})
            for wave, devices in self.preview(found).items()
        ]

    def draft_of(self, spec: RolloutSpec) -> Rollout:
        """A rollout that isn't written anywhere, to preview."""
        now = self._clock.now()
        return rollout.draft("preview", spec, "nobody", self._salt("preview", spec, now), now)

    # Small parts.

    def _require_listed(self, spec: RolloutSpec) -> None:
        numbers = {spec.release, spec.revert_release, *(arm.release for arm in spec.arms)} - {0}
        listed = self._desk.listed(spec.model)
        missing = sorted(numbers - set(listed))
        if missing:
            waiting = all(self._prepared(spec.model, number) for number in missing)
            how = self._desk.who_signs(spec.model) if waiting else "`umbel releases prepare`"
            raise NotFound(f"releases {missing} of {spec.model!r} aren't listed and signed: {how}")
        others = sorted(number for number in numbers if listed[number].channel != spec.channel)
        if others:
            raise WrongState(
                f"releases {others} of {spec.model!r} are of channel {listed[others[0]].channel!r}, not of "
                f"{spec.channel!r}: `umbel releases prepare {spec.model} VERSION --channel {spec.channel}`"
            )

    def _require_ahead(self, connection: sa.Connection, spec: RolloutSpec) -> None:
        lowest = min((arm.release for arm in spec.arms), default=spec.release)
        self._desk.require_ahead(connection, spec.audience, lowest, spec.revert_release)

    def _prepared(self, model: str, number: int) -> bool:
        with self._store.reading() as connection:
            return self.standing(connection, model, number) == "waiting"

    def _salt(self, rollout_id: str, spec: RolloutSpec, now: float) -> str:
        """A secret salt; in a small fleet one whose first wave takes somebody, so that there is a canary at all."""
        salts = [self._chance(16).hex() for _ in range(SALTS_TO_TRY)]
        known = self._fleet.members(spec.population, now)
        for salt in salts:
            trial = rollout.draft(rollout_id, spec, "nobody", salt, now)
            if any(wave_of(trial, device) == 0 for device in known):
                return salt
        return salts[0]


def _steering(connection: sa.Connection, model: str, channel: str, stages: frozenset[Stage]) -> Rollout | None:
    """A rollout that steers a channel and is in one of these stages, if there is one."""
    for other in rollout_records.steering(connection):
        if (other.spec.model, other.spec.channel) == (model, channel) and other.stage in stages:
            return other
    return None
