"""In a storm the books balance; and where a bug is planted in the round logic, the storm finds it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.simulations import fleets
from umbel.bundle import Bundle
from umbel.errors import InvariantBroken
from umbel_server.coordinator import Coordinator
from umbel_server.round import Round, Session, SessionState
from umbel_simulations.scenario import PrivacyPart

RECEIVE, OPEN, CLOSE = Round.receive, Round._require_open, Round.close


def test_in_a_storm_every_report_that_counts_counts_once(tiny_bundle: Bundle, tmp_path: Path) -> None:
    told = fleets.scenario(fleets.home_of(tiny_bundle), faults=fleets.STORM)
    for private in (False, True):
        task = replace(told.task, privacy=PrivacyPart(on=private))
        found = fleets.played(replace(told, task=task), tmp_path)
        assert [one.verdict for one in found.rounds].count("accepted") == 4
        assert {"coordinator killed", "device killed", "coordinator cut off"} <= set(found.faults)
        assert ("helper killed" in found.faults) is private
        assert len(found.invariants) == 8


def _late_reports_count_twice(self: Round, session_id: str, report_id: str, *rest: Any) -> Round:
    """A report that comes again, its acknowledgement lost, is counted again."""
    session = self.session(session_id)
    if session.state is SessionState.REPORTED:
        again = replace(session, id=f"{session_id}-again", report_id=f"{report_id}-again", sequence=len(self.reports))
        return replace(self, sessions={**self.sessions, again.id: again})
    return RECEIVE(self, session_id, report_id, *rest)


def _sessions_that_ended_count(self: Round, session: Session) -> None:
    """Whoever comes after its session was given to another counts all the same."""
    if session.state is not SessionState.ABORTED:
        OPEN(self, session)


def _too_few_are_enough(self: Round, now: float) -> Round:
    """A round that is due closes with a single report."""
    return CLOSE(replace(self, minimum=1), now)


def _forgotten(self: Coordinator, *asked: Any) -> None:
    """Reports that count aren't folded into the sum when the coordinator comes back."""


PLANTED: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "late reports count twice": (Round, "receive", _late_reports_count_twice),
    "sessions that ended count": (Round, "_require_open", _sessions_that_ended_count),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_bug_planted_in_the_round_logic_is_found(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    where, name, wrong = PLANTED[bug]
    monkeypatch.setattr(where, name, wrong)
    told = fleets.scenario(fleets.home_of(tiny_bundle), faults=fleets.STORM)
    with pytest.raises(InvariantBroken):
        fleets.played(told, tmp_path)
