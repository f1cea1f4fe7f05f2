"""How the release that answers does in use: what a device tells of it at each visit.

The coordinator compares devices that have a new release with such that don't have it yet, over the same time.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from umbel.visit import Health
from umbel_client.kit import Kit
from umbel_client.predictor import Predictor
from umbel_client.report import peak_memory_mb

ANSWERS: Final = 256
"""So many of the latest answers count."""
_LEAST: Final = 20


class AnswerTimes:
    """How long the latest answers took; of one predictor at a time."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=ANSWERS)
        self._predictor: Predictor | None = None

    def took(self, predictor: Predictor, seconds: float) -> None:
        """Note an answer."""
        if predictor is not self._predictor:
            self._seconds.clear()
            self._predictor = predictor
        self._seconds.append(seconds)

    def percentile(self, predictor: Predictor | None) -> float | None:
        """The 95th percentile, in seconds; None with too few answers, or where time stands still."""
        if predictor is not self._predictor or len(self._seconds) < _LEAST:
            return None
        found = sorted(self._seconds)[int(0.95 * len(self._seconds))]
        return found if found > 0 else None


def health_of(kit: Kit, predictor: Predictor | None, times: AnswerTimes) -> Health:
    """What this device knows about what answers now."""
    if predictor is None:
        return Health()
    scores = kit.memory.state.scores
    judged = scores.serving if scores.examples else None
    return Health(judged, times.percentile(predictor), peak_memory_mb() or None)
