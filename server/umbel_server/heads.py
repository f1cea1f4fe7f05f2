"""The heads of channels in the store: what a device gets that no rollout takes. What takes a connection is part of its
caller's transaction.

A release that was published without waves is everybody's on its channel; one that a rollout took to all of a population
is that population's alone, so that no device gets in no waves what was let go for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import sqlalchemy as sa

from umbel_server.rollout_spec import EVERYBODY, Audience
from umbel_server.tables import HEADS


@dataclass(frozen=True, slots=True)
class Heads:
    """What each audience stands at, as it was written."""

    numbers: Mapping[Audience, int] = field(default_factory=dict)

    def of(self, audience: Audience) -> int:
        """What an audience gets; 0 for nothing. Of everybody: the newest release that any population gets."""
        if audience.population == EVERYBODY:
            return max(self.of_channel(audience.model, audience.channel), default=0)
        everybody = Audience(audience.model, audience.channel)
        return max(self.numbers.get(audience, 0), self.numbers.get(everybody, 0))

    def of_channel(self, model: str, channel: str) -> list[int]:
        """The releases that populations of a channel stand at."""
        return sorted({number for at, number in self.numbers.items() if (at.model, at.channel) == (model, channel)})

    def populations_at(self, model: str, channel: str, number: int) -> tuple[str, ...]:
        """Whose head a release is: () for nobody's, (EVERYBODY,) for everybody's."""
        here = {at.population for at, it in self.numbers.items() if (*at[:2], it) == (model, channel, number)}
        return (EVERYBODY,) if EVERYBODY in here else tuple(sorted(here))


def read(connection: sa.Connection) -> Heads:
    """All of them: a few for each model."""
    rows = connection.execute(sa.select(HEADS))
    return Heads({Audience(row.model, row.channel, row.population): row.number for row in rows})


def move(connection: sa.Connection, audience: Audience, number: int) -> None:
    """Let an audience stand at a release; what everybody gets takes the place of all that is older."""
    here = (HEADS.c.model == audience.model) & (HEADS.c.channel == audience.channel)
    mine = HEADS.c.population == audience.population
    passed = sa.or_(mine, HEADS.c.number < number) if audience.population == EVERYBODY else mine
    connection.execute(HEADS.delete().where(here, passed))
    connection.execute(HEADS.insert().values(**audience._asdict(), number=number))
