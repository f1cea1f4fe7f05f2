"""Names that may be mistyped: told on standard error, and not refused, since devices and channels may come later."""

from __future__ import annotations

import sys
from collections.abc import Container
from typing import Final

from umbel.v1 import admin_pb2 as pb
from umbel_server.cli.verbs import Session

_RECENT: Final = 100


def note_population(session: Session, population: str) -> None:
    """Say so if no device of a population is enrolled."""
    if population and not session.stub.ListDevices(pb.ListDevicesRequest(population=population, limit=1)).devices:
        _note(f"no device of population {population!r} is enrolled yet; `umbel devices list` tells who is")


def note_channel(session: Session, model: str, channel: str, made: Container[int]) -> None:
    """Say so if the releases just `made` are the only ones on their channel, while others have some."""
    found = session.stub.ListReleases(pb.ListReleasesRequest(model=model, limit=_RECENT)).releases
    others = {it.channel for it in found if it.standing and it.number not in made}
    if others and channel not in others:
        _note(f"no other recent release is on channel {channel!r}; they are on {', '.join(sorted(others))}")


def _note(words: str) -> None:
    sys.stderr.write(f"note: {words}\n")
