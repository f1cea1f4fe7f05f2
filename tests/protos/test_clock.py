"""What was just now, by a clock that may have been wrong."""

from __future__ import annotations

import math

import pytest

from umbel.clock import is_recent


@pytest.mark.parametrize(
    ("at", "recent"), [(100.0, True), (90.1, True), (90.0, False), (-math.inf, False), (100.1, False)]
)
def test_what_is_yet_to_come_is_as_old_as_what_is_long_past(at: float, recent: bool) -> None:
    assert is_recent(at, now=100.0, seconds=10.0) is recent
