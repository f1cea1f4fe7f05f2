"""What an operator who asks `umbel tasks drift` after each round would have been told, and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from umbel.histograms import Histogram
from umbel_server.drift import Splits, Verdict, findings
from umbel_server.drift_windows import Windows
from umbel_server.round import Round
from umbel_simulations.outcome import Alarm, DriftOutcome

_USUAL: Final = Windows()


def drift_of(rounds: Sequence[Round], histograms: Sequence[Histogram], epoch: float) -> DriftOutcome:
    """Look after each round, by the product's own test and its usual windows, and note what begins to be drift.

    Args:
        rounds: of one task, in order.
        histograms: of its model; those of answers change with each version, and are left out.
        epoch: when the run began, in POSIX seconds.
    """
    of_data = [one for one in histograms if not one.of_answers]
    counted = [(held, held.ended_at) for held in rounds if held.metrics and held.ended_at is not None]
    splits = Splits.of(_USUAL.reference, _USUAL.recent)
    alarms: list[Alarm] = []
    drifting: set[str] = set()
    looks = range(_USUAL.reference + _USUAL.recent, len(counted) + 1)
    for end in looks:
        compared = [held.metrics for held, _ in (*counted[: _USUAL.reference], *counted[end - _USUAL.recent : end])]
        found = [one for one in findings(splits, compared, of_data, _USUAL.below) if one.verdict is Verdict.DRIFT]
        newest, ended = counted[end - 1]
        hour = round((ended - epoch) / 3600.0, 6)
        alarms += [Alarm(one.what, newest.key.number, hour, one.p_value) for one in found if one.what not in drifting]
        drifting = {one.what for one in found}
    return DriftOutcome(len(looks), tuple(alarms))
