"""What the helper keeps: whole under threads, private on the disk, and gone once it is deleted."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.private.parties import NOW, TASK, Party
from umbel.errors import CohortTooSmall, NotAllowed, WrongState
from umbel.plan import Kind
from umbel_server.helper.records import Records
from umbel_server.store import Store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One that others may look into, as an operator may have made it beforehand."""
    tmp_path.chmod(0o755)
    return tmp_path


def _files_with(folder: Path, secret: bytes) -> list[str]:
    return [path.name for path in folder.iterdir() if secret in path.read_bytes()]


def test_no_file_holds_a_rounds_key_once_the_round_is_summed(folder: Path) -> None:
    party = Party(records=Records(folder / "helper.db"))
    devices, cohort = party.devices(4), party.open()
    held = party.records.round(TASK, 1, Kind.TRAIN)
    assert held is not None and held.private_key is not None
    cohort.fill(devices)
    assert _files_with(folder, held.private_key)  # it must be kept until then: a restarted helper needs it
    cohort.sum.close()
    assert _files_with(folder, held.private_key) == []


def test_no_file_holds_the_key_of_a_round_that_expired(folder: Path) -> None:
    party = Party(records=Records(folder / "helper.db"))
    party.open()
    held = party.records.round(TASK, 1, Kind.TRAIN)
    assert held is not None and held.private_key is not None
    party.clock.instant += 7200.0
    party.helper.sweep()
    assert _files_with(folder, held.private_key) == []


def test_old_sums_count_on_against_a_devices_cap_and_take_a_row_a_task(folder: Path) -> None:
    """One row a sum and device was kept for ever, with the time of each."""
    party = Party({"max_reports_per_task": 4}, records=Records(folder / "helper.db"))
    people = party.devices(4)
    for number in range(1, 5):
        cohort = party.open(number=number)
        cohort.fill(people)
        cohort.sum.close()
        party.clock.instant += 49 * 3600.0
        party.helper.sweep()
    assert [party.records.lately(one.certificate.public_key, 0.0) for one in people] == [0] * 4
    assert [party.records.participations(one.certificate.public_key, TASK) for one in people] == [4] * 4
    fifth = party.open(number=5)
    fifth.fill(people)
    with pytest.raises(CohortTooSmall, match=NotAllowed.code):
        fifth.sum.close()


def test_no_file_holds_a_key_after_a_restart_of_a_helper_that_died_before_it_emptied_the_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    party = Party(records=Records(folder / "helper.db"))
    devices, cohort = party.devices(4), party.open()
    held = party.records.round(TASK, 1, Kind.TRAIN)
    assert held is not None and held.private_key is not None
    cohort.fill(devices)
    with monkeypatch.context() as patched:
        patched.setattr(Records, "_forget_log", lambda self: None)
        cohort.sum.close()
    assert _files_with(folder, held.private_key)
    # What a death would have left: a copy of the files as they are, of which nobody has taken leave.
    left = folder / "left"
    left.mkdir()
    for path in folder.glob("helper.db*"):
        (left / path.name).write_bytes(path.read_bytes())
    restarted = Records(left / "helper.db")  # kept: a database that is let go takes files away while they are read
    assert _files_with(left, held.private_key) == []
    restarted.close()


@pytest.mark.parametrize("make", [Records, lambda path: Store.open(f"sqlite:///{path}")])
def test_a_database_is_private_in_a_folder_that_is_not(make: Callable[[Path], Records | Store], folder: Path) -> None:
    store = make(folder / "kept.db")
    names = {path.name for path in folder.iterdir()}
    assert names >= {"kept.db", "kept.db-wal"}
    assert [path.name for path in folder.iterdir() if path.stat().st_mode & 0o077] == []
    store.close()


def test_a_database_that_others_could_read_is_closed_to_them(folder: Path) -> None:
    Records(folder / "helper.db").close()
    (folder / "helper.db").chmod(0o644)
    Records(folder / "helper.db").close()
    assert (folder / "helper.db").stat().st_mode & 0o777 == 0o600


def test_a_store_of_a_newer_version_is_refused_and_an_older_ones_opens(folder: Path) -> None:
    """An older helper would count a device's sums by tables that the newer one keeps otherwise."""
    Records(folder / "helper.db").close()
    for version, opens in ((0, True), (99, False)):
        with closing(sqlite3.connect(folder / "helper.db")) as database:
            database.execute(f"PRAGMA user_version = {version}")
        if opens:
            Records(folder / "helper.db").close()
        else:
            with pytest.raises(WrongState, match="newer version of Umbel"):
                Records(folder / "helper.db")
    with closing(sqlite3.connect(folder / "helper.db")) as database:
        assert database.execute("PRAGMA user_version").fetchone() == (99,), "a refusal changes nothing"


def test_devices_that_enrol_while_a_round_is_summed_disturb_neither() -> None:
    party, failed = Party(), list[Exception]()

    def often(step: Callable[[int], object]) -> None:
        try:
            for number in range(150):
                step(number)
        except Exception as error:  # noqa: BLE001 - told below, in the thread that asks
            failed.append(error)

    def commit(number: int) -> None:
        people = [bytes([number]) * 32] * 100
        party.records.commit(bytes(32), TASK, b"", b"", b"", [bytes([number]) * 16], people, NOW)

    threads = [threading.Thread(target=often, args=(step,)) for step in (lambda number: party.device(), commit)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert party.records.counts()["participants"] == 150
    assert [party.records.lately(bytes([number]) * 32, 0.0) for number in range(150)] == [100] * 150
