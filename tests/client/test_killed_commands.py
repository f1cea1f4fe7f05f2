"""A device's own commands, killed anywhere: what they promise is kept by whoever types them again."""

from __future__ import annotations

import itertools
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.client.conftest import LEARNS, Bench, learnt_from_anna
from tests.client.recordings import recordings
from tests.power_cut import PowerCut, dies_at
from umbel.errors import InputMismatch
from umbel_client.examples import MemoryExamples
from umbel_client.importing import import_npz
from umbel_client.sqlite_examples import SqliteExamples


def derived(home: Path) -> list[str]:
    """What lies in a home and was made of examples."""
    session = [path.name for path in (home / "session").iterdir()]
    return session + [path.name for path in (home / "shelf" / "personal").iterdir()]


async def test_forgetting_that_was_killed_anywhere_leaves_nothing_behind_once_it_is_asked_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await learnt_from_anna(bench)
    before = shutil.copytree(bench.home, tmp_path / "before")
    for last in itertools.count():
        shutil.rmtree(bench.home)
        shutil.copytree(before, bench.home)
        device = bench.open(personal=LEARNS)
        with monkeypatch.context() as patch, suppress(PowerCut):
            taken = dies_at(patch, last)
            device.forget("anna")
        again = bench.open(personal=LEARNS)
        again.forget("anna")
        assert derived(bench.home) == [], f"cut at step {last}: {taken}"
        assert again.kit.examples.stats(bench.clock.now()).subjects == {}
        assert again.answers_with == "release 1"
        if len(taken) < last:
            break
    assert last > 4


async def test_examples_that_are_gone_take_along_what_was_derived_before_a_kill_can_come(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = await learnt_from_anna(bench)
    real = SqliteExamples.forget

    def killed_after(self: SqliteExamples, subject: str | None) -> int:
        real(self, subject)
        raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(SqliteExamples, "forget", killed_after)
        device.forget("anna")
    assert derived(bench.home) == []


async def test_forgetting_everybody_drops_what_was_derived_from_examples_that_are_long_gone(bench: Bench) -> None:
    device = await learnt_from_anna(bench)
    device.kit.examples.forget(None)
    assert device.forget(None) == 0
    assert derived(bench.home) == []


def archive(path: Path) -> Path:
    x, y = recordings(20, "mine")
    np.savez(path, x=x, y=y, held_back=np.arange(20) % 5 == 4)
    return path


def test_an_import_that_is_killed_adds_all_of_an_archive_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, store = archive(tmp_path / "mine.npz"), SqliteExamples(tmp_path / "examples.sqlite")
    real, calls = SqliteExamples.add, itertools.count(1)

    def killed_after_one(self: SqliteExamples, *arguments: Any, **options: Any) -> int:
        if next(calls) > 1:
            raise PowerCut
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch, suppress(PowerCut):
        patch.setattr(SqliteExamples, "add", killed_after_one)
        import_npz(store, file, at=1.0)
    held = store.stats(2.0)
    assert (held.training, held.held_back) == (16, 4)


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_an_archive_keeps_its_order_and_says_for_each_example_whether_it_is_held_back(
    tmp_path: Path, kind: str
) -> None:
    store = SqliteExamples(tmp_path / "examples.sqlite") if kind == "disk" else MemoryExamples()
    assert import_npz(store, archive(tmp_path / "mine.npz"), at=1.0) == 20
    split, (x, _) = store.split(2.0), recordings(20, "mine")
    assert np.array_equal(split.held_back.inputs["x"], x[4::5])
    assert np.array_equal(split.training.inputs["x"], np.delete(x, slice(4, None, 5), axis=0))
    for wrong in (np.ones(19, np.bool_), np.ones(20)):
        with pytest.raises(InputMismatch, match="one boolean for each"):
            store.add({"x": x}, {"y": np.zeros(20)}, at=1.0, held_back=wrong)  # type: ignore[arg-type]
