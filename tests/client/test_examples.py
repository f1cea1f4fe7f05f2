"""Examples: all or nothing in, within quota and age, split in time, and gone for good when a person asks."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.crossing import crossed
from umbel.bundle import Bundle
from umbel.errors import InputMismatch, MalformedMessage, NotFinite, NotFound, OutOfBounds
from umbel_client import sqlite_examples
from umbel_client.examples import ExampleStore, MemoryExamples, StoreLimits, as_arrays
from umbel_client.importing import import_npz, read_inputs
from umbel_client.sqlite_examples import SqliteExamples
from umbel_models.zoo import bundle_path

Make = Callable[..., ExampleStore]


@pytest.fixture(params=["disk", "memory"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    if request.param == "memory":
        return MemoryExamples
    return lambda *limits: SqliteExamples(tmp_path / "examples.sqlite", *limits)


def x(*values: float) -> dict[str, Any]:
    return {"x": np.array(values, np.float32)[:, None]}


def y(*values: int) -> dict[str, Any]:
    return {"y": np.array(values, np.int64)}


def values(examples: Any) -> list[float]:
    return [] if not examples.count else examples.inputs["x"][:, 0].tolist()


def test_the_newest_share_is_held_back_in_time(make: Make) -> None:
    store = make()
    store.add(x(5, 6, 7, 8, 9), y(0, 0, 0, 0, 0), at=2.0)
    store.add(x(0, 1, 2, 3, 4), y(1, 1, 1, 1, 1), at=1.0)
    split = store.split(3.0)
    assert values(split.training) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert values(split.held_back) == [8, 9]
    assert split.training.targets["y"].tolist() == [1] * 5 + [0] * 3
    assert split.training.targets["y"].dtype == np.int64


def test_tags_stand_over_time(make: Make) -> None:
    store = make()
    store.add(x(1, 2), y(0, 0), at=1.0, held_back=True)
    store.add(x(3, 4), y(0, 0), at=2.0, held_back=False)
    split = store.split(3.0)
    assert (values(split.training), values(split.held_back)) == ([3, 4], [1, 2])
    stats = store.stats(3.0)
    assert (stats.training, stats.held_back) == (2, 2)


def test_beyond_the_quota_the_oldest_go(make: Make) -> None:
    store = make(StoreLimits(held_back_share=0.0, max_examples=3))
    store.add(x(1, 2), y(0, 0), at=1.0)
    store.add(x(3, 4), y(0, 0), at=2.0)
    assert values(store.split(2.0).training) == [2, 3, 4]


def test_what_is_too_old_goes_with_time(make: Make) -> None:
    store = make(StoreLimits(held_back_share=0.0, max_age_seconds=10.0))
    store.add(x(1), y(0), at=100.0)
    store.add(x(2), y(0), at=105.0)
    assert values(store.split(110.0).training) == [1, 2]
    assert values(store.split(111.0).training) == [2]
    assert store.stats(200.0).training == 0


@pytest.mark.parametrize(
    ("inputs", "targets", "kind"),
    [
        ({}, {"y": np.zeros(1)}, InputMismatch),
        ({"x": np.zeros((1, 1))}, {}, InputMismatch),
        ({"x": np.zeros((2, 1))}, {"y": np.zeros(1)}, InputMismatch),
        ({"x": np.zeros((0, 1))}, {"y": np.zeros(0)}, InputMismatch),
        ({"x": np.float32(1)}, {"y": np.zeros(1)}, InputMismatch),
        ({"x": np.array([["a"]])}, {"y": np.zeros(1)}, InputMismatch),
        ({"x": np.array([[None]])}, {"y": np.zeros(1)}, InputMismatch),
        ({"x": np.array([[np.nan]])}, {"y": np.zeros(1)}, NotFinite),
        ({"x": np.array([[1.0]])}, {"y": np.array([np.inf])}, NotFinite),
        ({"x": np.ma.masked_less(np.array([[-1.0]]), 0)}, {"y": np.zeros(1)}, InputMismatch),
    ],
)
def test_what_is_no_example_is_refused_and_nothing_is_kept(
    make: Make, inputs: Any, targets: Any, kind: type[Exception]
) -> None:
    """By a store that holds nothing yet: one that does refuses most of it for another reason."""
    store = make()
    before = store.revision()
    with pytest.raises(kind):
        store.add({k: np.asanyarray(v) for k, v in inputs.items()}, targets, at=2.0)
    assert store.revision() == before
    assert store.stats(2.0).training == 0


@pytest.mark.parametrize(
    "inputs",
    [
        {"x": np.zeros((1, 2), np.float32)},
        {"x": np.zeros((1, 1), np.float64)},
        {"z": np.zeros((1, 1), np.float32)},
    ],
)
def test_examples_of_another_form_are_refused_and_nothing_is_kept(make: Make, inputs: Any) -> None:
    store = make()
    store.add(x(1), y(0), at=1.0)
    before = store.revision()
    with pytest.raises(InputMismatch):
        store.add(inputs, y(0), at=2.0)
    assert store.revision() == before
    assert store.stats(2.0).training == 1


def test_masked_numbers_do_not_come_in_by_their_other_way() -> None:
    with pytest.raises(InputMismatch, match="'x' is masked in parts"):
        as_arrays(np.ma.masked_less(np.array([[-1.0]]), 0), "x")


def test_a_person_is_forgotten_alone_and_at_once(make: Make) -> None:
    store = make(StoreLimits(held_back_share=0.0))
    store.add(x(1, 2), y(0, 0), at=1.0, subject="anna")
    store.add(x(3), y(0), at=2.0, subject="ben")
    revision = store.revision()
    assert store.forget("anna") == 2
    assert store.forget("anna") == 0
    assert store.forgotten() == 1
    assert store.revision() != revision
    assert dict(store.stats(3.0).subjects) == {"ben": 1}
    assert store.forget(None) == 1
    assert store.split(3.0).training.count == 0
    store.add({"x": np.zeros((1, 9), np.float32)}, y(0), at=4.0)


def test_forgotten_examples_leave_no_bytes_in_any_file(tmp_path: Path) -> None:
    store = SqliteExamples(tmp_path / "examples.sqlite")
    secret = np.frombuffer(b"ANNA'S SECRET PULSE." * 40, np.uint8)
    for _ in range(20):
        store.add({"x": secret[None]}, y(0), at=1.0, subject="anna")
        store.add({"x": np.zeros_like(secret)[None]}, y(1), at=1.0, subject="ben")
    assert any(b"SECRET PULSE" in path.read_bytes() for path in tmp_path.iterdir())
    assert store.forget("anna") == 20
    assert not any(b"SECRET PULSE" in path.read_bytes() for path in tmp_path.iterdir())
    assert store.split(2.0).training.count == 16


def test_the_file_is_private_and_survives_its_process(tmp_path: Path) -> None:
    path = tmp_path / "examples.sqlite"
    SqliteExamples(path).add(x(1, 2), y(3, 4), at=1.0)
    assert path.stat().st_mode & 0o777 == 0o600
    assert values(SqliteExamples(path, StoreLimits(held_back_share=0)).split(1.0).training) == [1, 2]


def test_a_file_that_is_no_store_is_told(tmp_path: Path) -> None:
    path = tmp_path / "examples.sqlite"
    path.write_bytes(b"something else entirely, and long enough to be looked at" * 50)
    with pytest.raises(MalformedMessage, match="example store"):
        SqliteExamples(path)


def test_one_example_more_and_a_count_read_no_example_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An app calls both in its event loop, with up to a hundred thousand examples."""
    store = SqliteExamples(tmp_path / "examples.sqlite", StoreLimits(max_examples=4, max_age_seconds=10.0))
    store.add(x(1, 2, 3), y(1, 2, 3), at=1.0, subject="anna")
    with monkeypatch.context() as patch:
        patch.setattr("umbel_client.sqlite_examples._records", lambda database: pytest.fail("they were read"))
        store.add(x(4), y(4), at=2.0)
        assert store.stats(11.0).subjects == {"anna": 3, "": 1}
    store.add(x(5), y(5), at=3.0)
    assert store.stats(3.0).subjects == {"anna": 2, "": 2}, "the oldest goes, beyond the quota"
    assert store.stats(11.5).subjects == {"": 2}, "and what is too old"


def test_a_share_of_everything_is_no_split() -> None:
    with pytest.raises(OutOfBounds):
        StoreLimits(held_back_share=1.0)


class BothStores(RuleBasedStateMachine):
    """Whatever is done to both, the store on disk and the one in memory hold the same."""

    @initialize(share=st.sampled_from([0.0, 0.2, 0.5]), most=st.integers(1, 12), age=st.sampled_from([0.0, 5.0]))
    def start(self, share: float, most: int, age: float) -> None:
        import tempfile

        limits = StoreLimits(held_back_share=share, max_examples=most, max_age_seconds=age)
        self.folder = tempfile.TemporaryDirectory()
        self.disk = SqliteExamples(Path(self.folder.name) / "e.sqlite", limits)
        self.memory = MemoryExamples(limits)
        self.limits, self.now, self.next = limits, 0.0, 0

    @rule(
        count=st.integers(1, 4),
        late=st.integers(0, 3),
        subject=st.sampled_from(["", "anna", "ben"]),
        held=st.sampled_from([None, True, False]),
    )
    def add(self, count: int, late: int, subject: str, held: bool | None) -> None:
        numbers = range(self.next, self.next + count)
        self.next += count
        for store in (self.disk, self.memory):
            store.add(x(*numbers), y(*numbers), at=self.now - late, subject=subject, held_back=held)

    @rule(seconds=st.integers(1, 4))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(subject=st.sampled_from([None, "anna", "ben", "nobody"]))
    def forget(self, subject: str | None) -> None:
        assert self.disk.forget(subject) == self.memory.forget(subject)

    @invariant()
    def hold_the_same(self) -> None:
        if not hasattr(self, "disk"):
            return
        disk, memory = self.disk.split(self.now), self.memory.split(self.now)
        assert values(disk.training) == values(memory.training)
        assert values(disk.held_back) == values(memory.held_back)
        assert disk.training.count + disk.held_back.count <= self.limits.max_examples
        assert self.disk.forgotten() == self.memory.forgotten()

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


BothStores.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
TestBothStores = BothStores.TestCase


@given(st.integers(1, 60), st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5]))
@settings(deadline=None)
def test_the_share_is_rounded_down_and_nothing_is_in_both(count: int, share: float) -> None:
    store = MemoryExamples(StoreLimits(held_back_share=share))
    store.add(x(*range(count)), y(*range(count)), at=1.0)
    split = store.split(1.0)
    assert split.held_back.count == int(count * share + 1e-9)
    assert values(split.training) + values(split.held_back) == list(range(count))


def test_a_thread_waits_for_another_ones_change_as_long_as_that_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for the 30 seconds only that SQLite waits for another process: reading a large store takes longer."""
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite_examples.sqlite3, "connect", lambda path, **rest: connect(path, **rest | {"timeout": 0}))
    store = SqliteExamples(tmp_path / "examples.db", StoreLimits(held_back_share=0.0))
    store.add(x(1), y(0), at=1.0)
    split, added = crossed(
        store, sqlite_examples, "held_back_keys", lambda: store.split(2.0), lambda: store.add(x(2), y(0), at=2.0)
    )
    assert values(split.training) == [1]
    assert added.result() == 1
    assert values(store.split(3.0).training) == [1, 2]


# Import.


def test_an_archive_is_imported_with_its_tags(tmp_path: Path, make: Make) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, x=np.arange(4, dtype=np.float32)[:, None], y=np.arange(4), held_back=np.array([0, 1, 0, 1], bool))
    store = make()
    assert import_npz(store, path, at=1.0, subject="anna") == 4
    split = store.split(1.0)
    assert (values(split.training), values(split.held_back)) == ([0, 2], [1, 3])
    assert dict(store.stats(1.0).subjects) == {"anna": 4}


def test_an_archive_is_imported_whole_or_not_at_all(tmp_path: Path, make: Make) -> None:
    store, path = make(), tmp_path / "mine.npz"
    x = np.array([[0], [1], [np.nan]], np.float32)
    np.savez(path, x=x, y=np.arange(3), held_back=np.array([0, 0, 1], bool))
    with pytest.raises(NotFinite):
        import_npz(store, path, at=1.0)
    assert store.stats(1.0).training == 0, "the rows before the wrong one"


def test_what_the_model_cannot_learn_from_is_not_imported(tmp_path: Path) -> None:
    manifest = Bundle.open(bundle_path("digits")).manifest
    store, path = MemoryExamples(), tmp_path / "mine.npz"
    for x, y, told in (
        (np.zeros((2, 64)), np.zeros(2, np.int64), "float64"),
        (np.zeros((2, 64), np.float32), np.array([0, 10]), "labels 0 to 9"),
    ):
        np.savez(path, x=x, y=y)
        with pytest.raises(InputMismatch, match=told):
            import_npz(store, path, at=1.0, manifest=manifest)
    assert store.stats(1.0).training == 0


def test_several_inputs_are_imported_by_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    arrays: dict[str, Any] = {"x/pulse": np.zeros((3, 2)), "x/motion": np.zeros((3, 4)), "y/mood": np.zeros(3)}
    np.savez(path, **arrays)
    store = MemoryExamples(StoreLimits(held_back_share=0.0))
    assert import_npz(store, path, at=1.0) == 3
    assert sorted(store.split(1.0).training.inputs) == ["motion", "pulse"]
    assert sorted(read_inputs(path)) == ["motion", "pulse"], "what was learned from can be asked about"
    np.savez(path, pulse=np.zeros((3, 2)), motion=np.zeros((3, 4)))
    assert sorted(read_inputs(path)) == ["motion", "pulse"]


def test_archives_that_are_none_are_refused(tmp_path: Path) -> None:
    store = MemoryExamples()
    with pytest.raises(NotFound):
        import_npz(store, tmp_path / "missing.npz", at=1.0)
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"PK\x03\x04 but no archive")
    for read in (read_inputs, partial(import_npz, store, at=1.0)):
        with pytest.raises(MalformedMessage):
            read(bad)
    with bad.open("wb") as file:
        np.save(file, np.zeros((2, 1)))
    with pytest.raises(MalformedMessage, match="holds one array"):
        import_npz(store, bad, at=1.0)
    np.savez(bad, x=np.zeros((2, 1)))
    with pytest.raises(MalformedMessage, match="needs `x` and `y`"):
        import_npz(store, bad, at=1.0)
    np.savez(bad, x=np.array([object()]), y=np.zeros(1))
    with pytest.raises(MalformedMessage):
        import_npz(store, bad, at=1.0)
    np.savez(bad, x=np.zeros((2, 1)), y=np.zeros(2), held_back=np.zeros(3, bool))
    with pytest.raises(InputMismatch):
        import_npz(store, bad, at=1.0)
    assert store.stats(1.0).training == 0
