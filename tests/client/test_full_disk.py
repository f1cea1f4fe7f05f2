"""A disk that is full ends a visit, never the device: the reason is told, and the visit after it goes on."""

from __future__ import annotations

import ctypes
import errno
import io
import os
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.client.conftest import Bench
from tests.client.recordings import recordings
from umbel.errors import Unavailable
from umbel.plan import Plan
from umbel.visit import Outcome
from umbel_client.agent import Agent
from umbel_client.cli import main
from umbel_client.commands import _if_it_can, _tell_json
from umbel_client.files import Disk
from umbel_client.slots import Reverted
from umbel_client.sqlite_examples import SqliteExamples
from umbel_client.visits import Ending, Visit


class Small(Disk):
    """A disk that takes so many more steps before it is full."""

    def __init__(self, room: int) -> None:
        super().__init__(self._step)
        self.room = room

    def _step(self, step: str) -> None:
        if step.startswith("write"):
            self.room -= 1
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device", step.removeprefix("write "))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Take away the right to write in a folder; from root too, in this thread, where Linux says what root may."""
    libc, header, may = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, may) == 0
    modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
    for path, mode in modes.items():
        path.chmod(mode & 0o7555)
    before, may[0] = may[0], may[0] & ~0b110  # without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    assert libc.capset(header, may) == 0
    try:
        yield
    finally:
        may[0] = before
        assert libc.capset(header, may) == 0
        for path, mode in modes.items():
            path.chmod(mode)


async def test_a_device_whose_disk_takes_nothing_answers_and_says_that_it_learns_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.coordinator.publish()
    await bench.device_with_examples(5).wake()

    def refused(path: Path, times: object = None) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "utime", refused)  # which the owner of a file may on every disk that takes anything
    with read_only(bench.home):
        device = bench.open()
        assert device.predict(recordings(2)[0])["logits"].shape == (2, 7)
        with pytest.raises(Unavailable, match=r"examples\.sqlite.*nothing was changed"):
            device.learn_from(*recordings(2))
        visit = await device.wake()
        assert (visit.ending, type(visit.error)) == (Ending.FAILED, Unavailable), visit.error
        Agent(device, lambda visit: None).write_status()
        device.rest()
    monkeypatch.undo()
    device.learn_from(*recordings(2))
    assert device.kit.examples.stats(0.0).training == 6
    assert (await device.wake()).ending is Ending.RESTED


@pytest.mark.parametrize("room", range(0, 12, 2))
async def test_a_visit_on_a_full_disk_fails_in_words_and_the_next_goes_on(bench: Bench, room: int) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [Plan()]
    disk = Small(room)
    device = bench.device_with_examples(disk=disk)
    visit = await device.wake()
    assert visit.ending is Ending.FAILED
    assert isinstance(visit.error, Unavailable) and "No space left on device" in str(visit.error)
    assert visit.next_wake > bench.clock.now()
    assert not list(bench.home.rglob("*.new"))
    Agent(device, lambda visit: None).write_status()
    disk.room, bench.coordinator.tasks = 10_000, [Plan()]
    bench.clock.instant = visit.next_wake
    again = await device.wake()
    assert again.ending is Ending.CONTRIBUTED, again.error
    bench.clock.instant = again.next_wake
    await device.wake()
    assert bench.open().answers_with, "the release comes with the next question, and is on disk"


async def test_a_release_that_was_given_up_is_told_of_once_the_disk_takes_the_note(bench: Bench) -> None:
    """The mark that it was told may only be set when the note stands on the disk: a process may end in between."""

    class NoNotes(Disk):
        def __init__(self) -> None:
            super().__init__(self._step)
            self.is_full = True

        def _step(self, step: str) -> None:
            if self.is_full and step == "write state.json":
                raise OSError(errno.ENOSPC, "No space left on device", "state.json")

    disk = NoNotes()
    device = bench.device_with_examples(disk=disk)
    given_up = Reverted("watch", 7, "", "it crashed")
    device._kit.shelf.change(lambda slots: replace(slots, reverted=given_up))
    bench.coordinator.tasks = []
    await device.wake()
    assert device._kit.shelf.slots.reverted == given_up
    disk.is_full = False
    bench.clock.instant += 10_000
    await device.wake()
    (told,) = bench.coordinator.check_ins[-1].outcomes
    assert (told.number, told.outcome) == (7, Outcome.REVERTED)
    assert device._kit.shelf.slots.reverted is None


def test_examples_on_a_full_disk_may_come_again_later_and_none_is_kept(tmp_path: Path) -> None:
    store = SqliteExamples(tmp_path / "examples.sqlite")
    store.add({"x": np.zeros((2, 3))}, {"y": np.zeros(2)}, at=1.0)
    connect = sqlite3.connect

    def full(*arguments: object, **options: object) -> sqlite3.Connection:
        database = connect(*arguments, **options)  # type: ignore[call-overload]
        pages = database.execute("PRAGMA page_count").fetchone()[0]
        database.execute(f"PRAGMA max_page_count = {pages + 1}")
        return database

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite3, "connect", full)
        with pytest.raises(Unavailable, match="full; nothing was changed, try again"):
            store.add({"x": np.zeros((500, 3))}, {"y": np.zeros(500)}, at=2.0)
    assert store.stats(3.0).training + store.stats(3.0).held_back == 2


def test_a_home_that_is_none_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "home" / "examples.sqlite").mkdir(parents=True)
    np.savez(tmp_path / "mine.npz", x=recordings(2)[0], y=recordings(2)[1])
    for words in (
        ("--home", str(tmp_path / "file"), "status"),
        ("--home", str(tmp_path / "file" / "inside"), "examples", "stats"),
        ("--home", str(tmp_path / "home"), "examples", "import", str(tmp_path / "mine.npz")),
    ):
        assert main(list(words)) == 1
        err = capsys.readouterr().err
        assert (err.startswith("umbel-device: "), err.count("\n"), "can't" in err) == (True, 1, True), err


def test_a_code_that_is_no_text_or_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(b"\xea\xff")
    for file, says in (("file", "isn't text"), ("missing", "No such file")):
        assert main(["--home", str(tmp_path / "home"), "enrol", "--code", f"@{tmp_path / file}"]) == 1
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("words", ["run --once", "why", "status", "predict x.npy", "examples forget --all"])
def test_a_home_that_was_mistyped_is_not_made(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--home", str(tmp_path / "hoem"), *words.split()]) == 1
    assert "isn't enrolled" in capsys.readouterr().err
    assert not (tmp_path / "hoem").exists()


@pytest.mark.parametrize("target", ["elsewhere", "nowhere"])
def test_a_link_planted_where_a_file_will_be_written_leads_nowhere(target: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("another's")
    (tmp_path / "identity.json.new").symlink_to(tmp_path / target)
    Disk().write(tmp_path / "identity.json", b"a key")
    assert (tmp_path / "identity.json").read_bytes() == b"a key" and not (tmp_path / "identity.json").is_symlink()
    assert (tmp_path / "elsewhere").read_text() == "another's" and not (tmp_path / "nowhere").exists()


def test_a_leftover_that_others_could_read_lends_its_mode_to_no_key(tmp_path: Path) -> None:
    (tmp_path / "identity.json.new").write_bytes(b"half a k")
    (tmp_path / "identity.json.new").chmod(0o666)
    Disk().write(tmp_path / "identity.json", b"a key")
    assert (tmp_path / "identity.json").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("number", "ends"), [(errno.ENOSPC, False), (errno.EPIPE, True)])
def test_an_agents_log_on_a_full_disk_does_not_end_it(number: int, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(sys, "stdout", Full())
    tell = _if_it_can(_tell_json)
    with pytest.raises(BrokenPipeError) if ends else nullcontext():
        tell(Visit(Ending.RESTED, 1.0, 2.0))
