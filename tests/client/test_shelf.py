"""Die at any step: the shelf holds a good slot, the old one or the new one, and what it holds is what was asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from tests.client.conftest import RUNTIME
from umbel.bundle import Bundle, file_refs
from umbel.digests import Digest, digest_of
from umbel.errors import BundleInvalid, DigestMismatch, OutOfBounds
from umbel.successor import successor
from umbel_client.files import Disk
from umbel_client.predictor import Answering
from umbel_client.shelf import Personal, Shelf, Slot, Slots
from umbel_client.slots import Reverted
from umbel_models.zoo import bundle_path

PACKAGED = Bundle.open(bundle_path("smartwatch"))


class Dies(BaseException):
    """The process is gone."""


@dataclass
class DyingDisk(Disk):
    """Dies before the step of this number (0 is the first), or lives."""

    dies_at: int = -1

    def __post_init__(self) -> None:
        self.steps: list[str] = []
        super().__init__(self._step)

    def _step(self, name: str) -> None:
        if len(self.steps) == self.dies_at:
            raise Dies
        self.steps.append(name)


def store(shelf: Shelf, factor: float) -> Digest:
    """Put a version of the packaged model on the shelf; returns its bundle."""
    weights = PACKAGED.shared_weights().scaled(factor)
    manifest, changed = successor(PACKAGED, weights, RUNTIME)
    files = {name: path.read_bytes() for name, path in PACKAGED.paths.items()} | changed
    for data in files.values():
        shelf.put(data)
    return shelf.put(manifest.to_bytes())


def slot(number: int, bundle: Digest) -> Slot:
    return Slot("smartwatch", number, number, bundle)


def replace_everything(shelf: Shelf) -> None:
    """Adopt a second version with personal weights: every durable step that an adoption takes."""
    bundle = store(shelf, 1.1)
    weights = shelf.put_personal(PACKAGED.shared_weights().scaled(1.2))
    shelf.switch(shelf.slots.adopt(slot(2, bundle), Personal(bundle, weights)))
    shelf.drop_personal()


def a_shelf_with_one_version(folder: Path) -> Slots:
    shelf = Shelf(folder)
    shelf.switch(Slots().adopt(slot(1, store(shelf, 1.0)), None))
    return shelf.slots


def test_dying_at_any_step_leaves_a_good_slot(tmp_path: Path) -> None:
    rehearsal = DyingDisk()
    a_shelf_with_one_version(tmp_path / "rehearsal")
    replace_everything(Shelf(tmp_path / "rehearsal", disk=rehearsal))
    assert len(rehearsal.steps) > 15
    for step in range(len(rehearsal.steps)):
        folder = tmp_path / str(step)
        old = a_shelf_with_one_version(folder)
        with pytest.raises(Dies):
            replace_everything(Shelf(folder, disk=DyingDisk(step)))
        after = Shelf(folder)
        assert after.slots == old or (after.slots.active is not None and after.slots.active.number == 2)
        answering = Answering(after, RUNTIME)
        assert answering.well and answering.current is not None
        replace_everything(after)
        assert after.slots.active is not None and after.slots.active.number == 2


_KILLED = """
import os, signal, sys
from pathlib import Path
from umbel_client.files import Disk
from umbel_client.shelf import Shelf, Slot
from umbel.digests import Digest
left = [int(sys.argv[3])]
def step(name):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
shelf = Shelf(Path(sys.argv[1]), disk=Disk(step))
shelf.switch(shelf.slots.adopt(Slot("smartwatch", 2, 2, Digest(sys.argv[2])), None))
"""


@pytest.mark.parametrize("step", [0, 3, 4, 5, 6])
def test_a_process_killed_while_it_switches_leaves_a_good_slot(tmp_path: Path, step: int) -> None:
    a_shelf_with_one_version(tmp_path)
    bundle = store(Shelf(tmp_path), 1.1)
    done = subprocess.run([sys.executable, "-c", _KILLED, tmp_path, bundle, str(step)], check=False)
    assert done.returncode == -signal.SIGKILL
    slots = Shelf(tmp_path).slots
    assert slots.active is not None and slots.active.number == (2 if step == 6 else 1)
    assert Answering(Shelf(tmp_path), RUNTIME).well


def test_a_damaged_bundle_falls_back_to_the_one_before(tmp_path: Path) -> None:
    a_shelf_with_one_version(tmp_path)
    shelf = Shelf(tmp_path)
    bundle = store(shelf, 1.1)
    shelf.switch(shelf.slots.adopt(slot(2, bundle), None))
    weights = shelf.bundle(bundle).paths["weights.safetensors"]
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    answering = Answering(shelf, RUNTIME)
    assert not answering.well
    assert answering.current is not None and answering.current.source == "release 1"


def test_a_bundle_that_answers_otherwise_here_falls_back_too(tmp_path: Path) -> None:
    a_shelf_with_one_version(tmp_path)
    shelf = Shelf(tmp_path)
    good = shelf.bundle(store(shelf, 1.1)).manifest
    odd = PACKAGED.shared_weights().scaled(3.0).to_bytes()
    lies = replace(good, files={**good.files, **file_refs({"weights.safetensors": odd})})
    shelf.put(odd)
    shelf.switch(shelf.slots.adopt(slot(2, shelf.put(lies.to_bytes())), None))
    answering = Answering(shelf, RUNTIME)
    assert answering.current is not None and answering.current.source == "release 1"


def test_damaged_personal_weights_fall_back_to_the_release(tmp_path: Path) -> None:
    active = a_shelf_with_one_version(tmp_path).active
    assert active is not None
    shelf = Shelf(tmp_path)
    shelf.switch(shelf.slots.adopt(active, Personal(active.bundle, digest_of(b"never came"))))
    answering = Answering(shelf, RUNTIME)
    assert answering.current is not None and answering.current.source == "release 1"


def test_personal_weights_go_with_their_slot(tmp_path: Path) -> None:
    active = a_shelf_with_one_version(tmp_path).active
    assert active is not None
    shelf = Shelf(tmp_path)
    for factor in (1.1, 1.2):
        own = shelf.put_personal(PACKAGED.shared_weights().scaled(factor))
        shelf.switch(shelf.slots.adopt(active, Personal(active.bundle, own)))
        assert [path.name for path in (tmp_path / "personal").iterdir()] == [own]
    shelf.put_personal(PACKAGED.shared_weights().scaled(1.3))
    shelf.drop_personal()
    assert list((tmp_path / "personal").iterdir()) == []


def test_adopting_keeps_the_version_before_and_adopting_again_does_not_lose_it() -> None:
    one, two = slot(1, digest_of(b"1")), slot(2, digest_of(b"2"))
    slots = Slots().adopt(one, None).adopt(two, None)
    assert (slots.active, slots.previous) == (two, one)
    assert slots.adopt(two, None).previous == one
    assert slots.revert().active == one


def test_lost_or_damaged_slots_are_an_empty_shelf(tmp_path: Path) -> None:
    a_shelf_with_one_version(tmp_path)
    for damage in (b"", b"[]", b"{}", json.dumps({"active": {"model": 1}}).encode()):
        (tmp_path / "slots.json").write_bytes(damage)
        assert Shelf(tmp_path).slots == Slots()


def test_slots_that_a_newer_version_wrote_serve_as_far_as_they_are_known(tmp_path: Path) -> None:
    """Taken for damage, they would leave nothing to answer with, and tidying would remove a person's own weights."""
    slots = replace(a_shelf_with_one_version(tmp_path), reverted=Reverted("m", 2, "e", "why"))
    tree = asdict(slots)
    for part in (tree, tree["active"], tree["reverted"]):
        part["of_a_newer_version"] = 1
    (tmp_path / "slots.json").write_text(json.dumps(tree))
    assert Shelf(tmp_path).slots == slots


def test_a_switch_by_another_process_is_seen_at_the_next_look(tmp_path: Path) -> None:
    mine, other = Shelf(tmp_path), Shelf(tmp_path)
    for number in (1, 2):
        active = slot(number, digest_of(b"%d" % number))
        other.change(lambda now, active=active: replace(now, active=active))
        assert mine.slots.active == active
    (tmp_path / "slots.json").unlink()
    assert mine.slots == Slots()


def test_bytes_that_are_not_those_asked_for_never_become_a_blob(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    digest = digest_of(b"asked for")
    shelf.part(digest).write_bytes(b"sent")
    with pytest.raises(DigestMismatch, match="fetch them again"):
        shelf.finish(digest)
    assert not shelf.holds(digest) and not shelf.part(digest).exists()


def test_a_missing_or_damaged_blob_is_told_and_removed(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    bundle = store(shelf, 1.0)
    path = shelf.bundle(bundle).paths["infer.onnx"]
    path.write_bytes(b"rotten")
    with pytest.raises(DigestMismatch, match="damaged"):
        shelf.bundle(bundle)
    assert not path.exists()
    with pytest.raises(BundleInvalid, match="isn't on this device's shelf"):
        shelf.bundle(bundle)


def test_the_limit_drops_the_least_recently_used_and_never_what_serves(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    kept = store(shelf, 1.0)
    shelf.switch(Slots().adopt(slot(1, kept), None))
    serving = sum(path.stat().st_size for path in (tmp_path / "blobs").iterdir())
    blobs = [shelf.put(bytes([number]) * 60_000) for number in range(5)]
    for age, blob in enumerate(reversed(blobs)):
        os.utime(shelf.path(blob), ns=(age, age))
    (tmp_path / "blobs" / "left-over.new").write_bytes(b"half")
    shelf = Shelf(tmp_path, limit=serving + 90_000)
    shelf.tidy()
    shelf.bundle(kept)
    assert [shelf.holds(blob) for blob in blobs] == [True, False, False, False, False]
    assert not (tmp_path / "blobs" / "left-over.new").exists()


def test_a_bundle_larger_than_the_shelf_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(OutOfBounds, match="limited to 1000"):
        Shelf(tmp_path, limit=1000).require_room(1001)
