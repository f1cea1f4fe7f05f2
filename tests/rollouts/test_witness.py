"""What was witnessed can't be undone: a planted edit, deletion, cut and rewriting are each found."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from tests.databases import new_sqlite
from umbel.errors import BadInput, DigestMismatch, MalformedMessage, SignatureInvalid
from umbel_server import audit, checkpoints
from umbel_server.audit import GENESIS, AuditRow
from umbel_server.audit_copy import check_copy
from umbel_server.checkpoints import (
    Checkpoint,
    MerkleTree,
    Witness,
    key_from_text,
    key_to_text,
    open_note,
    require_witnessed,
    sign,
)
from umbel_server.store import Store
from umbel_server.tables import AUDIT

KEY = Ed25519PrivateKey.generate()
PUBLIC = KEY.public_key().public_bytes_raw()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(new_sqlite(tmp_path / "umbel.db"))
    yield opened
    opened.close()


@pytest.fixture
def witness(tmp_path: Path) -> Witness:
    return Witness(KEY, tmp_path / "elsewhere" / "checkpoints.txt")


def act(store: Store, count: int) -> None:
    with store.transaction() as connection:
        for index in range(count):
            audit.append(connection, 1.0 + index, "operator:ada", "rollout.paused", f"r{index}", {"n": index})


def test_of_a_log_without_a_row_there_is_nothing_to_witness(store: Store, witness: Witness) -> None:
    assert witness.take(store, 1.0) is None
    assert witness.notes() == [] and witness.verify(store) == 0


def test_an_untouched_log_is_intact_and_grows(store: Store, witness: Witness) -> None:
    for size in (3, 4, 9):
        act(store, 3)
        assert witness.take(store, float(size)) is not None
        assert witness.take(store, float(size)) is None, "nothing has happened since"
    assert witness.verify(store) == 9
    assert len(witness.notes()) == 3


def test_an_edit_is_found(store: Store, witness: Witness) -> None:
    act(store, 5)
    witness.take(store, 1.0)
    with store.transaction() as connection:
        connection.execute(AUDIT.update().where(AUDIT.c.sequence == 3).values(actor="operator:nobody"))
    with pytest.raises(DigestMismatch, match="row 3"):
        witness.verify(store)


def test_a_deletion_is_found(store: Store, witness: Witness) -> None:
    act(store, 5)
    with store.transaction() as connection:
        connection.execute(AUDIT.delete().where(AUDIT.c.sequence == 3))
    with pytest.raises(DigestMismatch, match="row 3"):
        witness.verify(store)


def test_a_cut_at_the_end_is_found_only_by_a_witness(store: Store, witness: Witness) -> None:
    act(store, 5)
    witness.take(store, 1.0)
    with store.transaction() as connection:
        connection.execute(AUDIT.delete().where(AUDIT.c.sequence > 3))
        assert audit.verify(connection) == 3, "the chain alone can't tell"
    with pytest.raises(DigestMismatch, match="cut it off"):
        witness.verify(store)


def test_a_consistent_rewriting_is_found_only_by_a_witness(store: Store, witness: Witness) -> None:
    act(store, 5)
    witness.take(store, 1.0)
    with store.transaction() as connection:
        rows = [AuditRow(**row) for row in connection.execute(sa.select(AUDIT).order_by(AUDIT.c.sequence)).mappings()]
        connection.execute(AUDIT.delete())
        previous = GENESIS
        for row in rows:
            actor = "operator:nobody" if row.sequence == 2 else row.actor
            forged = AuditRow(
                row.sequence, row.at, actor, row.action, row.object, row.request_id, row.body_json, previous, ""
            )
            previous = forged.expected_hash()
            values = {column: getattr(forged, column) for column in AUDIT.columns.keys()}  # noqa: SIM118
            connection.execute(AUDIT.insert().values(values | {"hash": previous}))
        assert audit.verify(connection) == 5, "the chain alone can't tell"
    with pytest.raises(DigestMismatch, match="wrote them anew"):
        witness.verify(store)


def test_a_witness_that_starts_again_goes_on_from_its_file(store: Store, witness: Witness, tmp_path: Path) -> None:
    act(store, 2)
    witness.take(store, 1.0)
    again = Witness(KEY, tmp_path / "elsewhere" / "checkpoints.txt")
    assert again.newest == witness.newest
    assert again.take(store, 2.0) is None


@pytest.mark.parametrize("written", [0.0, 0.3, 0.99])
def test_a_note_that_was_cut_off_as_it_was_written_costs_nothing_but_itself(
    store: Store, witness: Witness, tmp_path: Path, written: float
) -> None:
    file = tmp_path / "elsewhere" / "checkpoints.txt"
    act(store, 2)
    first = witness.take(store, 1.0)
    act(store, 3)
    whole, second = file.read_bytes(), sign(Checkpoint(4, b"\1" * 32), KEY) + "\n\n"
    file.write_bytes(whole + second.encode()[: int(written * len(second.encode()))])
    again = Witness(KEY, file)
    assert again.newest == first
    third = again.take(store, 3.0)
    assert third is not None and third.size == 5
    assert file.read_bytes().startswith(whole) and len(again.notes()) == 2
    assert Witness(KEY, file).verify(store) == 5


def test_a_disk_that_is_full_as_a_note_is_written_stops_no_later_one(
    store: Store, witness: Witness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    act(store, 2)
    witness.take(store, 1.0)
    act(store, 3)

    def full(descriptor: int) -> None:
        os.truncate(descriptor, os.fstat(descriptor).st_size - 40)
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as disk, pytest.raises(OSError, match="no space"):
        disk.setattr(os, "fsync", full)
        witness.take(store, 2.0)
    assert witness.take(store, 3.0) is not None
    assert len(witness.notes()) == 2
    assert Witness(KEY, tmp_path / "elsewhere" / "checkpoints.txt").verify(store) == 5


def test_a_key_that_was_mistyped_is_none() -> None:
    text = key_to_text(PUBLIC)
    assert key_from_text(text) == PUBLIC
    origin, found, data = text.split("+", 2)
    for wrong in (f"other+{found}+{data}", f"{origin}+{found[::-1]}+{data}", f"{origin}+{found}+{data[:-8]}", "", "+"):
        with pytest.raises(MalformedMessage):
            key_from_text(wrong)


def test_checkpoints_without_their_key_prove_nothing() -> None:
    with pytest.raises(BadInput, match="--key"):
        check_copy("", sign(Checkpoint(3, b"\1" * 32), KEY), "")


def test_a_note_of_another_key_or_a_changed_one_is_refused() -> None:
    note = sign(Checkpoint(3, b"\1" * 32), KEY)
    assert open_note(note, PUBLIC) == Checkpoint(3, b"\1" * 32)
    with pytest.raises(SignatureInvalid):
        open_note(note, Ed25519PrivateKey.generate().public_key().public_bytes_raw())
    with pytest.raises(SignatureInvalid):
        open_note(note.replace("\n3\n", "\n4\n", 1), PUBLIC)
    for broken in ("", "umbel/audit\n3\n", note.replace("umbel", "other", 1), note[:40]):
        with pytest.raises((MalformedMessage, SignatureInvalid)):
            open_note(broken, PUBLIC)


def _by_the_book(leaves: list[bytes]) -> bytes:
    """RFC 6962, 2.1, word for word: split at the largest power of two below the length."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    split = 1
    while split * 2 < len(leaves):
        split *= 2
    return hashlib.sha256(b"\1" + _by_the_book(leaves[:split]) + _by_the_book(leaves[split:])).digest()


@given(st.lists(st.binary(max_size=4), max_size=40))
def test_a_root_is_that_of_the_rfc(leaves: list[bytes]) -> None:
    tree, before = MerkleTree(), list[bytes]()
    for leaf in leaves:
        assert tree.root == _by_the_book(before), "at each size on the way"
        tree.add(leaf)
        before.append(leaf)
    assert (tree.root, tree.size) == (_by_the_book(leaves), len(leaves))


def test_the_root_of_a_known_log() -> None:
    """The test vectors that certificate transparency's implementations share: seven leaves."""
    leaves = [bytes.fromhex(text) for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657")]
    tree = MerkleTree()
    for leaf in leaves:
        tree.add(leaf)
    assert tree.root.hex() == "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c"


def test_a_year_of_checkpoints_is_held_against_the_log_in_one_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred thousand notes of a log must not each begin at its first row: that took hours."""
    leaves, tree, notes = [bytes([row % 251]) for row in range(500)], MerkleTree(), list[Checkpoint]()
    for leaf in leaves:
        tree.add(leaf)
        notes.append(Checkpoint(tree.size, tree.root))
    joined = 0

    def counted(left: bytes, right: bytes) -> bytes:
        nonlocal joined
        joined += 1
        return hashlib.sha256(b"\1" + left + right).digest()

    monkeypatch.setattr(checkpoints, "_parent", counted)
    require_witnessed(leaves, notes)
    assert joined < 500 * 10
    with pytest.raises(DigestMismatch, match="the first 251 audit rows"):
        require_witnessed([*leaves[:250], b"other", *leaves[251:]], notes)


def test_checkpoints_go_on_where_the_log_was_after_a_restart(store: Store, witness: Witness, tmp_path: Path) -> None:
    act(store, 5)
    witness.take(store, 1.0)
    again = Witness(KEY, tmp_path / "elsewhere" / "checkpoints.txt")
    for _ in range(3):
        act(store, 2)
        assert again.take(store, 2.0) is not None
    assert again.verify(store) == 11
