"""`python -m tests.private.make_vectors`: write `tests/vectors/secure_sum.json`, for devices in other languages.

HPKE draws its own randomness, so every run makes other capsules; the committed file is kept, and tests open it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from tests.private.parties import BASE, NOW, PLAN, POPULATION, TASK, changed, flipped
from umbel.clip_vote import VOTE, WITHIN_CLIP
from umbel.cohort_sum import answer_statement
from umbel.descriptor import Lane, RoundDescriptor, plan_digest, rd_of, sign_as_helper, sign_as_leader
from umbel.participants import issue
from umbel.plan import Kind
from umbel.secure_report import SealedShares
from umbel.secure_sum import Fresh, HelperSeed, Participant, encode_update, seal_report, total_of_masks
from umbel.shares import LeaderShare
from umbel.transform import Transform

FILE = Path(__file__).parents[1] / "vectors" / "secure_sum.json"


def key(number: int) -> bytes:
    return bytes([number]) * 32


def descriptor(bits: int, size: int, rotated: bool, votes: bool) -> RoundDescriptor:
    public = [X25519PrivateKey.from_private_bytes(key(number)).public_key().public_bytes_raw() for number in (1, 2)]
    return RoundDescriptor(
        population=POPULATION, task=TASK, round=7, kind=Kind.TRAIN, base=BASE, plan=plan_digest(PLAN), size=size,
        sent=size - 3, rotated=rotated, public_seed=bytes(range(16)), ring_bits=bits, level=100,
        clip_norm=0.5 if votes else 1.0,
        scale=400.0, max_weight=4, minimum=2, maximum=8, not_before=NOW, not_after=NOW + 3600, leader_key=public[0],
        helper_keys=(public[1],),
        lanes=(Lane(WITHIN_CLIP, VOTE),) if votes else (Lane("loss", 100.0), Lane("correct", 100.0)),
    )  # fmt: skip


def case(name: str, bits: int, size: int, rotated: bool, votes: bool = False) -> dict[str, Any]:
    it = descriptor(bits, size, rotated, votes)
    statement, authority = it.to_bytes(), Ed25519PrivateKey.from_private_bytes(key(4))
    rd, report_id, signer = rd_of(statement), bytes(range(16)), Ed25519PrivateKey.from_private_bytes(key(5))
    certificate = issue(POPULATION, signer.public_key().public_bytes_raw(), NOW + 86_400, authority)
    delta = (np.sin(np.arange(size, dtype=np.float32)) / np.float32(np.sqrt(size))).astype(np.float32)
    chance = np.random.Generator(np.random.PCG64(1))
    clear = encode_update(it, delta, 3, {"loss": 12.5, "correct": 9.0}, chance)
    plain, fresh = clear.to_bytes(), Fresh(key(6), key(7))
    shares = seal_report(it, rd, report_id, clear, Participant(signer, certificate), fresh)
    # Sealing masks in place, so this buffer holds the masked share now.
    masked = LeaderShare(clear.layout, clear.raw).to_bytes()
    total = total_of_masks(it, rd, [HelperSeed(report_id, fresh.seed, certificate.public_key)], bytes).to_bytes()
    ids = [report_id, bytes([255]) * 16]
    return {
        "name": name,
        "descriptor": statement.hex(),
        "rd": rd.hex(),
        "leader_signature": sign_as_leader(statement, Ed25519PrivateKey.from_private_bytes(key(8))).hex(),
        "helper_signature": sign_as_helper(statement, Ed25519PrivateKey.from_private_bytes(key(3))).hex(),
        "delta": delta.tobytes().hex(),
        "travels": it.transform.forward(delta).tobytes().hex(),
        "cleartext": plain.hex(),
        "seed": fresh.seed.hex(),
        "masked": masked.hex(),
        "report_id": report_id.hex(),
        "report": shares.to_bytes().hex(),
        "mask": total.hex(),
        "set": [one.hex() for one in ids],
        "answer_statement": answer_statement(rd, ids, total).hex(),
        "bad": [] if rotated or votes else bad(shares),
    }


def rotation(numbers: int) -> dict[str, Any]:
    """Number i is (37 i mod 101 - 50) / 64; of what comes out, enough to tell how several blocks are put together."""
    vector = (((37 * np.arange(numbers)) % 101 - 50) / 64).astype(np.float32)
    turned = Transform(numbers, numbers, True, bytes(range(16))).forward(vector)
    at = [0, 1, 63, 64, 4095, 4096, 4097, len(turned) - 1]
    values = [round(float(turned[place]), 6) for place in at]
    return {"numbers": numbers, "public_seed": bytes(range(16)).hex(), "at": at, "values": values}


def bad(shares: SealedShares) -> list[dict[str, str]]:
    spoilt = {
        "another round": (changed(shares, rd=bytes(32)).to_bytes(), "seal-broken"),
        "another id": (changed(shares, report_id=bytes(16)).to_bytes(), "seal-broken"),
        "flipped bit in the vector": (changed(shares, body=flipped(shares.body, 5)).to_bytes(), "seal-broken"),
        "flipped bit for the leader": (
            changed(shares, leader_capsule=flipped(shares.leader_capsule, 40)).to_bytes(), "seal-broken"
        ),
        "flipped bit for the helper": (
            changed(shares, helper_capsule=flipped(shares.helper_capsule, 40)).to_bytes(), "seal-broken"
        ),
        "too short": (changed(shares, body=bytes(shares.body[:-1])).to_bytes(), "weights-mismatch"),
        "too long": (changed(shares, body=bytes(shares.body) + b"x").to_bytes(), "weights-mismatch"),
        "no capsule": (changed(shares, leader_capsule=b"").to_bytes(), "out-of-bounds"),
        "cut in the header": (shares.to_bytes()[:50], "malformed-message"),
        "nothing": (b"", "malformed-message"),
    }  # fmt: skip
    return [{"name": name, "report": data.hex(), "error": error} for name, (data, error) in spoilt.items()]


def main() -> None:
    public = {
        "leader_key": "01" * 32,
        "helper_key": "02" * 32,
        "helper_identity": "03" * 32,
        "helper_authority": "04" * 32,
        "participant": "05" * 32,
        "content_key": "07" * 32,
        "leader_identity": "08" * 32,
    }
    vectors = [case("32 bits", 32, 20, False), case("16 bits, rotated", 16, 20, True)]
    vectors.append(case("a vote against the clip", 32, 20, False, votes=True))
    tree = {
        "suite": "umbel-2agg/1",
        "private_keys": public,
        "now": NOW,
        "vectors": vectors,
        "rotations": [rotation(9000)],
    }
    FILE.write_text(json.dumps(tree, indent=1) + "\n")


if __name__ == "__main__":
    main()
