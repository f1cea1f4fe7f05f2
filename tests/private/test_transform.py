"""The public maps of a round: the same on every device, and what they do said in a second way."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.private.parties import Party
from umbel.transform import BLOCK, Transform, _keystream, _selection, padded

SEED = bytes(range(16))


def vector(size: int) -> NDArray[np.float32]:
    return np.random.Generator(np.random.PCG64(size)).standard_normal(size, dtype=np.float32)


def rotated_slowly(numbers: NDArray[np.float32], seed: bytes) -> NDArray[np.float64]:
    """As docs/reference/secure-sum.md says it, for all blocks at once."""
    bits = np.unpackbits(np.frombuffer(_keystream(b"signs", seed, -(-numbers.size // 8)), np.uint8), bitorder="little")
    filled = np.zeros(padded(numbers.size))
    filled[: numbers.size] = numbers * (1.0 - 2.0 * bits[: numbers.size])
    hadamard = np.ones((1, 1))
    while len(hadamard) < 64:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    count = filled.size // BLOCK
    turned = [hadamard / 8 @ filled[block::count].reshape(64, 64) @ hadamard / 8 for block in range(count)]
    return np.concatenate([one.ravel() for one in turned])


@pytest.mark.parametrize("size", [1, 20, 4095, 4096, 4097, 32 * 4096, 32 * 4096 + 1, 33 * 4096 - 5, 70 * 4096 + 4000])
def test_a_rotation_is_the_documented_one_and_comes_back(size: int) -> None:
    numbers, there = vector(size), Transform(size, size, True, SEED)
    kept = numbers.copy()
    rotated = there.forward(numbers)
    np.testing.assert_array_equal(numbers, kept)
    np.testing.assert_allclose(rotated, rotated_slowly(numbers, SEED), atol=1e-5)
    np.testing.assert_allclose(there.backward(rotated), numbers, atol=1e-5)


@pytest.mark.parametrize(("size", "sent"), [(1, 1), (300, 75), (300, 299), (5000, 1)])
def test_a_random_mask_is_the_documented_one(size: int, sent: int) -> None:
    words = np.frombuffer(_keystream(b"selection", SEED, 8 * size), "<u8")
    assert _selection(size, sent, SEED).tolist() == sorted(np.argsort(words, kind="stable")[:sent].tolist())


def test_ties_of_a_random_mask_go_to_the_lower_index(monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.array([7, 5, 7, 1, 7], "<u8").tobytes()
    monkeypatch.setattr("umbel.transform._keystream", lambda purpose, seed, length: words)
    assert _selection(5, 4, b"ties").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("rotated", [False, True])
def test_a_masked_sum_is_the_sum_where_it_was_sent_and_another_round_sends_others(rotated: bool) -> None:
    party, kept = Party(), []
    for number in (1, 2):
        size, sent = 9000, 2250
        cohort = party.open(number=number, size=size, sent=sent, rotated=rotated, ring_bits=32)
        expected = cohort.fill(party.devices(5))
        total = cohort.sum.close().aggregate.total
        here = _selection(size, sent, cohort.descriptor.public_seed)
        np.testing.assert_allclose(total[here], expected[here], atol=1e-3)
        assert not np.delete(total, here).any()
        kept.append(set(here.tolist()))
    assert 400 < len(kept[0] & kept[1]) < 700  # a quarter of a quarter: drawn anew
