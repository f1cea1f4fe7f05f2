"""Whom the helper vouches for: devices with a token of its own, for as long as it likes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.private.parties import POPULATION, Party, flipped
from umbel.clock import DAY
from umbel.errors import CertificateRefused, EnrolmentRefused, NotFound
from umbel.participants import ParticipantCertificate, prove


def enrol(party: Party, token: str, key: Ed25519PrivateKey, population: str = POPULATION) -> ParticipantCertificate:
    public = key.public_key().public_bytes_raw()
    return party.people.enrol(token, population, public, prove(population, key))


def test_a_token_lets_one_device_in_and_that_one_again(party: Party) -> None:
    token, key = party.people.new_token(POPULATION), Ed25519PrivateKey.generate()
    first = enrol(party, token, key)
    assert enrol(party, token, key) == first
    with pytest.raises(EnrolmentRefused, match="used up"):
        enrol(party, token, Ed25519PrivateKey.generate())


def test_a_token_never_looks_like_an_option_of_a_command(party: Party) -> None:
    assert all(party.people.new_token(POPULATION).isalnum() for _ in range(500))


def test_a_token_is_for_one_population_and_for_a_while(party: Party) -> None:
    token = party.people.new_token(POPULATION)
    with pytest.raises(EnrolmentRefused):
        enrol(party, token, Ed25519PrivateKey.generate(), "ankles")
    with pytest.raises(EnrolmentRefused):
        enrol(party, "guessed", Ed25519PrivateKey.generate())
    party.clock.instant += 8 * DAY
    with pytest.raises(EnrolmentRefused):
        enrol(party, token, Ed25519PrivateKey.generate())


def test_a_key_must_be_proved_and_be_a_key(party: Party) -> None:
    token, key = party.people.new_token(POPULATION), Ed25519PrivateKey.generate()
    public = key.public_key().public_bytes_raw()
    for proof in (b"", bytes(64), prove("ankles", key), prove(POPULATION, Ed25519PrivateKey.generate())):
        with pytest.raises(EnrolmentRefused):
            party.people.enrol(token, POPULATION, public, proof)
    with pytest.raises(EnrolmentRefused, match="bytes"):
        party.people.enrol(token, POPULATION, public + b"x", prove(POPULATION, key))


def test_a_certificate_is_renewed_while_it_is_good(party: Party) -> None:
    device = party.device()
    party.clock.instant += 60 * DAY
    newer = party.people.renew(POPULATION, device.certificate, prove(POPULATION, device.key))
    assert newer.not_after_ms - device.certificate.not_after_ms == 60 * DAY * 1000
    newer.verify(POPULATION, party.people.authority, party.clock.now())
    party.clock.instant += 31 * DAY
    with pytest.raises(CertificateRefused, match="expired"):
        party.people.renew(POPULATION, device.certificate, prove(POPULATION, device.key))


def test_nobody_elses_certificate_is_renewed(party: Party) -> None:
    device = party.device()
    with pytest.raises(EnrolmentRefused):
        party.people.renew(POPULATION, device.certificate, prove(POPULATION, Ed25519PrivateKey.generate()))
    forged = replace(device.certificate, signature=flipped(device.certificate.signature))
    with pytest.raises(CertificateRefused):
        party.people.renew(POPULATION, forged, prove(POPULATION, device.key))


def test_a_revoked_device_gets_no_new_certificate(party: Party) -> None:
    device = party.device()
    party.people.revoke(device.certificate.public_key)
    with pytest.raises(CertificateRefused, match="revoked"):
        party.people.renew(POPULATION, device.certificate, prove(POPULATION, device.key))
    with pytest.raises(NotFound):
        party.people.revoke(bytes(32))


def test_who_redeemed_a_token_is_known_by_it_and_once_revoked_not_let_in_by_it_again(party: Party) -> None:
    key, token = Ed25519PrivateKey.generate(), party.people.new_token(POPULATION)
    public = key.public_key().public_bytes_raw()
    for unknown in (token, "no token"):
        with pytest.raises(NotFound, match="redeemed"):
            party.people.holder_of(unknown)
    party.people.enrol(token, POPULATION, public, prove(POPULATION, key))
    assert party.people.holder_of(token) == public
    party.people.revoke(public)
    with pytest.raises(CertificateRefused, match="revoked"):
        party.people.enrol(token, POPULATION, public, prove(POPULATION, key))


def test_tokens_are_not_kept(party: Party) -> None:
    token = party.people.new_token(POPULATION)
    kept = party.records._connection.execute("SELECT digest FROM tokens").fetchall()
    assert token not in str(kept)
