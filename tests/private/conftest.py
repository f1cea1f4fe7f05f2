"""Who takes part in these tests: a leader with its helper, and a round of theirs."""

from __future__ import annotations

import pytest

from tests.private.parties import Cohort, Party


@pytest.fixture
def party() -> Party:
    return Party()


@pytest.fixture
def cohort(party: Party) -> Cohort:
    """A round with six honest reports in, of which it needs four."""
    cohort = party.open(minimum=4)
    cohort.fill(party.devices(6))
    return cohort
