"""A device's answer counts once, for the offer that it got itself, and only in an order that can be true."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.databases import new_sqlite
from umbel.visit import Outcome, ReleaseOutcome
from umbel_server import executions
from umbel_server.executions import HOLDS_IT, Execution
from umbel_server.store import Store

HERS, ITS = "a" * 32, "b" * 32


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """With an offer of release 3 to one device."""
    made = Store.open(new_sqlite(tmp_path / "umbel.db"), durable=False)
    with made.transaction() as connection:
        executions.offer(connection, Execution("offer-1", "r", 0, "watch", 3, HERS, offered_at=1.0))
    yield made
    made.close()


def tell(store: Store, outcome: Outcome, device: str = HERS, execution: str = "offer-1") -> bool:
    with store.transaction() as connection:
        told = ReleaseOutcome("watch", 3, outcome, execution=execution)
        return executions.answer(connection, device, told, now=2.0)


def known(store: Store) -> str:
    with store.reading() as connection:
        found = executions.find(connection, "watch", 3, HERS)
    assert found is not None
    return found.outcome


def test_an_answer_counts_once(store: Store) -> None:
    assert tell(store, Outcome.ADOPTED)
    assert not tell(store, Outcome.ADOPTED)
    assert known(store) in HOLDS_IT


def test_a_foreign_device_cannot_answer_for_another(store: Store) -> None:
    assert not tell(store, Outcome.FAILED, device=ITS)
    assert known(store) == executions.WAITING


def test_an_offer_that_was_never_made_has_no_answer(store: Store) -> None:
    assert not tell(store, Outcome.FAILED, execution="offer-2")
    assert known(store) == executions.WAITING


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (None, Outcome.COMMITTED),
        (None, Outcome.REVERTED),
        (Outcome.KEPT_OWN, Outcome.COMMITTED),
        (Outcome.FAILED, Outcome.ADOPTED),
        (Outcome.ADOPTED, Outcome.FAILED),
        (Outcome.REVERTED, Outcome.COMMITTED),
    ],
)
def test_a_story_that_cannot_be_true_changes_nothing(store: Store, first: Outcome | None, then: Outcome) -> None:
    if first is Outcome.REVERTED:
        tell(store, Outcome.ADOPTED)
    assert first is None or tell(store, first)
    before = known(store)
    assert not tell(store, then)
    assert known(store) == before


def test_withdrawing_ends_what_waits_and_nothing_else(store: Store) -> None:
    with store.transaction() as connection:
        executions.offer(connection, Execution("offer-2", "r", 0, "watch", 3, ITS, offered_at=1.0))
        tell_on = ReleaseOutcome("watch", 3, Outcome.ADOPTED, execution="offer-2")
        assert executions.answer(connection, ITS, tell_on, now=2.0)
        executions.withdraw(connection, "r", 3)
        assert executions.counts(connection, "r", [3]) == {(3, executions.WITHDRAWN): 1, (3, "adopted"): 1}
    assert known(store) == executions.WITHDRAWN


def test_a_rollouts_moves_are_its_own_whatever_numbers_others_have(store: Store) -> None:
    """Each model counts its releases from 1."""
    with store.transaction() as connection:
        executions.offer(connection, Execution("offer-2", "other", 0, "ankle", 3, HERS, offered_at=1.0))
        executions.offer(connection, Execution("offer-3", "r", 0, "watch", 4, ITS, offered_at=1.0))
        assert [move.id for move in executions.of_rollout(connection, "r", [3])] == ["offer-1"]
        assert [move.id for move in executions.of_numbers(connection, "watch", [3])] == ["offer-1"]
        executions.withdraw(connection, "r", 3)
        assert executions.counts(connection, "r", [3, 4]) == {(3, executions.WITHDRAWN): 1, (4, "waiting"): 1}
        assert executions.counts(connection, "other", [3]) == {(3, "waiting"): 1}
