"""Leader and helper die between any two steps, go away and come back: a round ends with the same sum, or with none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.private.parties import Cohort, Party
from umbel.cohort_sum import HelperAnswer
from umbel.errors import SetRefused, Unreachable, WrongState
from umbel.secure_sum import HelperItem
from umbel_server.helper.local import LocalHelper
from umbel_server.helper.port import Prepared
from umbel_server.helper.records import Records


class Crash(BaseException):
    """The process dies here."""


class Line(LocalHelper):
    """The way to the helper, cut where a test says: before a request arrives, or before its answer does."""

    def __init__(self, port: LocalHelper, cut: str, error: type[BaseException]) -> None:
        super().__init__(port._helper, port._sign)
        self.cut, self.error = cut, error

    def prepare(self, rd: bytes, items: Sequence[HelperItem]) -> Prepared:
        return self._through("prepare", lambda: LocalHelper.prepare(self, rd, items))

    def commit(self, rd: bytes, ids: Sequence[bytes]) -> HelperAnswer:
        return self._through("commit", lambda: LocalHelper.commit(self, rd, ids))

    def _through(self, name: str, call: Callable[[], Any]) -> Any:
        if self.cut == f"before {name}":
            raise self.error("cut")
        answer = call()
        if self.cut == f"after {name}":
            raise self.error("cut")
        return answer


CUTS = ["before prepare", "after prepare", "before commit", "after commit"]


def reference() -> np.ndarray:
    party = Party()
    cohort = party.open()
    cohort.fill(party.devices(5))
    return cohort.sum.close().aggregate.total


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("also_helper", [False, True])
def test_a_leader_killed_anywhere_comes_to_the_same_sum(cut: str, also_helper: bool) -> None:
    party = Party()
    cohort = party.open()
    cohort.fill(party.devices(5))
    honest, party.port = party.port, Line(party.port, cut, Crash)
    cohort.restart_leader()
    with pytest.raises(Crash):
        cohort.sum.close()
    party.port = honest
    if also_helper:
        party.restart_helper()
    cohort.restart_leader()
    np.testing.assert_array_equal(cohort.sum.close().aggregate.total, reference())


@pytest.mark.parametrize("cut", CUTS)
def test_a_helper_that_is_away_and_comes_back_sums_once(cut: str) -> None:
    party = Party()
    cohort = party.open()
    cohort.fill(party.devices(5))
    honest = party.port
    cohort.sum._helper = Line(honest, cut, Unreachable)
    for _ in range(3):
        with pytest.raises(Unreachable):
            cohort.sum.close()
    cohort.sum._helper = honest
    found = cohort.sum.close()
    np.testing.assert_array_equal(found.aggregate.total, reference())
    assert cohort.sum.close() is found


def test_what_the_helper_refused_is_taken_back_once_however_often_it_is_asked() -> None:
    party = Party()
    cohort = party.open()
    devices = party.devices(6)
    cohort.fill(devices)
    party.people.revoke(devices[5].certificate.public_key)
    honest = party.port
    cohort.sum._helper = Line(honest, "before commit", Unreachable)
    for _ in range(2):
        with pytest.raises(Unreachable):
            cohort.sum.close()
    party.people.revoke(devices[4].certificate.public_key)
    cohort.sum._helper = honest
    assert cohort.sum.close().count == 4
    reduced = Party()
    small = reduced.open()
    small.fill(reduced.devices(4))
    np.testing.assert_allclose(cohort.sum.close().aggregate.total, small.sum.close().aggregate.total, atol=1e-6)


def test_two_leaders_after_a_restart_get_one_sum() -> None:
    """The old process still runs when the new one starts: whoever commits first decides the set."""
    party = Party()
    cohort = party.open()
    devices = party.devices(6)
    cohort.fill(devices[:5])
    old = cohort.sum
    cohort.sum = cohort.fresh()
    kept = dict(cohort.spool)
    cohort.spool.clear()
    for sequence, (report_id, data) in enumerate(kept.items()):
        cohort.sum.accept(cohort.sealed(data, report_id, sequence))
        cohort.spool[report_id] = data
    cohort.take(cohort.report(devices[5], cohort.encoded(np.zeros(300, np.float32))))
    new_sum = cohort.sum.close()
    with pytest.raises(WrongState):
        old.close()  # it never saw the sixth report, so it can't make this sum, and there is no other
    assert new_sum.count == 6
    with pytest.raises(SetRefused):
        party.port.commit(cohort.agreed.rd, sorted(kept))


def test_a_helper_restarted_before_the_commit_asks_to_be_shown_again() -> None:
    party = Party()
    cohort = party.open()
    cohort.fill(party.devices(5))
    ids = party.port.prepare(cohort.agreed.rd, cohort.items()).accepted
    party.restart_helper()
    with pytest.raises(WrongState):
        party.port.commit(cohort.agreed.rd, ids)
    assert cohort.fresh_total() is not None
    cohort.restart_leader()
    assert cohort.sum.close().count == 5


def test_the_helpers_answer_is_durable_before_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "helper.db"
    party = Party(records=Records(path))
    cohort: Cohort = party.open(noise_variance=1_000_000, max_weight=1)
    cohort.fill(party.devices(5))
    ids = party.port.prepare(cohort.agreed.rd, cohort.items()).accepted

    def dies(*arguments: object) -> None:
        raise Crash

    monkeypatch.setattr(party.records, "commit", dies)
    with pytest.raises(Crash):
        party.port.commit(cohort.agreed.rd, ids)
    monkeypatch.undo()
    # Nothing was given, so another set may still be summed: here the same one, with other noise.
    party.records.close()
    party.records = Records(path)
    party.restart_helper()
    party.port.prepare(cohort.agreed.rd, cohort.items())
    answer = party.port.commit(cohort.agreed.rd, ids[:4])
    party.records.close()
    party.records = Records(path)
    party.restart_helper()
    assert party.port.commit(cohort.agreed.rd, ids[:4]) == answer
    with pytest.raises(SetRefused):
        party.port.commit(cohort.agreed.rd, ids)
    party.records.close()
