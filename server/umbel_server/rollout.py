"""A rollout: moving a population to a release in waves, as a pure state machine.

    DRAFT -submit-> PENDING_APPROVAL -approve-> SCHEDULED -start-> RUNNING(wave 0)
    RUNNING -gate passes-> RUNNING(next wave) | AWAITING_PROMOTION | SUCCEEDED
    RUNNING -gate fails-> ROLLING_BACK | PAUSED (by policy)       RUNNING -inconclusive-> PAUSED
    AWAITING_PROMOTION -promote-> RUNNING(next wave) | SUCCEEDED
    RUNNING | AWAITING_PROMOTION -pause-> PAUSED -resume-> RUNNING (the same wave)
    RUNNING | AWAITING_PROMOTION | PAUSED -abort-> ROLLING_BACK -reverted-> ROLLED_BACK
    SUCCEEDED -roll back-> ROLLING_BACK
    PENDING_APPROVAL -deny-> DENIED     DRAFT | PENDING_APPROVAL | SCHEDULED -cancel-> CANCELED
    PAUSED -a newer one takes over-> SUPERSEDED

A rollout whose waves take the whole population ends by opening its release to the channel; one that doesn't goes on
offering it to those whom its waves take, and to nobody else.

Stopping takes one person at once; going takes a second one, whose approval covers exactly what was written (`subject`)
and is void after an edit. Every step is (rollout, input, now) -> rollout, so restarts and simulations replay it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any, Final

from umbel import fields as checks
from umbel.clock import CLOCK_SLACK_SECONDS
from umbel.errors import NotAllowed, WrongState
from umbel_server.gates import Decision, Judgement
from umbel_server.rollout_spec import OnFailure, Promotion, RolloutSpec, Wave, spec_from_tree, spec_to_tree


class Stage(Enum):
    """Where a rollout stands."""

    DRAFT = "draft"
    PENDING_APPROVAL = "pending-approval"
    SCHEDULED = "scheduled"
    RUNNING = "running"
    AWAITING_PROMOTION = "awaiting-promotion"
    PAUSED = "paused"
    ROLLING_BACK = "rolling-back"
    SUCCEEDED = "succeeded"
    ROLLED_BACK = "rolled-back"
    DENIED = "denied"
    CANCELED = "canceled"
    SUPERSEDED = "superseded"


UNDER_WAY: Final = frozenset({Stage.RUNNING, Stage.AWAITING_PROMOTION, Stage.PAUSED, Stage.ROLLING_BACK})

GOING_FORWARD: Final = UNDER_WAY - {Stage.ROLLING_BACK}
"""Two of these on one channel would pull at the same devices; going back gives way to whatever is newer."""

GOING_BACK: Final = frozenset({Stage.ROLLING_BACK, Stage.ROLLED_BACK})

ALLOWED: Final[Mapping[str, frozenset[Stage]]] = {
    "edit": frozenset({Stage.DRAFT, Stage.PENDING_APPROVAL, Stage.SCHEDULED}),
    "submit": frozenset({Stage.DRAFT}),
    "approve": frozenset({Stage.PENDING_APPROVAL}),
    "deny": frozenset({Stage.PENDING_APPROVAL}),
    "cancel": frozenset({Stage.DRAFT, Stage.PENDING_APPROVAL, Stage.SCHEDULED}),
    "start": frozenset({Stage.SCHEDULED}),
    "judge": frozenset({Stage.RUNNING}),
    "promote": frozenset({Stage.AWAITING_PROMOTION}),
    "pause": frozenset({Stage.RUNNING, Stage.AWAITING_PROMOTION}),
    "resume": frozenset({Stage.PAUSED}),
    "abort": frozenset({Stage.RUNNING, Stage.AWAITING_PROMOTION, Stage.PAUSED}),
    "roll back": frozenset({Stage.SUCCEEDED}),
    "finish rolling back": frozenset({Stage.ROLLING_BACK}),
    "supersede": frozenset({Stage.PAUSED}),
}
"""What may be done in which stage; nothing else may."""
_UNASKED: Final = {"judge", "finish rolling back", "supersede"}
"""What nobody says by a verb."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout, at one moment."""

    id: str
    spec: RolloutSpec
    author: str
    salt: str
    """Secret until the rollout starts, so that nobody can choose to be a canary."""
    created_at: float
    stage: Stage = Stage.DRAFT
    wave: int = -1
    wave_opened_at: float = 0.0
    started_at: float = 0.0
    """When the first wave opened: devices with the release and without it are compared from then on."""
    going_back_since: float = 0.0
    """When it began to take devices back; 0 before."""
    revision: int = 0
    """Rises with every change; a caller names the one that it has seen."""
    last_editor: str = ""
    approved_by: str = ""
    approved_subject: str = ""
    stopped_by_gate: bool = False
    """Paused because a gate said so: going on then takes a second person."""
    reason: str = ""

    @property
    def share(self) -> Wave | None:
        """The wave that is open, if any."""
        return self.spec.waves[self.wave] if self.wave >= 0 else None

    @property
    def releases(self) -> tuple[int, ...]:
        """The releases that it moves devices to."""
        return tuple(arm.release for arm in self.spec.arms) or (self.spec.release,)

    @property
    def offers(self) -> bool:
        """Whether devices of its waves are offered the release now."""
        ended_apart = self.stage is Stage.SUCCEEDED and not self.spec.takes_everybody
        return ended_apart or self.stage in (Stage.RUNNING, Stage.AWAITING_PROMOTION)


# What people do.


def draft(rollout_id: str, spec: RolloutSpec, author: str, salt: str, now: float) -> Rollout:
    """A new rollout, which does nothing yet."""
    return Rollout(checks.name(rollout_id, "rollout"), spec, author, salt, now, last_editor=author)


def edit(rollout: Rollout, spec: RolloutSpec, actor: str) -> Rollout:
    """Another spec; approvals are void, and it must be submitted again."""
    _require("edit", rollout)
    return _next(
        rollout, Stage.DRAFT, spec=spec, last_editor=actor, approved_by="", approved_subject="", reason="edited"
    )


def submit(rollout: Rollout) -> Rollout:
    """Ask for approval."""
    _require("submit", rollout)
    return _next(rollout, Stage.PENDING_APPROVAL)


def approve(rollout: Rollout, actor: str, subject: str) -> Rollout:
    """Let it go.

    Raises:
        NotAllowed: by its author or last editor.
        WrongState: not waiting for approval, or `subject` isn't what stands there now.
    """
    _require("approve", rollout)
    _require_second_person(rollout, actor)
    if subject != rollout.spec.subject:
        raise WrongState(f"rollout {rollout.id} isn't what was looked at any more; look at it again, then approve")
    return _next(rollout, Stage.SCHEDULED, approved_by=actor, approved_subject=subject)


def deny(rollout: Rollout, actor: str, reason: str) -> Rollout:
    """Refuse it, for good."""
    _require("deny", rollout)
    return _next(rollout, Stage.DENIED, reason=f"denied by {actor}: {reason}")


def cancel(rollout: Rollout) -> Rollout:
    """Drop it before any device was offered anything."""
    _require("cancel", rollout)
    return _next(rollout, Stage.CANCELED)


def start(rollout: Rollout, now: float) -> Rollout:
    """Open the first wave.

    Raises:
        WrongState: not approved as it stands, or too early.
    """
    _require("start", rollout)
    if rollout.approved_subject != rollout.spec.subject:
        raise WrongState(f"rollout {rollout.id} isn't approved as it stands; submit it again")
    if now < rollout.spec.start_at:
        raise WrongState(f"rollout {rollout.id} is scheduled to start later")
    return _next(rollout, Stage.RUNNING, wave=0, wave_opened_at=now, started_at=now)


def promote(rollout: Rollout, actor: str, now: float) -> Rollout:
    """Open the next wave after a gate that a person has to confirm; takes a second person."""
    _require("promote", rollout)
    _require_second_person(rollout, actor)
    return _advance(rollout, now)


def pause(rollout: Rollout, reason: str) -> Rollout:
    """Offer nothing new; devices that have the release keep it."""
    _require("pause", rollout)
    return _next(rollout, Stage.PAUSED, reason=reason, stopped_by_gate=False)


def resume(rollout: Rollout, actor: str, now: float) -> Rollout:
    """Go on with the same wave, its times anew; a second person is needed where a gate had stopped it."""
    _require("resume", rollout)
    if rollout.stopped_by_gate:
        _require_second_person(rollout, actor)
    return _next(rollout, Stage.RUNNING, wave_opened_at=now, stopped_by_gate=False, reason="")


def abort(rollout: Rollout, reason: str, now: float) -> Rollout:
    """Stop, and take devices back to what they had."""
    _require("abort", rollout)
    return _next(rollout, Stage.ROLLING_BACK, reason=reason, going_back_since=now)


def roll_back(rollout: Rollout, reason: str, now: float) -> Rollout:
    """Take devices back after all, though every gate had passed."""
    _require("roll back", rollout)
    return _next(rollout, Stage.ROLLING_BACK, reason=reason, going_back_since=now)


# What happens by itself.


def judged(rollout: Rollout, judgement: Judgement, now: float) -> Rollout:
    """Follow a gate's decision."""
    _require("judge", rollout)
    match judgement.decision:
        case Decision.PASS:
            if rollout.spec.arms or (rollout.share and rollout.share.promotion is Promotion.MANUAL):
                return _next(rollout, Stage.AWAITING_PROMOTION)
            return _advance(rollout, now)
        case Decision.FAIL:
            reason = judgement.explain()
            if rollout.spec.on_failure is OnFailure.ROLL_BACK:
                return _next(rollout, Stage.ROLLING_BACK, reason=reason, stopped_by_gate=True, going_back_since=now)
            return _next(rollout, Stage.PAUSED, reason=reason, stopped_by_gate=True)
        case Decision.INCONCLUSIVE:
            return _next(rollout, Stage.PAUSED, reason=judgement.explain(), stopped_by_gate=True)
        case Decision.CONTINUE:
            return rollout


def reverted(rollout: Rollout) -> Rollout:
    """The release to go back with is published, and no device is left that has to be waited for."""
    _require("finish rolling back", rollout)
    return _next(rollout, Stage.ROLLED_BACK)


def set_right(rollout: Rollout, now: float) -> Rollout:
    """With times that lie ahead, of a clock that was set back since, begun anew; itself if there are none."""
    times = {name: getattr(rollout, name) for name in ("started_at", "wave_opened_at", "going_back_since")}
    if max(times.values()) <= now + CLOCK_SLACK_SECONDS:
        return rollout
    return _next(rollout, rollout.stage, **{name: min(at, now) for name, at in times.items()})


def supersede(rollout: Rollout, successor: str) -> Rollout:
    """Make room for a newer rollout of the same model and channel."""
    _require("supersede", rollout)
    return _next(rollout, Stage.SUPERSEDED, reason=f"superseded by {successor}")


def require_revision(rollout: Rollout, expected: int) -> None:
    """Raise `WrongState` if somebody changed the rollout since the caller looked; -1: whatever they have seen."""
    if expected not in (-1, rollout.revision):
        raise WrongState(
            f"rollout {rollout.id} is at revision {rollout.revision}, not {expected}; look again before you change it"
        )


def _advance(rollout: Rollout, now: float) -> Rollout:
    if rollout.wave + 1 == len(rollout.spec.waves):
        return _next(rollout, Stage.SUCCEEDED)
    return _next(rollout, Stage.RUNNING, wave=rollout.wave + 1, wave_opened_at=now)


def _require(action: str, rollout: Rollout) -> None:
    if rollout.stage not in ALLOWED[action]:
        wanted = " or ".join(sorted(stage.value for stage in ALLOWED[action]))
        possible = ", ".join(
            verb for verb, stages in ALLOWED.items() if rollout.stage in stages and verb not in _UNASKED
        )
        raise WrongState(
            f"can't {action} rollout {rollout.id}: it is {rollout.stage.value}, and has to be {wanted}; "
            f"what can be done now: {possible or 'nothing, write another one'}"
        )


def _require_second_person(rollout: Rollout, actor: str) -> None:
    if actor in (rollout.author, rollout.last_editor):
        raise NotAllowed(f"{actor} wrote rollout {rollout.id}; somebody else has to let it go")


def _next(rollout: Rollout, stage: Stage, **changes: Any) -> Rollout:
    return replace(rollout, stage=stage, revision=rollout.revision + 1, **changes)


# As JSON, for the store.


def rollout_to_tree(rollout: Rollout) -> dict[str, Any]:
    """A rollout as plain JSON values."""
    return asdict(rollout) | {"spec": spec_to_tree(rollout.spec), "stage": rollout.stage.value}


def rollout_from_tree(tree: Mapping[str, Any]) -> Rollout:
    """Undo `rollout_to_tree`."""
    return Rollout(**{**tree, "spec": spec_from_tree(tree["spec"]), "stage": Stage(tree["stage"])})
