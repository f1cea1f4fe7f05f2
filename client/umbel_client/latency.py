"""How long an answer takes, release against release, measured on this device in turns."""

from __future__ import annotations

from typing import Final

from umbel.bundle import Bundle
from umbel.clock import Clock
from umbel.runtime import InferSession, Runtime
from umbel_client.examples import Arrays, Examples

ANSWERS: Final = 32
_WARM_UP: Final = 3


def latency_ratio(new: Bundle, old: Bundle, examples: Examples, runtime: Runtime, clock: Clock) -> float | None:
    """The 95th percentile of the time of one answer, new over old; None without examples, or where time stands still.

    The two take turns, so that whatever else the device does slows both.
    """
    if not examples.count:
        return None
    sessions = [runtime.infer(bundle, bundle.weights()) for bundle in (new, old)]
    taken: tuple[list[float], list[float]] = ([], [])
    for turn in range(_WARM_UP + ANSWERS):
        row = turn % examples.count
        inputs = examples.take(slice(row, row + 1)).inputs
        for session, times in zip(sessions, taken, strict=True):
            spent = _spent(session, inputs, clock)
            if turn >= _WARM_UP:
                times.append(spent)
    ours, theirs = (sorted(times)[int(0.95 * ANSWERS)] for times in taken)
    return ours / theirs if ours > 0 and theirs > 0 else None


def _spent(session: InferSession, inputs: Arrays, clock: Clock) -> float:
    began = clock.now()
    session(inputs)
    return clock.now() - began
