"""Leader and helper stream: what they hold is a few times the model, whatever the cohort."""

from __future__ import annotations

import gc
import tracemalloc
from pathlib import Path

from tests.private.parties import Party, Spool, delta

SIZE = 300_000
MODEL = 4 * SIZE


def peak(count: int, folder: Path) -> int:
    """The most bytes that leader and helper take together for a round of `count` reports from the disk."""
    party = Party()
    cohort = party.open(size=SIZE, minimum=2, maximum=16, max_weight=1)
    spool = Spool(folder)
    names = []
    for _ in range(count):
        shares = cohort.report(party.device(), cohort.encoded(delta(1, SIZE)))
        spool.write(shares)
        names.append(shares.report_id)
    del shares
    cohort.spool = spool
    gc.collect()
    tracemalloc.start()
    try:
        cohort.sum = cohort.fresh()
        for sequence, name in enumerate(names):
            cohort.sum.accept(cohort.sealed(spool[name], name, sequence))
        assert cohort.sum.close().count == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_neither_side_holds_more_for_a_larger_cohort(tmp_path: Path) -> None:
    few, many = peak(3, tmp_path), peak(12, tmp_path)
    assert many - few < MODEL / 2
    assert many < 9 * MODEL
