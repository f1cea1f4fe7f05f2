"""A name is the content's, and an id is the key's: neither can be chosen."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from tests.protos import examples
from umbel.digests import digest_of, digest_of_file, parse_digest, verify_digest
from umbel.errors import DigestMismatch, MalformedMessage
from umbel.identity import id_of_key

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_digest_is_sha_256_in_hex(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert digest_of(b"") == digest_of_file(tmp_path / "file") == parse_digest(EMPTY) == EMPTY


@given(st.binary(max_size=200))
def test_bytes_pass_under_their_own_name(data: bytes) -> None:
    verify_digest(data, digest_of(data))
    verify_digest(memoryview(data), parse_digest(digest_of(data)))


@given(st.binary(min_size=1, max_size=200), st.data())
def test_no_changed_bit_passes(data: bytes, draw: st.DataObject) -> None:
    changed = bytearray(data)
    bit = draw.draw(st.integers(0, len(data) * 8 - 1))
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(DigestMismatch, match="fetch them again"):
        verify_digest(bytes(changed), digest_of(data))


@pytest.mark.parametrize("text", ["", EMPTY[:-1], EMPTY + "0", EMPTY.upper(), EMPTY + "\n", "../" + EMPTY[3:]])
def test_what_may_become_a_file_name_is_checked(text: str) -> None:
    with pytest.raises(MalformedMessage, match="SHA-256"):
        parse_digest(text)


def test_an_id_is_the_keys_whatever_name_the_certificate_bears() -> None:
    key = examples.RELEASE_KEY
    for number, asked_for in enumerate(("admin", "0" * 32), 1):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, asked_for)])
        day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
        certificate = (
            x509.CertificateBuilder(subject, subject, key.public_key(), number, day, day + datetime.timedelta(1))
        ).sign(key, None)
        assert id_of_key(certificate.public_key()) == id_of_key(key.public_key())
    spki = bytes.fromhex("302a300506032b6570032100") + key.public_key().public_bytes_raw()  # RFC 8410, section 4
    assert id_of_key(key.public_key()) == digest_of(spki)[:32]
    assert id_of_key(examples.FOREIGN_RELEASE_KEY.public_key()) != id_of_key(key.public_key())
