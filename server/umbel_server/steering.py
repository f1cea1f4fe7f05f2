"""Steers rollouts: one look at everything that is under way, one step where one is due; and the people's verbs.

`reconcile` is level-triggered: it compares what is with what should be, so that a coordinator that was killed at any
point goes on where the store says. A lease lets one controller steer at a time; a revision in each write makes a
second one harmless. Each step is one transaction together with its audit row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import sqlalchemy as sa
import structlog

from umbel.clock import Clock
from umbel.errors import UmbelError, WrongState
from umbel_server import audit, executions, exposures, heads, health, rollout, rollout_records
from umbel_server.events import ServerEvent
from umbel_server.executions import HOLDS_IT, Execution
from umbel_server.experiments import judge_experiment
from umbel_server.fleet import Fleet, revoked
from umbel_server.gates import Judgement, Look, judge
from umbel_server.offers import Offers, standing_of
from umbel_server.operators import was_revoked
from umbel_server.releases import ReleaseDesk
from umbel_server.requests import Call, enter
from umbel_server.rollout import Rollout, Stage
from umbel_server.rollout_records import RolloutRecord
from umbel_server.store import Store
from umbel_server.waves import release_for, takes

LEASE_SECONDS: Final = 15.0
_log = structlog.get_logger(__name__)


class Steering:
    """Rollouts of one coordinator.

    Args:
        store: the truth.
        desk: lists releases.
        offers: makes offers; told here what they rest on.
        fleet: who there is.
        clock: what the date is.
        chance: random bytes.
        tell: hears what happens, for watchers.
    """

    def __init__(
        self,
        store: Store,
        desk: ReleaseDesk,
        offers: Offers,
        fleet: Fleet,
        clock: Clock,
        chance: Callable[[int], bytes],
        tell: Callable[[ServerEvent], None],
    ) -> None:
        self.desk = desk
        self.offers = offers
        self._store = store
        self._fleet = fleet
        self._clock = clock
        self._chance = chance
        self._tell = tell
        self._holder = chance(16).hex()
        self._leads_until = 0.0
        self.look()

    # By itself.

    def look(self) -> None:
        """Read anew what offers rest on."""
        with self._store.reading() as connection:
            found = rollout_records.let_go(connection)
            self.offers.standing = standing_of(found, heads.read(connection), rollout_records.held(connection))

    def reconcile(self, checkpoint: str = "") -> None:
        """Do all that is due, if this is the controller that may."""
        now = self._clock.now()
        if self._leads(now):
            self._settle(now, checkpoint)
            for found in self._due():
                try:
                    self._step(self._set_right(found, now), now)
                except WrongState as error:
                    _log.info("rollout waits", rollout=found.id, reason=str(error))
                    self._note(found, f"waits: {error}")
        self.look()

    def _settle(self, now: float, checkpoint: str) -> None:
        """Sign what is due; what can't be signed now stops no rollout from being judged, nor from going back."""
        try:
            self.desk.settle(now, checkpoint)
        except (UmbelError, OSError) as error:
            _log.error("the release listing stays as it is", reason=str(error))

    def _leads(self, now: float) -> bool:
        """Whether this is the controller; the lease is renewed when half of it is over."""
        if not LEASE_SECONDS / 2 <= self._leads_until - now <= LEASE_SECONDS:
            with self._store.transaction() as connection:
                mine = rollout_records.take_lease(connection, "rollouts", self._holder, now, LEASE_SECONDS)
            self._leads_until = now + LEASE_SECONDS if mine else 0.0
        return now < self._leads_until

    def _due(self) -> list[Rollout]:
        with self._store.reading() as connection:
            return rollout_records.steering(connection)

    def _set_right(self, found: Rollout, now: float) -> Rollout:
        after = rollout.set_right(found, now)
        if after is not found:
            with self._store.transaction() as connection:
                rollout_records.update(connection, found, after)
                self._audit(connection, found, after, audit.COORDINATOR, now, {"action": "clock set back"})
        return after

    def _step(self, found: Rollout, now: float) -> None:
        match found.stage:
            case Stage.SCHEDULED if 0 < found.spec.start_at <= now:
                self.start(found.id, audit.COORDINATOR, found.revision)
            case Stage.RUNNING:
                self._judge(found, now)
            case Stage.ROLLING_BACK:
                self._go_back(found, now)
            case _:
                pass

    def _judge(self, found: Rollout, now: float) -> None:
        judgement = self.judgement(found, now)
        after = rollout.judged(found, judgement, now)
        if after is found:
            self._note(found, judgement.explain())
            return
        with self._store.transaction() as connection:
            rollout_records.update(connection, found, after, judgement.explain())
            self._end(connection, after)
            body = {"decision": judgement.decision.value, "wave": found.wave, "words": judgement.explain()}
            self._audit(connection, found, after, audit.COORDINATOR, now, body)
        self.changed(after, now)

    def _note(self, found: Rollout, words: str) -> None:
        with self._store.reading() as connection:
            known = rollout_records.get(connection, found.id)
        if known.judgement != words and known.rollout == found:
            with self._store.transaction() as connection:
                rollout_records.update(connection, found, found, words)

    def _go_back(self, found: Rollout, now: float) -> None:
        """Wait until nobody has the release any more, or until those who still do are given up on."""
        began = found.going_back_since or found.wave_opened_at  # of a rollout that an older coordinator took back
        deadline = began + max(wave.deadline_seconds for wave in found.spec.waves)
        with self._store.transaction() as connection:
            left = self._left(connection, found)
            if left and found.spec.revert_release and now < deadline:
                return
            after = replace(rollout.reverted(found), reason=f"{found.reason}\ndevices left on it: {len(left)}".strip())
            rollout_records.update(connection, found, after)
            self._audit(connection, found, after, audit.COORDINATOR, now, {"left": len(left)})
        self.changed(after, now)

    def _left(self, connection: sa.Connection, found: Rollout) -> list[Execution]:
        """Moves to the release whose devices haven't gone back yet."""
        numbers, gone = found.releases, revoked(connection)
        taken = [e for e in executions.of_numbers(connection, found.spec.model, numbers) if e.outcome in HOLDS_IT]
        head = self.desk.head(connection, found.spec.audience)
        newer = [number for number in {found.spec.revert_release, head} if number > max(numbers)]
        back = executions.of_numbers(connection, found.spec.model, newer)
        returned = {execution.device for execution in back if execution.outcome in HOLDS_IT}
        return [execution for execution in taken if execution.device not in returned | gone]

    def judgement(self, found: Rollout, now: float) -> Judgement:
        """What the gate of the open wave says now; raises `WrongState` if none is open."""
        wave = found.share
        if wave is None:
            raise WrongState(f"no wave of rollout {found.id} has been opened yet")
        with self._store.reading() as connection:
            gone = revoked(connection)
            moves = [it for it in executions.of_rollout(connection, found.id, found.releases) if it.device not in gone]
            told = health.seen_since(connection, found.spec.population, found.started_at)
        seen = {device: it for device, it in told.items() if device not in gone}
        age, members, spec = now - found.wave_opened_at, self._members(found, now), found.spec
        # Nobody isn't everybody: a release that no device has tried doesn't end as the channel's head.
        least = 1 if found.wave == len(spec.waves) - 1 else 0
        look = Look(age >= wave.soak_seconds, age >= wave.deadline_seconds, max(len(members), least))
        beside = exposures.control(found, moves, seen)
        if not spec.arms:
            return judge([*exposures.canaries(moves, seen), *beside], spec.gate, look)
        sizes = Counter(release_for(found, device) for device in members)
        of_arm = {
            arm.release: exposures.canaries([it for it in moves if it.number == arm.release], seen) for arm in spec.arms
        }
        looks = lambda release: replace(look, members=sizes[release])  # noqa: E731
        return judge_experiment(spec.arms, of_arm, beside, spec.gate, looks)

    def _members(self, found: Rollout, now: float) -> list[str]:
        known = self._fleet.members(found.spec.population, now)
        return [device for device in known if takes(found, device)]

    # Small parts.

    def change(
        self,
        rollout_id: str,
        action: str,
        actor: str,
        revision: int,
        request_id: str,
        step: Callable[[Rollout, float], Rollout],
    ) -> RolloutRecord:
        """One step of one rollout, asked for under a request id by somebody who has seen this revision (-1: any)."""
        now = self._clock.now()
        with self._store.transaction() as connection:
            record = rollout_records.get(connection, rollout_id)
            if enter(connection, Call(request_id), actor, action, rollout_id, now) is not None:
                return record
            before = record.rollout
            rollout.require_revision(before, revision)
            after = step(before, now)
            rollout_records.update(connection, before, after)
            if after.started_at != before.started_at:
                health.begin_window(connection, after.spec.population)
            self._end(connection, after)
            self._audit(connection, before, after, actor, now, {"action": action}, request_id)
        self.changed(after, now)
        return RolloutRecord(after, record.judgement)

    def start(self, rollout_id: str, actor: str, revision: int, request_id: str = "") -> RolloutRecord:
        """Open the first wave; a paused rollout of the same devices makes room."""
        with self._store.reading() as connection:
            found = rollout_records.get(connection, rollout_id).rollout
        if found.stage is Stage.SCHEDULED:
            # Looked at beforehand: what is refused must not have ended another one for good.
            rollout.require_revision(found, revision)
            rollout.start(found, self._clock.now())
            self._require_room(found)
        return self.change(rollout_id, "start", actor, revision, request_id, rollout.start)

    def _end(self, connection: sa.Connection, after: Rollout) -> None:
        """What a rollout's end means for who got it, if this is its end."""
        spec = after.spec
        if after.stage is Stage.SUCCEEDED and spec.takes_everybody:
            self.desk.open(connection, spec.audience, spec.release)
        if after.stage is Stage.ROLLING_BACK:
            self._begin_going_back(connection, after)

    def _begin_going_back(self, connection: sa.Connection, after: Rollout) -> None:
        spec = after.spec
        for number in after.releases:
            executions.withdraw(connection, after.id, number)
            if spec.revert_release:
                self.desk.take_back(connection, spec.audience, number, spec.revert_release)

    def _require_room(self, found: Rollout) -> None:
        """Refuse to start on the word of somebody who was revoked since, for another state of the channel than was
        prepared for, or beside another rollout of the same devices; a paused one is superseded.
        """
        spec = found.spec
        with self._store.reading() as connection:
            if was_revoked(connection, found.approved_by):
                raise WrongState(
                    f"{found.approved_by} let rollout {found.id} go, and was revoked since; edit and submit it again, "
                    "so that somebody else may"
                )
            self.desk.require_ahead(connection, spec.audience, min(found.releases), spec.revert_release)
        for other in self._due():
            if other.id == found.id or other.spec.audience != spec.audience:
                continue
            if other.stage is Stage.PAUSED:
                supersede = lambda it, now: rollout.supersede(it, found.id)  # noqa: E731
                self.change(other.id, "supersede", audit.COORDINATOR, other.revision, "", supersede)
            elif other.stage in rollout.GOING_FORWARD:
                raise WrongState(f"rollout {other.id} moves these devices already; end it first")

    def _audit(
        self,
        connection: sa.Connection,
        before: Rollout,
        after: Rollout,
        actor: str,
        now: float,
        body: dict[str, Any],
        request_id: str = "",
    ) -> None:
        told = body | {"from": before.stage.value, "to": after.stage.value, "wave": after.wave}
        told |= {"revision": after.revision, "subject": after.spec.subject}
        audit.append(connection, now, actor, f"rollout.{after.stage.value}", after.id, told, request_id)

    def changed(self, after: Rollout, now: float) -> None:
        """Follow a change that is committed, and tell of it."""
        self.look()
        detail = {"stage": after.stage.value, "wave": after.wave, "reason": after.reason}
        self._tell(ServerEvent(now, f"rollout.{after.stage.value}", after.id, detail))
