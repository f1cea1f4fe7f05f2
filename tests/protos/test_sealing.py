"""A sealed report opens for its recipient, its task, round, session, report and base, and for nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from tests.protos import examples
from tests.protos import strategies as draw
from umbel.digests import digest_of
from umbel.errors import MalformedMessage, SealBroken
from umbel.sealing import OVERHEAD, SEALED, Binding, Sealing, open_sealed, seal

KEY = examples.SEALING_KEY
SEALING = Sealing(SEALED, KEY.public_key().public_bytes_raw())
BINDING = examples.BINDING

bindings = st.builds(
    Binding,
    task=draw.names,
    round=draw.counts,
    session_id=draw.names,
    report_id=draw.report_ids,
    base=draw.digests,
)


@given(st.binary(max_size=2000), bindings)
def test_what_was_sealed_opens_again(plaintext: bytes, binding: Binding) -> None:
    sealed = seal(plaintext, SEALING, binding)
    assert open_sealed(sealed, KEY, binding) == plaintext
    assert len(sealed) == len(plaintext) + OVERHEAD


def test_sealing_twice_gives_different_bytes() -> None:
    assert seal(b"same", SEALING, BINDING) != seal(b"same", SEALING, BINDING)


@pytest.mark.parametrize(
    "elsewhere",
    [
        replace(BINDING, task="other"),
        replace(BINDING, round=BINDING.round + 1),
        replace(BINDING, session_id="s-0002"),
        replace(BINDING, report_id="f" * 32),
        replace(BINDING, base=digest_of(b"another manifest")),
    ],
    ids=["task", "round", "session", "report", "base"],
)
def test_a_sealed_report_cannot_be_moved(elsewhere: Binding) -> None:
    with pytest.raises(SealBroken):
        open_sealed(seal(b"update", SEALING, BINDING), KEY, elsewhere)


def test_two_devices_sealed_reports_cannot_be_swapped() -> None:
    mine, theirs = BINDING, replace(BINDING, session_id="s-0002", report_id="f" * 32)
    sealed_mine, sealed_theirs = seal(b"mine", SEALING, mine), seal(b"theirs", SEALING, theirs)
    for sealed, binding in ((sealed_mine, theirs), (sealed_theirs, mine)):
        with pytest.raises(SealBroken):
            open_sealed(sealed, KEY, binding)


def test_another_key_does_not_open_it() -> None:
    with pytest.raises(SealBroken):
        open_sealed(seal(b"update", SEALING, BINDING), X25519PrivateKey.generate(), BINDING)


@given(st.data())
def test_no_flipped_bit_goes_unseen(data: st.DataObject) -> None:
    sealed = bytearray(seal(b"sixteen bytes ok", SEALING, BINDING))
    # The top bit of an X25519 public key is ignored by definition (RFC 7748, section 5), but HPKE binds the bytes.
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SealBroken):
        open_sealed(bytes(sealed), KEY, BINDING)


@given(st.binary(max_size=200))
def test_bytes_from_anywhere_do_not_open(noise: bytes) -> None:
    with pytest.raises(SealBroken):
        open_sealed(noise, KEY, BINDING)


@pytest.mark.parametrize("cut", [1, 16, OVERHEAD, OVERHEAD + 6])
def test_a_truncated_report_does_not_open(cut: int) -> None:
    with pytest.raises(SealBroken):
        open_sealed(seal(b"update", SEALING, BINDING)[:-cut], KEY, BINDING)


def test_an_appended_byte_breaks_the_seal() -> None:
    with pytest.raises(SealBroken):
        open_sealed(seal(b"update", SEALING, BINDING) + b"\0", KEY, BINDING)


@given(bindings, bindings)
def test_no_two_bindings_share_their_bytes(left: Binding, right: Binding) -> None:
    assert (left == right) == (left.info(SEALING) == right.info(SEALING))


def test_letters_cannot_wander_from_one_part_of_a_binding_to_the_next() -> None:
    left, right = replace(BINDING, task="ab", round=12), replace(BINDING, task="ab1", round=2)
    assert left.info(SEALING) != right.info(SEALING)


@pytest.mark.parametrize("suite", ["", "umbel-sealed/0", "umbel-2agg/1", "plain"])
def test_an_unknown_suite_is_refused_and_nothing_falls_back_to_plain(suite: str) -> None:
    with pytest.raises(MalformedMessage, match="not known here"):
        seal(b"update", Sealing(suite, SEALING.public_key), BINDING)


@pytest.mark.parametrize("key", [b"", b"short", bytes(31), bytes(33)])
def test_a_key_of_the_wrong_length_is_refused(key: bytes) -> None:
    with pytest.raises(MalformedMessage, match="not an X25519 public key"):
        seal(b"update", Sealing(SEALED, key), BINDING)


def test_a_key_of_small_order_is_refused() -> None:
    """The all-zero point would make the shared secret known to everybody."""
    with pytest.raises(MalformedMessage, match="not an X25519 public key"):
        seal(b"update", Sealing(SEALED, bytes(32)), BINDING)
