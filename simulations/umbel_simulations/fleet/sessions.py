"""What became of a fleet's sessions: how many began to train, and for how many of these it was for nothing.

A device tells of a session by its shape once it has ended. One that was taken away and isn't back yet, or was still at
work when the run ended, has told nothing: its open session is read from its home. Which reports count, the
coordinator's rounds say.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from umbel.messages import check_in_reply_from_message, parse
from umbel.v1 import device_pb2 as pb
from umbel.visit import Assignment, Event
from umbel_server.round import Round, RoundState
from umbel_simulations.fleet.invariants import json_in
from umbel_simulations.fleet.member import Member

_TRAINED = Event.TRAINING_STARTED.value
_ACCEPTED, _INTERRUPTED = Event.REPORT_ACCEPTED.value, Event.INTERRUPTED.value


@dataclass(frozen=True, slots=True)
class Tally:
    """Sessions of rounds that are over."""

    shapes: Mapping[str, int]
    """Of those that devices have ended."""
    trained: int
    """Began to train."""
    wasted: int
    """Of these, those of which nothing counts: interrupted, late, refused, lost, or in a round that came to nothing."""
    dropped: int
    """In which the device was taken away."""


def tally(
    members: Iterable[Member],
    states: Iterable[Mapping[str, Any]],
    rounds: Iterable[Round],
    is_away: Callable[[Member], bool],
) -> Tally:
    """Count a run's sessions.

    Args:
        members: all devices, asleep.
        states: what each has written down of itself.
        rounds: all rounds, with the reports that the coordinator counted.
        is_away: whether a device is taken away, or not free, at the end.
    """
    shapes: Counter[str] = Counter()
    for state in states:
        shapes.update({str(shape): int(count) for shape, count in state.get("shapes", {}).items()})
    still_open, counted = set[str](), set[str]()
    for held in rounds:
        if not held.state.is_over:
            still_open |= {one.id for one in held.sessions.values()}
        if held.state not in (RoundState.ABANDONED, RoundState.FAILED):
            counted |= {one.id for one in held.sessions.values() if one.sequence is not None}
    trained = sum(count for shape, count in shapes.items() if _TRAINED in shape)
    dropped = sum(count for shape, count in shapes.items() if _INTERRUPTED in shape and _ACCEPTED not in shape)
    undecided = still_open - counted
    for member, session, shape in _open_sessions(members):
        if session in undecided:
            continue
        trained += _TRAINED in shape
        dropped += session not in counted and is_away(member)
    return Tally(dict(sorted(shapes.items())), trained, max(0, trained - len(counted)), dropped)


def _open_sessions(members: Iterable[Member]) -> Iterator[tuple[Member, str, str]]:
    """The id and the shape of each session that its device hasn't ended."""
    for member in members:
        tree = json_in(member.cut_off or member.home, "session/session.json")
        if tree:
            answer = check_in_reply_from_message(parse(pb.CheckInResponse, base64.b64decode(tree["assignment"])))
            if isinstance(answer.reply, Assignment):
                yield member, answer.reply.session_id, str(tree["shape"])
