"""A device runs what the pinned key signed, and never goes back."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.protos import examples
from umbel import messages
from umbel.errors import MalformedMessage, RollbackRefused, SignatureInvalid
from umbel.release import LABEL, SignedRelease, key_id_of, require_newer, sign_statement, verify_statement

KEY = examples.RELEASE_KEY
PUBLIC = KEY.public_key().public_bytes_raw()
STATEMENT = messages.release_to_bytes(examples.RELEASE)
SIGNED = sign_statement(STATEMENT, KEY)


def test_a_signed_release_verifies_and_reads_as_it_was_made() -> None:
    assert messages.release_from_bytes(verify_statement(SIGNED, PUBLIC)) == examples.RELEASE


def test_a_foreign_key_is_refused() -> None:
    foreign = sign_statement(STATEMENT, examples.FOREIGN_RELEASE_KEY)
    with pytest.raises(SignatureInvalid, match="this device trusts"):
        verify_statement(foreign, PUBLIC)


def test_a_foreign_signature_under_the_pinned_keys_name_is_refused() -> None:
    foreign = sign_statement(STATEMENT, examples.FOREIGN_RELEASE_KEY)
    with pytest.raises(SignatureInvalid):
        verify_statement(replace(foreign, key_id=key_id_of(PUBLIC)), PUBLIC)


def test_a_good_signature_under_another_keys_name_is_refused() -> None:
    with pytest.raises(SignatureInvalid):
        verify_statement(replace(SIGNED, key_id="0" * 16), PUBLIC)


@given(st.data())
def test_no_changed_bit_goes_unseen(data: st.DataObject) -> None:
    field = data.draw(st.sampled_from(["statement", "signature"]))
    changed = bytearray(getattr(SIGNED, field))
    bit = data.draw(st.integers(0, len(changed) * 8 - 1))
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SignatureInvalid):
        verify_statement(replace(SIGNED, **{field: bytes(changed)}), PUBLIC)


@given(st.binary(max_size=80))
def test_a_signature_of_any_length_is_refused_not_a_crash(signature: bytes) -> None:
    with pytest.raises(SignatureInvalid):
        verify_statement(replace(SIGNED, signature=signature), PUBLIC)


@pytest.mark.parametrize("label", [b"", b"umbel-release/2\0", b"umbel-assignment/1\0"])
def test_a_signature_made_for_another_purpose_is_refused(label: bytes) -> None:
    assert not LABEL.startswith(label) or not label
    elsewhere = SignedRelease(STATEMENT, key_id_of(PUBLIC), KEY.sign(label + STATEMENT))
    with pytest.raises(SignatureInvalid):
        verify_statement(elsewhere, PUBLIC)


def test_signatures_of_two_releases_cannot_be_swapped() -> None:
    other = sign_statement(messages.release_to_bytes(replace(examples.RELEASE, number=8)), KEY)
    with pytest.raises(SignatureInvalid):
        verify_statement(replace(SIGNED, signature=other.signature), PUBLIC)


@pytest.mark.parametrize("newest_known", [8, 9, 2**63 - 1])
def test_an_older_release_is_refused_however_well_signed(newest_known: int) -> None:
    with pytest.raises(RollbackRefused, match="older"):
        require_newer(examples.RELEASE, newest_known)


@pytest.mark.parametrize("newest_known", [0, 6, 7])
def test_the_same_or_a_newer_release_is_taken(newest_known: int) -> None:
    require_newer(examples.RELEASE, newest_known)


@given(st.binary(max_size=60))
def test_a_statement_that_is_no_release_is_refused_even_when_signed(statement: bytes) -> None:
    verified = verify_statement(sign_statement(statement, KEY), PUBLIC)
    with pytest.raises(MalformedMessage):
        messages.release_from_bytes(verified)
