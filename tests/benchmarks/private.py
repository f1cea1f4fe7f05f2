"""Private rounds: processor time of one report at the device, the leader and the helper, and its bytes.

Against a memory copy of the same report, and against the building blocks of Flower's SecAgg+ (numpy's masks, Shamir's
shares), which are measured here too. Times are processor time of one thread, the best of several, in buffers that are
used again: fresh memory would cost more than the arithmetic.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

import numpy as np

from tests.benchmarks.harness import Table
from tests.private.parties import Cohort, Party
from umbel.descriptor import layout_of
from umbel.secure_report import report_from_bytes
from umbel.secure_sum import Fresh, encode_update, open_as_helper, open_as_leader, seal_report
from umbel.shares import Cleartext, HelperTotal, LeaderShare, LeaderTotal
from umbel.transform import _selection

SIZES = ((10_000, 32), (10_000, 16), (1_000_000, 32), (1_000_000, 16), (10_000_000, 32), (10_000_000, 16))
MASKED = 0.25
"""Share of the weights that one row sends: the same random ones on every device."""
COLUMNS = ("weights, ring", "device ms", "leader ms", "helper ms", "copy ms", "bytes/weight", "leader/s", "helper/s")
SECAGG_CLIENTS = 50


def run() -> Table:
    rows: list[tuple[str | float, ...]] = []
    ratios: dict[str, float] = {}
    for size, bits in SIZES:
        device, leader, helper, copied, sent = _measure(size, bits)
        name = f"{size:,} u{bits}" + (" rotated" if bits == 16 and size > 10_000 else "")
        milli = [round(1e3 * one, 3) for one in (device, leader, helper, copied)]
        rows.append((name, *milli, round(sent / size, 4), round(1 / leader), round(1 / helper)))
        if size == 1_000_000:
            ratios |= {f"uploads/s at the leader, 1M u{bits}": 1 / leader}
            ratios |= {f"uploads/s at the helper, 1M u{bits}": 1 / helper}
            ratios |= {f"device ms, 1M u{bits}": 1e3 * device}
        if size == 1_000_000 and bits == 16:
            ratios["SecAgg+ bytes (8.1 a weight) per byte of ours, k=16"] = 8.1 * size / sent
            ratios["bytes around the numbers"] = sent - 2 * _party(size, bits).descriptor.transform.numbers
    device, leader, helper, copied, sent = _measure(1_000_000, 16, MASKED)
    milli = [round(1e3 * one, 3) for one in (device, leader, helper, copied)]
    name = f"1,000,000 u16 rotated, {MASKED:.0%} sent"
    rows.append((name, *milli, round(sent / 1_000_000, 4), round(1 / leader), round(1 / helper)))
    flower = _secagg_server_seconds()
    ours = SECAGG_CLIENTS * (_measure(1_000_000, 32)[1] + _measure(1_000_000, 32)[2])
    rows.append((f"SecAgg+ server, {SECAGG_CLIENTS} clients, s", "", round(flower, 2), "", "", 8.1, "", ""))
    ratios[f"server seconds of SecAgg+ per second of ours, {SECAGG_CLIENTS} clients, 1M"] = flower / ours
    aims = {
        "uploads/s at the leader, 1M u32": (">=", 1000.0),
        "uploads/s at the helper, 1M u32": (">=", 1000.0),
        "device ms, 1M u32": ("<=", 10.0),
        "device ms, 1M u16": ("<=", 10.0),
        "SecAgg+ bytes (8.1 a weight) per byte of ours, k=16": (">=", 4.0),
    }
    return Table("Private rounds (umbel-2agg/1), one report", COLUMNS, rows, ratios, aims)


def _party(size: int, bits: int, share: float = 1.0) -> Cohort:
    rotated, sent = bits == 16 and size > 10_000, round(size * share)
    cohort = {"max_weight": 1, "minimum": 2, "maximum": 64}
    return Party().open(size=size, sent=sent, ring_bits=bits, rotated=rotated, level=0, **cohort)


def _measure(size: int, bits: int, share: float = 1.0) -> tuple[float, float, float, float, int]:
    """Seconds at device, leader and helper, of a copy, and the report's bytes."""
    cohort = _party(size, bits, share)
    descriptor, rd, party = cohort.descriptor, cohort.agreed.rd, cohort.party
    device, layout = party.device(), layout_of(descriptor)
    chance = np.random.Generator(np.random.SFC64(1))
    delta = chance.standard_normal(size, dtype=np.float32) / np.float32(np.sqrt(size) * 1.1)
    buffer, total, into = Cleartext(layout), LeaderTotal(layout), LeaderShare(layout)

    def report() -> bytes:
        clear = encode_update(descriptor, delta, 1, {"loss": 1.0}, chance, buffer)
        sealed = seal_report(descriptor, rd, bytes(16), clear, device, Fresh.draw(secrets.token_bytes))
        reports.append(sealed)
        return b""

    reports: list = []

    def forget() -> None:
        reports.clear()
        _selection.cache_clear()  # a device draws it once a round

    spent_device = _best(report, forget, size)
    data = reports[-1].to_bytes()

    def lead() -> None:
        items.append(open_as_leader(descriptor, rd, report_from_bytes(data), party.leader._key, into))
        total.add(into)

    items: list = []
    spent_leader = _best(lead, lambda: None, size)
    key = party.records.round_by_rd(rd)
    assert key is not None and key.private_key is not None
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    private, masks = X25519PrivateKey.from_private_bytes(key.private_key), HelperTotal(layout)

    def help_() -> None:
        seed = open_as_helper(descriptor, rd, items[0], private, party.people.authority, party.clock.now())
        masks.add_mask(seed.seed, rd + seed.report_id)

    spent_helper = _best(help_, lambda: None, size)
    source, target = np.frombuffer(data, np.uint8), np.empty(len(data), np.uint8)
    return (
        spent_device,
        spent_leader,
        spent_helper,
        _best(lambda: np.copyto(target, source), lambda: None, size),
        len(data),
    )


def _best(work: Callable[[], object], between: Callable[[], object], size: int) -> float:
    found = []
    for _ in range(5 if size > 1_000_000 else 15):
        between()
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return max(min(found), 1e-9)


def _secagg_server_seconds() -> float:
    """Processor time of a SecAgg+ server for a million weights, all pairs, 5 % drop-outs, by Flower's functions."""
    from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    count, dropped = SECAGG_CLIENTS, max(1, SECAGG_CLIENTS // 20)
    shares = create_shares(secrets.token_bytes(32), SECAGG_CLIENTS // 2 + 1, count)
    seconds = _best(lambda: combine_shares(shares[: count // 2 + 1]), lambda: None, 10_000_000)
    masks = _best(lambda: pseudo_rand_gen(b"A" * 32, 1 << 22, [(1_000_000,)]), lambda: None, 10_000_000)
    # One seed and one mask for each survivor, one key and a mask for each of its pairs for each drop-out.
    return (count - dropped) * (seconds + masks) + dropped * (seconds + count * masks)
