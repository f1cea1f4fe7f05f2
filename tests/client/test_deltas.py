"""A device takes the shorter way when it leads to the very file that is signed, and the whole file otherwise."""

from __future__ import annotations

import io
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zstandard

from tests.client.conftest import Bench
from tests.client.coordinator import retuned
from tests.client.test_shelf import Dies, DyingDisk
from umbel.bundle import Bundle
from umbel.delta import MAGIC, XOR, Ends, segment, write_delta, write_lossless, xored
from umbel.digests import Digest, digest_of
from umbel.errors import Unreachable
from umbel.file_delta import FileDelta, file_delta_to_message
from umbel.manifest import WEIGHTS_FILE, FileRef, Manifest
from umbel.plan import Plan
from umbel.release import SignedRelease
from umbel.v1 import device_pb2 as pb
from umbel_client import Device, Ending, PersonalSettings
from umbel_client.shelf import Shelf
from umbel_models.zoo import bundle_path

PACKAGED = Bundle.open(bundle_path("smartwatch"))
OLD = PACKAGED.paths[WEIGHTS_FILE].read_bytes()
PERSONAL = PersonalSettings(epochs=0)


def lossless(base: bytes, target: bytes) -> bytes:
    out = io.BytesIO()
    write_lossless(Ends(digest_of(base), digest_of(target), len(target)), io.BytesIO(base), io.BytesIO(target), out)
    return out.getvalue()


def weights_of(bench: Bench) -> bytes:
    """The weights file of the newest release."""
    newest = list(bench.coordinator.bases)[-1]
    manifest = Manifest.from_bytes(bench.coordinator.blobs[newest])
    return bench.coordinator.blobs[manifest.files[WEIGHTS_FILE].digest]


@dataclass
class Hints:
    """Makes a coordinator hint at a delta, whatever its bytes are."""

    bench: Bench
    delta: bytes = b""
    base: bytes = OLD
    fetched: list[Digest] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_in, read = self.bench.coordinator.check_in, self.bench.coordinator.read

        def hinting(message: pb.CheckInRequest) -> pb.CheckInResponse:
            answer = check_in(message)
            if self.delta:
                answer.deltas.append(file_delta_to_message(self.hint))
            return answer

        def noting(digest: str, offset: int) -> bytes:
            self.fetched.append(Digest(digest))
            return read(digest, offset)

        self.bench.coordinator.check_in = hinting  # type: ignore[method-assign]
        self.bench.coordinator.read = noting  # type: ignore[method-assign]

    @property
    def target(self) -> bytes:
        return weights_of(self.bench)

    @property
    def hint(self) -> FileDelta:
        return FileDelta(digest_of(self.base), digest_of(self.target), digest_of(self.delta), len(self.delta))

    def offer(self, delta: bytes, *, keep: bool = True) -> None:
        self.delta = delta
        if keep:
            self.bench.coordinator.blobs[digest_of(delta)] = delta
        self.fetched.clear()


@pytest.fixture
async def moved(bench: Bench) -> tuple[Device, Hints]:
    """A device with release 1, and a coordinator with release 2."""
    bench.coordinator.publish()
    device = bench.open(personal=PERSONAL)
    await device.wake()
    bench.coordinator.publish(retuned(PACKAGED.shared_weights(), 1.0001))
    return device, Hints(bench)


def leftovers(device: Device, hints: Hints) -> list[str]:
    """What no bundle needs and lies on the shelf all the same."""
    shelf = device.kit.shelf.path(Digest("0" * 64)).parent
    known = {ref.digest for bundle in hints.bench.coordinator.bases for ref in
             Manifest.from_bytes(hints.bench.coordinator.blobs[bundle]).files.values()}  # fmt: skip
    return [path.name for path in shelf.iterdir() if path.name not in known | set(hints.bench.coordinator.bases)]


async def test_a_device_rebuilds_what_it_can_and_never_fetches_the_whole(moved: tuple[Device, Hints]) -> None:
    device, hints = moved
    hints.offer(lossless(OLD, hints.target))
    await device.wake()
    assert device.answers_with == "release 2"
    assert digest_of(hints.target) not in hints.fetched
    assert digest_of(hints.delta) in hints.fetched
    fetched = device.kit.memory.state.fetched
    assert fetched.deltas == 1
    assert fetched.spared_by_deltas == len(hints.target) - len(hints.delta)
    assert leftovers(device, hints) == []


def only_work(bench: Bench, base: SignedRelease, after: Callable[[], None] = lambda: None) -> None:
    """Let the next check-ins bring a round that starts from `base`, and no release."""
    answer, stable = bench.coordinator.check_in, bench.coordinator.newest

    def work(message: pb.CheckInRequest) -> pb.CheckInResponse:
        bench.coordinator.newest = base
        found = answer(message)
        found.ClearField("newest")
        bench.coordinator.newest = stable
        after()
        return found

    bench.coordinator.check_in = work  # type: ignore[method-assign]
    bench.coordinator.tasks = [Plan(epochs=1)]


async def test_a_device_tells_which_bundles_it_could_start_from(bench: Bench) -> None:
    bench.coordinator.publish()
    device = bench.device_with_examples(personal=PERSONAL)
    await device.wake()
    only_work(bench, bench.coordinator.publish(retuned(PACKAGED.shared_weights(), 1.01), channel="training"))
    assert (await device.wake()).ending is Ending.CONTRIBUTED
    await bench.open(personal=PERSONAL).wake()
    # What serves, and what training started from: also after a start of the process.
    assert set(bench.coordinator.check_ins[-1].held_bundles) == set(bench.coordinator.bases)


async def test_the_base_of_a_round_is_rebuilt_too_even_after_a_start_in_between(bench: Bench) -> None:
    bench.coordinator.publish()
    device = bench.device_with_examples(personal=PERSONAL)
    await device.wake()
    hints = Hints(bench)
    base = bench.coordinator.publish(retuned(PACKAGED.shared_weights(), 1.0001), channel="training")
    hints.offer(lossless(OLD, hints.target))
    only_work(bench, base, after=lambda: setattr(bench.channel, "down", Unreachable("right after the check-in")))
    assert isinstance((await device.wake()).error, Unreachable)
    bench.channel.down = None
    visit = await bench.open(personal=PERSONAL).wake()
    assert visit.ending is Ending.CONTRIBUTED
    assert digest_of(hints.target) not in hints.fetched
    assert digest_of(hints.delta) in hints.fetched


# Every way in which a delta can be wrong ends with the whole file, and the right one.


def of_other_content(base: bytes, target: bytes) -> bytes:
    out, other = io.BytesIO(), bytes(reversed(target))
    payload = segment(XOR, len(base)) + xored(base, other)[: len(base)]
    write_delta(Ends(digest_of(base), digest_of(target), len(target)), [payload], len(payload), out)
    return out.getvalue()[: int(len(target) * 0.69)]


def bomb(base: bytes, target: bytes) -> bytes:
    compress = zstandard.ZstdCompressor().compressobj()
    packed = b"".join(compress.compress(bytes(1 << 20)) for _ in range(200)) + compress.flush()
    ends = (bytes.fromhex(digest_of(base)), bytes.fromhex(digest_of(target)))
    return struct.pack("<16s32s32sQQ", MAGIC, *ends, len(target), len(target)) + packed


WRONG: dict[str, Callable[[bytes, bytes], bytes]] = {
    "against another base": lambda base, target: lossless(target, target),
    "to another file": lambda base, target: lossless(base, base),
    "yields other content": of_other_content,
    "truncated": lambda base, target: lossless(base, target)[:-20],
    "tampered": lambda base, target: lossless(base, target)[:200] + b"?" + lossless(base, target)[201:],
    "decompression bomb": bomb,
    "no delta at all": lambda base, target: b"hello",
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_delta_costs_its_bytes_and_nothing_else(moved: tuple[Device, Hints], wrong: str) -> None:
    device, hints = moved
    hints.offer(WRONG[wrong](OLD, hints.target))
    await device.wake()
    assert digest_of(hints.delta) in hints.fetched
    assert digest_of(hints.target) in hints.fetched, "then fetched whole"
    assert device.answers_with == "release 2"
    assert device.kit.memory.state.fetched.deltas == 0
    assert leftovers(device, hints) == []


async def test_a_delta_that_saves_too_little_is_not_even_fetched(moved: tuple[Device, Hints]) -> None:
    device, hints = moved
    hints.offer(bytes(len(hints.target) * 7 // 10 + 1))
    await device.wake()
    assert digest_of(hints.delta) not in hints.fetched
    assert device.answers_with == "release 2"


async def test_more_bytes_than_a_hint_said_are_not_taken(moved: tuple[Device, Hints]) -> None:
    device, hints = moved
    hints.offer(lossless(OLD, hints.target))
    bench, name = hints.bench, digest_of(hints.delta)
    bench.channel.tamper = lambda digest, data: data + bytes(1 << 20) if digest == name else data
    before = bench.channel.traffic.down
    await device.wake()
    assert device.answers_with == "release 2"
    # The delta, one chunk too many of it, then the whole file and the rest of the bundle.
    assert bench.channel.traffic.down - before < len(hints.delta) + len(hints.target) + 60_000


async def test_a_delta_that_is_gone_over_there_is_done_without(moved: tuple[Device, Hints]) -> None:
    device, hints = moved
    hints.offer(lossless(OLD, hints.target), keep=False)
    await device.wake()
    assert device.answers_with == "release 2"


async def test_a_missing_base_is_done_without(moved: tuple[Device, Hints]) -> None:
    device, hints = moved
    hints.base = b"never was here" * 4000
    hints.offer(lossless(hints.target, hints.target))
    await device.wake()
    assert digest_of(hints.delta) not in hints.fetched
    assert device.answers_with == "release 2"


async def test_a_base_that_rotted_on_the_shelf_is_done_without(moved: tuple[Device, Hints]) -> None:
    device, hints = moved
    hints.offer(lossless(OLD, hints.target))
    device.kit.shelf.path(digest_of(OLD)).write_bytes(OLD[:-1] + b"\1")
    await device.wake()
    assert device.answers_with == "release 2"
    assert digest_of(hints.target) in hints.fetched


async def test_a_base_of_another_shape_is_done_without(moved: tuple[Device, Hints]) -> None:
    device, hints = moved
    hints.offer(lossless(OLD, hints.target))
    device.kit.shelf.path(digest_of(OLD)).write_bytes(OLD[:-400])
    await device.wake()
    assert device.answers_with == "release 2"


async def test_a_broken_stream_of_a_delta_goes_on_where_it_broke(moved: tuple[Device, Hints]) -> None:
    device, hints = moved
    hints.offer(lossless(OLD, hints.target))
    bench, name = hints.bench, digest_of(hints.delta)
    bench.channel.tamper = lambda digest, data: data[:5000] if digest == name else data
    assert isinstance((await device.wake()).error, Unreachable)
    assert device.kit.shelf.part(name).stat().st_size == 5000
    before = device.kit.memory.state.fetched.bytes
    bench.channel.tamper = lambda digest, data: data
    await bench.open(personal=PERSONAL).wake()
    again = bench.open(personal=PERSONAL)
    assert again.answers_with == "release 2"
    assert digest_of(hints.target) not in hints.fetched
    assert again.kit.memory.state.fetched.bytes - before == len(hints.delta) - 5000


async def test_a_whole_file_that_is_almost_here_is_finished_rather_than_rebuilt(moved: tuple[Device, Hints]) -> None:
    device, hints = moved
    hints.offer(lossless(OLD, hints.target))
    device.kit.shelf.part(digest_of(hints.target)).write_bytes(hints.target[:-100])
    await device.wake()
    assert digest_of(hints.delta) not in hints.fetched
    assert device.answers_with == "release 2"


# Crashes.


def test_dying_at_any_step_of_rebuilding_leaves_the_base_and_is_made_good(tmp_path: Path) -> None:
    target = retuned(PACKAGED.weights(), 1.0001).to_bytes()
    delta, ref = lossless(OLD, target), FileRef(digest_of(target), len(target))
    hint = FileDelta(digest_of(OLD), ref.digest, digest_of(delta), len(delta))

    def a_shelf(name: str, disk: DyingDisk) -> Shelf:
        for data in (OLD, delta):
            Shelf(tmp_path / name).put(data)
        return Shelf(tmp_path / name, disk=disk)

    rehearsal = DyingDisk()
    _rebuild_and_drop(a_shelf("rehearsal", rehearsal), hint, ref)
    assert len(rehearsal.steps) == 3
    for step in range(len(rehearsal.steps)):
        with pytest.raises(Dies):
            _rebuild_and_drop(a_shelf(str(step), DyingDisk(step)), hint, ref)
        shelf = Shelf(tmp_path / str(step))
        if not shelf.holds(ref.digest):
            shelf.rebuild(hint, ref)
        shelf.drop(hint.digest)
        shelf.tidy()
        assert shelf.path(ref.digest).read_bytes() == target
        assert {path.name for path in (tmp_path / str(step) / "blobs").iterdir()} == {digest_of(OLD), ref.digest}


def _rebuild_and_drop(shelf: Shelf, hint: FileDelta, ref: FileRef) -> None:
    shelf.rebuild(hint, ref)
    shelf.drop(hint.digest)


_KILLED = """
import os, signal, sys
from pathlib import Path
from umbel.digests import Digest
from umbel.file_delta import FileDelta
from umbel.manifest import FileRef
from umbel_client.shelf import Shelf
import umbel.delta
base, target, delta, size = sys.argv[2:]
block = umbel.delta._unshuffled
def killed(data):
    os.kill(os.getpid(), signal.SIGKILL)
umbel.delta._unshuffled = killed
hint = FileDelta(Digest(base), Digest(target), Digest(delta), 1)
Shelf(Path(sys.argv[1])).rebuild(hint, FileRef(Digest(target), int(size)))
"""


def test_a_process_killed_while_it_rebuilds_leaves_nothing_under_the_files_name(tmp_path: Path) -> None:
    target = retuned(PACKAGED.weights(), 1.0001).to_bytes()
    shelf = Shelf(tmp_path)
    base, delta = shelf.put(OLD), shelf.put(lossless(OLD, target))
    command = [sys.executable, "-c", _KILLED, str(tmp_path), base, digest_of(target), delta, str(len(target))]
    assert subprocess.run(command, check=False, env=dict(os.environ)).returncode == -signal.SIGKILL
    assert not Shelf(tmp_path).holds(digest_of(target))
    assert not Shelf(tmp_path).part(digest_of(target)).exists(), "or a later fetch would go on from it"
    _rebuild_and_drop(shelf, FileDelta(base, digest_of(target), delta, 1), FileRef(digest_of(target), len(target)))
    assert shelf.holds(digest_of(target))
