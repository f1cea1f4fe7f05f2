"""Private rounds of ten million weights: the memory of leader and helper, which must not grow with the cohort.

Each cohort in a process of its own; its reports lie on the disk, as in the coordinator's spool. Leader and helper take
turns in that process, and the kernel's high-water mark is set back at each turn (`/proc/self/clear_refs`).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from tests.benchmarks.harness import Table, child, peak_mb
from tests.private.parties import Cohort, Party, Spool, delta
from umbel.cohort_sum import HelperAnswer
from umbel.secure_sum import HelperItem
from umbel_server.helper.local import LocalHelper
from umbel_server.helper.port import Prepared
from umbel_server.helper.records import Records

T = TypeVar("T")
MODULE = "tests.benchmarks.private_memory"
SIZE, COHORTS = 10_000_000, (3, 12)
NAMES = {32: "32 bits", 16: "16 bits, rotated"}


def run() -> Table:
    rows: list[tuple[str | float, ...]] = []
    ratios: dict[str, float] = {}
    for bits, name in NAMES.items():
        few, many = (child(MODULE, str(bits), str(count)) for count in COHORTS)
        for count, found in zip(COHORTS, (few, many), strict=True):
            rows.append(
                (f"{name}, {count} reports", *(found[one] for one in ("report", "adding", "closing", "helper")))
            )
        grown = max(many[one] - few[one] for one in ("adding", "closing", "helper"))
        ratios[f"reports by which memory grew from {COHORTS[0]} to {COHORTS[1]}, {name}"] = grown / few["report"]
    aims = dict.fromkeys(ratios, ("<=", 0.5))
    columns = ("ring, cohort", "a report, MB", "leader adding, MB", "leader at the end, MB", "helper, MB")
    return Table(f"Private rounds: memory for {SIZE / 1e6:.0f}M weights", columns, rows, ratios, aims)


class _Turns(LocalHelper):
    """Notes the helper's own peak at each of its calls, and the leader's between them."""

    def __init__(self, port: LocalHelper, leader: Callable[[], None]) -> None:
        super().__init__(port._helper, port._sign)
        self._leader, self.peak = leader, 0.0

    def prepare(self, rd: bytes, items: Sequence[HelperItem]) -> Prepared:
        return self._measured(lambda: LocalHelper.prepare(self, rd, items))

    def commit(self, rd: bytes, ids: Sequence[bytes]) -> HelperAnswer:
        return self._measured(lambda: LocalHelper.commit(self, rd, ids))

    def _measured(self, call: Callable[[], T]) -> T:
        self._leader()
        before = set_back()
        answer = call()
        self.peak = max(self.peak, peak_mb() - before)
        set_back()
        return answer


def set_back() -> float:
    """Set the high-water mark to what is resident now; returns that, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mb()


def _measure(bits: int, count: int, folder: Path) -> dict[str, float]:
    party = Party(records=Records(folder / "helper.db"))
    cohort = party.open(size=SIZE, ring_bits=bits, rotated=bits == 16, max_weight=1, minimum=2, maximum=16, lanes=())
    names = [_report(cohort, folder, seed) for seed in range(count)]
    before, peaks = set_back(), dict[str, float]()

    def leader() -> None:
        peaks["closing"] = max(peaks.get("closing", 0.0), peak_mb() - before)

    turns = _Turns(party.port, leader)
    party.port = turns
    cohort.spool = Spool(folder)
    cohort.sum = cohort.fresh()
    for sequence, name in enumerate(names):
        cohort.sum.accept(cohort.sealed(cohort.spool[name], name, sequence))
    peaks["adding"] = peak_mb() - before
    set_back()
    total = cohort.sum.close().aggregate
    leader()
    assert total.count == count and np.isfinite(total.total).all()
    party.records.close()
    report = (folder / names[0].hex()).stat().st_size / 1e6
    return {"report": report, "helper": turns.peak, **peaks}


def _report(cohort: Cohort, folder: Path, seed: int) -> bytes:
    shares = cohort.report(cohort.party.device(), cohort.encoded(delta(seed, SIZE), seed=seed))
    Spool(folder).write(shares)
    return shares.report_id


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(_measure(int(sys.argv[1]), int(sys.argv[2]), Path(place))))
