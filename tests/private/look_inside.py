"""`python -m tests.private.look_inside`: all that a real leader and a real helper hold while a round is open, searched.

A coordinator and a helper run as processes of their own; six devices, whose secrets this script knows, report to them.
It reads every file and all of the memory of either process and looks for any piece of any device's update, masks and
seeds where they mustn't be. Then it opens with each party's own keys all that this party has, and compares what it
finds with the true updates. At last the sixth device reports: both together make the sum, and no second one.

Linux only: memory is read from `/proc/PID/mem`, which needs to be allowed to debug one's own children.
"""

from __future__ import annotations

import sqlite3
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from tests.private.real_parties import MODEL, KnownDevice, Parties, parties
from tests.private.show_secrecy import LIMIT, correlation, uniform
from tests.server.processes import wait_until
from umbel.bundle import Bundle
from umbel.descriptor import layout_of
from umbel.errors import SetRefused
from umbel.helper_card import HelperCard
from umbel.ring import to_signed
from umbel.secure_report import SealedShares, report_from_bytes
from umbel.secure_sum import HelperItem, header_of, open_as_helper
from umbel.shares import Cleartext, HelperTotal, LeaderShare
from umbel_server.folder import Folder
from umbel_server.helper.folder import HelperFolder
from umbel_server.helper.port import LeaderSigner
from umbel_server.helper.remote import RemoteHelper

DEVICES, PIECE, PIECES = 6, 32, 8


def main() -> int:
    """Look, tell, and return 0 if all is as it should be."""
    found = Findings()
    with tempfile.TemporaryDirectory() as name, parties(Path(name), DEVICES, DEVICES - 2) as both:
        devices = _enrolled(both, Path(name))
        for device in devices[:-1]:
            device.reports()
        print(f"a round is open; {len(devices) - 1} of {len(devices)} devices have reported\n")
        _search(found, both, devices[:-1])
        _open_with_own_keys(found, both, devices[:-1])
        devices[-1].reports()
        _together(found, both, devices, Path(name))
    print("\nall as it should be" if not found.wrong else f"\nWRONG: {'; '.join(found.wrong)}")
    return 1 if found.wrong else 0


@dataclass
class Findings:
    """What was found, line by line, and what is wrong with it."""

    wrong: list[str] = field(default_factory=list)

    def tell(self, what: str, *, good: bool) -> None:
        print(what)
        if not good:
            self.wrong.append(what)


def _enrolled(both: Parties, folder: Path) -> list[KnownDevice]:
    made = both.operator.call(
        "devices", "tokens", "create", "--population", "wrists", "--count", str(DEVICES), "--codes"
    )
    tokens = both.helper.tokens("wrists", DEVICES)
    return [
        KnownDevice.enrolled(both, folder / f"device-{seed}", seed, code, token)
        for seed, (code, token) in enumerate(zip(made["codes"], tokens, strict=True))
    ]


# Searching.


def _search(found: Findings, both: Parties, devices: list[KnownDevice]) -> None:
    updates = [piece for one in devices for data in (one.clear, one.update.tobytes()) for piece in pieces(data)]
    bodies = [piece for one in devices for piece in pieces(one.body)]
    seeds = [one.fresh.seed for one in devices if one.fresh]
    places = {
        "the leader's files": list(files(both.operator.state)),
        "the leader's memory": list(memory(both.leader_process)),
        "the helper's files": list(files(both.helper.state)),
        "the helper's memory": list(memory(both.helper_process)),
    }
    for place, held in places.items():
        size = sum(map(len, held)) / 1e6
        whose, name = ("leader", both.operator.state) if "leader" in place else ("helper", both.helper.state)
        there = occurring(updates, held)
        found.tell(f"{place} ({size:.0f} MB): {there} of {len(updates)} pieces of updates", good=there == 0)
        secret, what = (seeds, "masks' seeds") if whose == "leader" else (bodies, "pieces of masked updates")
        there = occurring(secret, held)
        found.tell(f"{place}: {there} of {len(secret)} {what}", good=there == 0)
        # That the search finds what is there: the spool's own content, and the path that each process was given.
        sure = bodies if place == "the leader's files" else [str(name).encode()] if "memory" in place else []
        if sure:
            found.tell(
                f"{place}: {occurring(sure, held)} of {len(sure)} that must be there",
                good=occurring(sure, held) == len(sure),
            )


def pieces(data: bytes) -> list[bytes]:
    """Some pieces of data, spread over all of it; none that is all zero, which is everywhere."""
    starts = np.linspace(64, len(data) - PIECE, PIECES).astype(int) // 4 * 4
    found = [data[start : start + PIECE] for start in starts]
    return [piece for piece in found if any(piece)]


def files(folder: Path) -> Iterator[bytes]:
    """The content of every file."""
    return (path.read_bytes() for path in folder.rglob("*") if path.is_file())


def memory(process: int) -> Iterator[bytes]:
    """The content of all writable memory of a process."""
    with Path(f"/proc/{process}/mem").open("rb", 0) as source:
        for line in Path(f"/proc/{process}/maps").read_text().splitlines():
            span, mode = line.split()[:2]
            if mode.startswith("rw"):
                start, end = (int(part, 16) for part in span.split("-"))
                source.seek(start)
                try:
                    yield source.read(end - start)
                except OSError:
                    continue  # a guard page or a device's memory


def occurring(needles: Iterable[bytes], places: Iterable[bytes]) -> int:
    """How many of the needles occur anywhere."""
    held = list(places)
    return sum(any(needle in place for place in held) for needle in needles)


# Opening.


def _open_with_own_keys(found: Findings, both: Parties, devices: list[KnownDevice]) -> None:
    spool = [path.read_bytes() for path in (both.operator.state / "blobs" / "spool").iterdir()]
    reports = {report.report_id: report for report in map(report_from_bytes, spool)}
    for device in devices:
        share, item = _as_leader(both, device, reports[device.report_id])
        mask = _as_helper(both, device, item)
        truth = _truth(device)
        for who, what in (("leader", share), ("helper", mask)):
            odd, alike = uniform(what), correlation(what, truth)
            text = f"{who}, {device.home.name}: bytes {odd:+.2f}, likeness to the true update {alike:+.2f}"
            found.tell(f"{text} standard deviations from chance", good=max(abs(odd), abs(alike)) < LIMIT)


def _as_leader(both: Parties, device: KnownDevice, report: SealedShares) -> tuple[LeaderShare, HelperItem]:
    assert device.descriptor is not None
    share = LeaderShare(layout_of(device.descriptor))
    return share, Folder(both.operator.state).leader_key().open_share(device.descriptor, device.rd, report, share)


def _as_helper(both: Parties, device: KnownDevice, item: HelperItem) -> HelperTotal:
    """What the helper could make of a capsule that it is shown before the round's end."""
    assert device.descriptor is not None
    (key,) = _rows(both, "SELECT private_key FROM rounds WHERE rd=?", device.rd)
    folder = HelperFolder(both.helper.state)
    authority = folder.authority().public_key().public_bytes_raw()
    private = X25519PrivateKey.from_private_bytes(key[0])
    seed = open_as_helper(device.descriptor, device.rd, item, private, authority, device.descriptor.not_before)
    mask = HelperTotal(layout_of(device.descriptor))
    mask.add_mask(seed.seed, header_of(device.rd, seed.report_id))
    return mask


def _truth(device: KnownDevice) -> NDArray[np.float64]:
    assert device.descriptor is not None
    layout = layout_of(device.descriptor)
    return to_signed(Cleartext.from_bytes(layout, device.clear).numbers).astype(np.float64)


def _rows(both: Parties, query: str, *values: object) -> list[tuple[bytes]]:
    connection = sqlite3.connect(HelperFolder(both.helper.state).database)
    try:
        return connection.execute(query, values).fetchall()
    finally:
        connection.close()


# Together.


def _together(found: Findings, both: Parties, devices: list[KnownDevice], folder: Path) -> None:
    call = both.operator.call
    wait_until(lambda: len(call("versions", "list", MODEL)["versions"]) == 2, "the sum makes a version")
    moved = []
    for version in ("1", "2"):
        call("versions", "export", MODEL, version, str(folder / version))
        moved.append(Bundle.open(folder / version).shared_weights().to_vector().astype(np.float64))
    mean = np.mean([one.update.astype(np.float64) for one in devices], axis=0)
    error = float(np.linalg.norm(moved[1] - moved[0] - mean) / np.linalg.norm(mean))
    found.tell(f"together: the mean of {len(devices)} updates, to {error:.1e} of its norm", good=error < 1e-3)
    held = [*files(both.operator.state), *memory(both.leader_process)]
    updates = [piece for one in devices for data in (one.clear, one.update.tobytes()) for piece in pieces(data)]
    there = occurring(updates, held)
    found.tell(
        f"the leader's files and memory afterwards: {there} of {len(updates)} pieces of updates", good=there == 0
    )
    (key,) = _rows(both, "SELECT private_key FROM rounds WHERE rd=?", devices[0].rd)
    found.tell(f"the helper's key for the round is {'gone' if key[0] is None else 'THERE'}", good=key[0] is None)
    refused = _second_sum_is_refused(both, devices)
    found.tell(f"a second sum, without one device, {'is refused' if refused else 'IS GIVEN'}", good=refused)


def _second_sum_is_refused(both: Parties, devices: list[KnownDevice]) -> bool:
    """Even to who has the leader's own key."""
    signer = Folder(both.operator.state).signer().for_helper()
    assert isinstance(signer, LeaderSigner)
    port = RemoteHelper(HelperCard.from_text(both.helper.card.read_bytes()), signer)
    try:
        port.commit(devices[0].rd, sorted(one.report_id for one in devices)[1:])
    except SetRefused:
        return True
    finally:
        port.close()
    return False


if __name__ == "__main__":
    sys.exit(main())
