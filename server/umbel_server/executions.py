"""One device's move to one release: offered, then answered; later committed or reverted. One device, one vote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import sqlalchemy as sa

from umbel.visit import Outcome, ReleaseOutcome
from umbel_server.gates import Arm, Exposure
from umbel_server.tables import EXECUTIONS

WAITING: Final = ""
WITHDRAWN: Final = "withdrawn"
HOLDS_IT: Final = (Outcome.ADOPTED.value, Outcome.COMMITTED.value)
FAILED: Final = (Outcome.FAILED.value, Outcome.REVERTED.value)
_ANSWERS_TO: Final[dict[str, tuple[Outcome, ...]]] = {
    WAITING: (Outcome.ADOPTED, Outcome.KEPT_OWN, Outcome.FAILED),
    WITHDRAWN: (Outcome.ADOPTED, Outcome.KEPT_OWN, Outcome.FAILED),
    Outcome.ADOPTED.value: (Outcome.COMMITTED, Outcome.REVERTED),
    Outcome.COMMITTED.value: (Outcome.REVERTED,),
}
"""What may follow what; anything else is a repetition, or a device that tells stories, and changes nothing."""


_NOTHING: Final = Exposure(Arm.CANARY)


@dataclass(frozen=True, slots=True)
class Execution:
    """A device's move."""

    id: str
    rollout: str
    wave: int
    model: str
    number: int
    device: str
    offered_at: float
    outcome: str = WAITING
    reason: str = ""
    accuracy_change: float | None = None
    latency_ratio: float | None = None
    answered_at: float | None = None

    def exposure(self, in_use: Exposure = _NOTHING) -> Exposure:
        """What a gate sees of it, beside what is known of the release in use on the device."""
        return replace(
            in_use,
            answered=self.outcome not in (WAITING, WITHDRAWN),
            failed=self.outcome in FAILED,
            kept_own=self.outcome == Outcome.KEPT_OWN.value,
            accuracy_change=self.accuracy_change,
            latency_ratio=self.latency_ratio,
        )


def find(connection: sa.Connection, model: str, number: int, device: str) -> Execution | None:
    """A device's move to a release, if it was ever offered it."""
    this = (EXECUTIONS.c.model == model) & (EXECUTIONS.c.number == number) & (EXECUTIONS.c.device == device)
    found = connection.execute(sa.select(EXECUTIONS).where(this)).mappings().first()
    return Execution(**found) if found else None


def offer(connection: sa.Connection, execution: Execution) -> None:
    """Write an offer; another one of the same release to the same device makes room."""
    this = (EXECUTIONS.c.model == execution.model) & (EXECUTIONS.c.number == execution.number)
    connection.execute(EXECUTIONS.delete().where(this, EXECUTIONS.c.device == execution.device))
    values = {column: getattr(execution, column) for column in EXECUTIONS.columns.keys()}  # noqa: SIM118
    connection.execute(EXECUTIONS.insert().values(values))


def answer(connection: sa.Connection, device: str, told: ReleaseOutcome, now: float) -> bool:
    """Write a device's answer; False if it changes nothing: told before, or not this device's to tell."""
    query = sa.select(EXECUTIONS.c.outcome).where(EXECUTIONS.c.id == told.execution, EXECUTIONS.c.device == device)
    before = connection.scalar(query)
    if before is None or told.outcome not in _ANSWERS_TO.get(before, ()):
        return False
    values: dict[str, object] = {"outcome": told.outcome.value, "reason": told.reason, "answered_at": now}
    for measured in ("accuracy_change", "latency_ratio"):
        if getattr(told, measured) is not None:
            values[measured] = getattr(told, measured)
    connection.execute(EXECUTIONS.update().where(EXECUTIONS.c.id == told.execution).values(values))
    return True


def of_rollout(connection: sa.Connection, rollout: str, numbers: Sequence[int]) -> list[Execution]:
    """A rollout's moves to these releases, in the order of their answers, those without one last."""
    this = (EXECUTIONS.c.rollout == rollout) & EXECUTIONS.c.number.in_(numbers)
    order = sa.func.coalesce(EXECUTIONS.c.answered_at, 1e300)
    query = sa.select(EXECUTIONS).where(this).order_by(order, EXECUTIONS.c.offered_at, EXECUTIONS.c.id)
    return [Execution(**found) for found in connection.execute(query).mappings()]


def of_numbers(connection: sa.Connection, model: str, numbers: Sequence[int]) -> list[Execution]:
    """All moves to these releases, in a rollout or without one."""
    query = sa.select(EXECUTIONS).where(EXECUTIONS.c.model == model, EXECUTIONS.c.number.in_(numbers))
    return [Execution(**found) for found in connection.execute(query.order_by(EXECUTIONS.c.id)).mappings()]


def withdraw(connection: sa.Connection, rollout: str, number: int) -> None:
    """End the offers that nobody has answered."""
    this = (EXECUTIONS.c.rollout == rollout) & (EXECUTIONS.c.number == number) & (EXECUTIONS.c.outcome == WAITING)
    connection.execute(EXECUTIONS.update().where(this).values(outcome=WITHDRAWN))


def counts(connection: sa.Connection, rollout: str, numbers: Sequence[int]) -> dict[tuple[int, str], int]:
    """(release, outcome) -> how many devices."""
    found = of_rollout(connection, rollout, numbers)
    return dict(Counter((execution.number, execution.outcome or "waiting") for execution in found))
