"""Rollouts, holds and the controller's lease in the store. What takes a connection is part of its caller's
transaction.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import sqlalchemy as sa

from umbel import fields
from umbel.errors import AlreadyExists, NotFound, WrongState
from umbel_server.json_text import from_text, to_text
from umbel_server.rollout import UNDER_WAY, Rollout, Stage, rollout_from_tree, rollout_to_tree
from umbel_server.tables import HOLDS, LEASES, ROLLOUTS


@dataclass(frozen=True, slots=True)
class RolloutRecord:
    """A rollout, and what its gate said last, in words."""

    rollout: Rollout
    judgement: str = ""


def insert(connection: sa.Connection, rollout: Rollout) -> None:
    """Write a new rollout.

    Raises:
        AlreadyExists: the id is taken.
    """
    if connection.scalar(sa.select(ROLLOUTS.c.id).where(ROLLOUTS.c.id == rollout.id)):
        raise AlreadyExists(f"there is a rollout {rollout.id!r} already; choose another id")
    connection.execute(ROLLOUTS.insert().values(_row(rollout) | {"judgement_json": "{}"}))


def update(connection: sa.Connection, before: Rollout, after: Rollout, judgement: str | None = None) -> None:
    """Write a rollout's next state.

    Raises:
        WrongState: somebody else changed it meanwhile.
    """
    values = _row(after) | ({} if judgement is None else {"judgement_json": to_text({"words": judgement})})
    this = (ROLLOUTS.c.id == before.id) & (ROLLOUTS.c.revision == before.revision)
    if connection.execute(ROLLOUTS.update().where(this).values(values)).rowcount != 1:
        raise WrongState(f"rollout {before.id} was changed by somebody else at this moment; look at it again")


def get(connection: sa.Connection, rollout_id: str) -> RolloutRecord:
    """One rollout; raises `NotFound`."""
    row = connection.execute(sa.select(ROLLOUTS).where(ROLLOUTS.c.id == rollout_id)).first()
    if row is None:
        raise NotFound(f"no rollout is called {rollout_id[:80]!r}; `umbel rollouts list` tells which there are")
    return _from_row(row)


def newest(connection: sa.Connection, limit: int = 100) -> list[RolloutRecord]:
    """Rollouts, newest first."""
    query = sa.select(ROLLOUTS).order_by(ROLLOUTS.c.created_at.desc(), ROLLOUTS.c.id).limit(limit)
    return [_from_row(row) for row in connection.execute(query)]


def steering(connection: sa.Connection) -> list[Rollout]:
    """Rollouts that the controller has to look after; oldest first."""
    return _of_stages(connection, *UNDER_WAY, Stage.SCHEDULED)


def let_go(connection: sa.Connection) -> list[Rollout]:
    """Rollouts that may say what a device gets, those that ended among them; oldest first."""
    return _of_stages(connection, *UNDER_WAY, Stage.SCHEDULED, Stage.ROLLED_BACK, Stage.SUCCEEDED)


def _of_stages(connection: sa.Connection, *stages: Stage) -> list[Rollout]:
    wanted = [stage.value for stage in stages]
    query = sa.select(ROLLOUTS).where(ROLLOUTS.c.stage.in_(wanted)).order_by(ROLLOUTS.c.created_at)
    return [_from_row(row).rollout for row in connection.execute(query)]


def _row(rollout: Rollout) -> dict[str, object]:
    spec = rollout.spec
    return {
        "id": rollout.id,
        "model": spec.model,
        "channel": spec.channel,
        "population": spec.population,
        "stage": rollout.stage.value,
        "revision": rollout.revision,
        "created_at": rollout.created_at,
        "rollout_json": to_text(rollout_to_tree(rollout)),
    }


def _from_row(row: sa.Row[tuple[object, ...]]) -> RolloutRecord:
    values = row._mapping
    judgement = from_text(values["judgement_json"]).get("words", "")
    return RolloutRecord(_parsed(values["rollout_json"]), judgement)


@functools.lru_cache(maxsize=1024)
def _parsed(content: str) -> Rollout:
    """Those that ended are read again at each look, and don't change any more."""
    return rollout_from_tree(from_text(content))


# One controller at a time.


def take_lease(connection: sa.Connection, name: str, holder: str, now: float, seconds: float) -> bool:
    """Whether `holder` has the lease now: it had it, or nobody does any more.

    One that lasts longer than any is from a clock that was ahead, and counts no more.
    """
    row = connection.execute(sa.select(LEASES).where(LEASES.c.name == name)).first()
    if row is None:
        connection.execute(LEASES.insert().values(name=name, holder=holder, until=now + seconds))
        return True
    if row.holder != holder and now < row.until <= now + seconds:
        return False
    this = (LEASES.c.name == name) & (LEASES.c.holder == row.holder) & (LEASES.c.until == row.until)
    return connection.execute(LEASES.update().where(this).values(holder=holder, until=now + seconds)).rowcount == 1


# Holds.


def hold(connection: sa.Connection, model: str, actor: str, reason: str, now: float) -> None:
    """Stop all offers of a model."""
    connection.execute(HOLDS.delete().where(HOLDS.c.model == model))
    connection.execute(HOLDS.insert().values(model=model, actor=actor, reason=fields.text(reason, "reason"), at=now))


def lift(connection: sa.Connection, model: str) -> None:
    """Let offers go out again; raises `NotFound` if none were held."""
    if connection.execute(HOLDS.delete().where(HOLDS.c.model == model)).rowcount != 1:
        raise NotFound(f"nothing is held of model {model!r}")


def held(connection: sa.Connection) -> dict[str, str]:
    """Model -> why its offers are held."""
    return {row.model: f"{row.actor}: {row.reason}" for row in connection.execute(sa.select(HOLDS))}
