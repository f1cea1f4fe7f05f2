"""`python -m tests.private.show_secrecy`: what each party could learn of one device from all that it holds.

Runs a private round with a real store and spool on disk, then plays a curious leader (its keys, its spool), a curious
helper (its keys, its database), and both together. Prints what each finds; exits with 1 if a party alone finds anything
or if the two together don't find the sum.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

from tests.private.parties import Cohort, Party, delta
from umbel.errors import UmbelError
from umbel.secure_report import report_from_bytes
from umbel.secure_sum import header_of, open_as_leader
from umbel.shares import HelperTotal, LeaderShare
from umbel_server.helper.records import Records

SIZE, DEVICES, LIMIT = 200_000, 6, 5.0


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        party = Party(records=Records(Path(folder) / "helper.db"))
        cohort = party.open(size=SIZE, minimum=4)
        devices = party.devices(DEVICES)
        cohort.fill(devices)
        spool = Path(folder) / "spool"
        spool.mkdir()
        for report_id, data in cohort.spool.items():
            (spool / report_id.hex()).write_bytes(data)
        shares = leaders_view(cohort, spool)
        masks = helpers_view(cohort, party)
        truth = delta(0, SIZE)
        found = [
            ("leader: a device's share, chi-squared of its bytes", uniform(shares[0])),
            ("leader: correlation of the share with the true update", correlation(shares[0], truth)),
            ("leader: correlation of two devices' shares", correlation(shares[0], numbers(shares[1]))),
            ("helper: a device's mask, chi-squared of its bytes", uniform(masks[0])),
            ("helper: correlation of the mask with the true update", correlation(masks[0], truth)),
        ]
        for what, deviations in found:
            print(f"{what}: {deviations:+.2f} standard deviations from chance")
        total = cohort.sum.close().aggregate.total
        expected = sum(delta(seed, SIZE).astype(np.float64) for seed in range(DEVICES))
        error = float(np.linalg.norm(total - expected) / np.linalg.norm(expected))
        print(f"together, by the protocol: the sum of {DEVICES}, to {error:.1e} of its norm")
        ids = sorted(cohort.spool)
        refused = differencing_is_refused(party, cohort, ids)
        print(f"together, by the protocol: a second sum without one device {'is refused' if refused else 'IS GIVEN'}")
        party.records.close()
    return 0 if all(abs(value) < LIMIT for _, value in found) and error < 1e-3 and refused else 1


def leaders_view(cohort: Cohort, spool: Path) -> list[LeaderShare]:
    """All that the leader's disk and keys open."""
    shares = []
    for report_id in cohort.spool:
        share = LeaderShare(cohort.sum._total.layout)
        data = (spool / report_id.hex()).read_bytes()
        key = cohort.party.leader._key
        open_as_leader(cohort.descriptor, cohort.agreed.rd, report_from_bytes(data), key, share)
        shares.append(share)
    return shares


def helpers_view(cohort: Cohort, party: Party) -> list[HelperTotal]:
    """All that the helper's memory holds once it is shown the capsules: seeds, which make masks."""
    party.port.prepare(cohort.agreed.rd, cohort.items())
    masks = []
    for report_id, seed in party.helper._prepared[cohort.agreed.rd].seeds.items():
        mask = HelperTotal(cohort.sum._total.layout)
        mask.add_mask(seed.seed, header_of(cohort.agreed.rd, report_id))
        masks.append(mask)
    return masks


def differencing_is_refused(party: Party, cohort: Cohort, ids: list[bytes]) -> bool:
    try:
        party.port.commit(cohort.agreed.rd, ids[1:])
    except UmbelError:
        return True
    return False


def numbers(share: LeaderShare | HelperTotal) -> np.ndarray:
    return share.numbers.view(np.int32).astype(np.float64)


def uniform(share: LeaderShare | HelperTotal) -> float:
    """Chi-squared against uniform bytes, in standard deviations from its mean."""
    counts = np.bincount(share.raw[8 * share.layout.lanes :], minlength=256)
    expected = counts.sum() / 256
    return float((((counts - expected) ** 2 / expected).sum() - 255) / np.sqrt(2 * 255))


def correlation(share: LeaderShare | HelperTotal, other: np.ndarray) -> float:
    """Correlation, in standard deviations of what chance gives."""
    return float(np.corrcoef(numbers(share), other)[0, 1] * np.sqrt(other.size))


if __name__ == "__main__":
    sys.exit(main())
