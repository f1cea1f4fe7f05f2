"""Folders and databases whose making was cut off: complete, made again, or told; never taken for what they aren't."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.power_cut import PowerCut, dies_at
from umbel.errors import AlreadyExists
from umbel_server.folder import Folder
from umbel_server.helper.folder import HelperFolder, HelperSettings
from umbel_server.store import Store

NOW = 1_790_000_000.0


def test_a_coordinators_folder_is_complete_or_made_again_or_told_to_be_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    for last in itertools.count(0, 3):
        path = tmp_path / str(last)
        with monkeypatch.context() as patch, suppress(PowerCut):
            taken = dies_at(patch, last)
            Folder.create(path, (), NOW)
        try:
            Folder.create(path, (), NOW)
        except AlreadyExists as error:
            told.append("broken off" in str(error))
        if not told or not told[-1]:
            Folder(path).authorities()
            Folder(path).repository()
            Folder(path).witness()
        if len(taken) < last:
            break
    assert told == sorted(told, reverse=True) and told[0] and not told[-1], "first broken off, then complete"


def test_a_helpers_folder_is_complete_or_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = HelperSettings("ab" * 32, port=0)
    for last in itertools.count():
        path = tmp_path / str(last)
        with monkeypatch.context() as patch, suppress(PowerCut):
            taken = dies_at(patch, last)
            HelperFolder.create(path, settings, "127.0.0.1:7446", "", NOW)
        with suppress(AlreadyExists):
            HelperFolder.create(path, settings, "127.0.0.1:7446", "", NOW)
        folder = HelperFolder(path)
        assert folder.card().identity == folder.identity().public_key().public_bytes_raw()
        assert folder.card().certificate == folder.tls()[1] and folder.settings() == settings
        if len(taken) < last:
            break
    assert last > 10


def schema(path: Path) -> list[str]:
    with sqlite3.connect(path) as database:
        return sorted(str(row[0]) for row in database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"))


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many statements may still change a database before the process dies; none in it: any number."""
    left: list[int] = []

    def before(*arguments: object) -> None:
        if left and str(arguments[2]).split()[0].upper() in ("CREATE", "ALTER", "INSERT", "UPDATE", "DROP", "DELETE"):
            left[0] -= 1
            if left[0] < 0:
                raise PowerCut

    sa.event.listen(sa.Engine, "before_cursor_execute", before)
    yield left
    sa.event.remove(sa.Engine, "before_cursor_execute", before)


def test_a_database_whose_making_was_cut_off_is_made_to_its_end_by_the_next(tmp_path: Path, changes: list[int]) -> None:
    Store.open(f"sqlite:///{tmp_path / 'whole.db'}").close()
    whole = schema(tmp_path / "whole.db")
    assert len(whole) > 20
    for allowed in itertools.count(0, 7):
        path = tmp_path / f"{allowed}.db"
        changes[:] = [allowed]
        with suppress(PowerCut):
            Store.open(f"sqlite:///{path}").close()
        was_cut = changes.pop() < 0
        Store.open(f"sqlite:///{path}").close()
        assert schema(path) == whole, f"cut after {allowed} changes"
        if not was_cut:
            break
    assert allowed > 30
