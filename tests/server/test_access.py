"""Enrolment, renewal and the deny-list: who gets a device's certificate, and who loses it."""

from __future__ import annotations

import dataclasses

import pytest
import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric import ec

from umbel.clock import DAY
from umbel.errors import CertificateRefused, EnrolmentRefused, MalformedMessage, NotAllowed, NotFound, OutOfBounds
from umbel.identity import DeviceId, id_of_key
from umbel_server import audit
from umbel_server.access import MAX_ATTESTATION_BYTES, AcceptAll, Access, Attestation, Authorities, RefuseAll
from umbel_server.authority import Authority, PeerKind, make_request
from umbel_server.store import Store
from umbel_server.tables import DEVICES, TOKENS

NOW = 1_700_000_000.0
TRUST = Authorities(*(Authority.create(name, NOW) for name in ("server", "device", "operator")))


@dataclasses.dataclass
class HandClock:
    """A clock that stands until it is moved."""

    instant: float = NOW

    def now(self) -> float:
        return self.instant


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


def open_access(store: Store, clock: HandClock, attestation: Attestation | None = None) -> Access:
    return Access(store, TRUST, attestation or AcceptAll(), clock, 7 * DAY)


@pytest.fixture
def access(store: Store, clock: HandClock) -> Access:
    return open_access(store, clock)


@pytest.fixture
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def token_of(access: Access, population: str = "watches", seconds: float = DAY) -> str:
    tokens, _ = access.create_tokens("operator:ada", population, 1, seconds)
    return tokens[0]


def actions(store: Store) -> list[str]:
    with store.reading() as connection:
        return [row.action for row in reversed(audit.rows(connection))]


def test_a_token_and_a_proven_key_buy_a_certificate(
    access: Access, store: Store, key: ec.EllipticCurvePrivateKey
) -> None:
    enrolled = access.enrol(token_of(access), make_request(key), b"")
    peer = access.device(enrolled.certificate_chain)
    assert (peer.id, peer.realm) == (id_of_key(key.public_key()), "watches")
    assert (peer.id, "watches") == (enrolled.device, enrolled.population)
    assert actions(store) == ["tokens.create", "device.enrol"]


def test_a_token_never_looks_like_an_option_of_a_command(access: Access) -> None:
    tokens, _ = access.create_tokens("operator:ada", "phones", 500, 60.0)
    assert all(token.isalnum() for token in tokens)


def test_a_token_is_used_once(access: Access, key: ec.EllipticCurvePrivateKey) -> None:
    token = token_of(access)
    access.enrol(token, make_request(key), b"")
    with pytest.raises(EnrolmentRefused, match="used up"):
        access.enrol(token, make_request(ec.generate_private_key(ec.SECP256R1())), b"")


def test_a_device_that_lost_the_answer_asks_again_with_the_same_key(
    access: Access, store: Store, key: ec.EllipticCurvePrivateKey
) -> None:
    token = token_of(access)
    first = access.enrol(token, make_request(key), b"")
    again = access.enrol(token, make_request(key), b"")
    assert again.device == first.device
    assert actions(store).count("device.enrol") == 1


def test_an_old_token_buys_nothing(access: Access, clock: HandClock, key: ec.EllipticCurvePrivateKey) -> None:
    token = token_of(access, seconds=60)
    clock.instant += 60
    with pytest.raises(EnrolmentRefused, match="too old"):
        access.enrol(token, make_request(key), b"")


@pytest.mark.parametrize("token", ["", "guess", "\ud800", "x" * 10_000])
def test_a_guessed_token_buys_nothing(
    access: Access, store: Store, key: ec.EllipticCurvePrivateKey, token: str
) -> None:
    token_of(access)
    with pytest.raises(EnrolmentRefused, match="unknown"):
        access.enrol(token, make_request(key), b"")
    assert "device.enrol" not in actions(store)


def test_a_failed_enrolment_leaves_the_token_good(access: Access, key: ec.EllipticCurvePrivateKey) -> None:
    token = token_of(access)
    with pytest.raises(MalformedMessage):
        access.enrol(token, b"not a request", b"")
    access.enrol(token, make_request(key), b"")


def test_tokens_are_not_kept_readable(access: Access, store: Store) -> None:
    token = token_of(access)
    with store.reading() as connection:
        kept = str(connection.execute(sa.select(TOKENS)).all())
    assert token not in kept


def test_a_key_stays_in_its_population(access: Access, key: ec.EllipticCurvePrivateKey) -> None:
    access.enrol(token_of(access), make_request(key), b"")
    other = token_of(access, "phones")
    with pytest.raises(EnrolmentRefused, match="another population"):
        access.enrol(other, make_request(key), b"")
    access.enrol(other, make_request(ec.generate_private_key(ec.SECP256R1())), b"")  # the token wasn't lost over it


@pytest.mark.parametrize(
    ("population", "count", "seconds", "error"),
    [
        ("../etc", 1, DAY, MalformedMessage),
        ("watches", 0, DAY, OutOfBounds),
        ("watches", 10_001, DAY, OutOfBounds),
        ("watches", 1, 0.0, OutOfBounds),
        ("watches", 1, float("nan"), OutOfBounds),
        ("watches", 1, float("inf"), OutOfBounds),
    ],
)
def test_tokens_that_make_no_sense_are_not_made(
    access: Access, store: Store, population: str, count: int, seconds: float, error: type[Exception]
) -> None:
    with pytest.raises(error):
        access.create_tokens("operator:ada", population, count, seconds)
    assert actions(store) == []


def test_a_revoked_device_is_refused_at_once_and_after_a_restart(
    access: Access, store: Store, clock: HandClock, key: ec.EllipticCurvePrivateKey
) -> None:
    enrolled = access.enrol(token_of(access), make_request(key), b"")
    access.revoke("operator:ada", enrolled.device, "lost")
    for one in (access, open_access(store, clock)):
        with pytest.raises(CertificateRefused, match="revoked"):
            one.device(enrolled.certificate_chain)
        with pytest.raises(EnrolmentRefused, match="revoked"):
            one.enrol(token_of(one), make_request(key), b"")


def test_only_enrolled_devices_can_be_revoked(access: Access, store: Store) -> None:
    with pytest.raises(NotFound):
        access.revoke("operator:ada", "0" * 32, "")
    assert actions(store) == []


def test_a_certificate_is_renewed_for_the_same_key_only(
    access: Access, clock: HandClock, key: ec.EllipticCurvePrivateKey
) -> None:
    peer = access.device(access.enrol(token_of(access), make_request(key), b"").certificate_chain)
    clock.instant += 5 * DAY
    renewed = access.device(access.renew(peer, make_request(key)))
    assert (renewed.id, renewed.realm, renewed.not_after) == (peer.id, peer.realm, peer.not_after + 5 * DAY)
    with pytest.raises(NotAllowed, match="same key"):
        access.renew(peer, make_request(ec.generate_private_key(ec.SECP256R1())))


def test_a_certificate_ends_even_on_a_connection_that_does_not(
    access: Access, clock: HandClock, key: ec.EllipticCurvePrivateKey
) -> None:
    chain = access.enrol(token_of(access), make_request(key), b"").certificate_chain
    access.device(chain)
    clock.instant += 7 * DAY
    with pytest.raises(CertificateRefused, match="time"):
        access.device(chain)


def test_no_certificate_is_no_device(access: Access) -> None:
    with pytest.raises(CertificateRefused, match="that enrolment gave"):
        access.device(None)


def test_an_operator_is_no_device(access: Access, key: ec.EllipticCurvePrivateKey) -> None:
    with pytest.raises(CertificateRefused):
        access.device(TRUST.operator.issue(key.public_key(), PeerKind.OPERATOR, "operators", NOW, DAY))


def test_without_a_verifier_of_attestations_nobody_enrols(
    store: Store, clock: HandClock, key: ec.EllipticCurvePrivateKey
) -> None:
    access = open_access(store, clock, RefuseAll())
    with pytest.raises(EnrolmentRefused, match="attestation"):
        access.enrol(token_of(access), make_request(key), b"trust me")


def test_a_verifier_of_attestations_sees_evidence_and_key(
    store: Store, clock: HandClock, key: ec.EllipticCurvePrivateKey
) -> None:
    class OnlyGood:
        def verify(self, evidence: bytes, device: DeviceId) -> None:
            if evidence != b"good for " + device.encode():
                raise EnrolmentRefused("this evidence doesn't convince")

    access = open_access(store, clock, OnlyGood())
    token = token_of(access)
    with pytest.raises(EnrolmentRefused, match="convince"):
        access.enrol(token, make_request(key), b"bad")
    access.enrol(token, make_request(key), b"good for " + id_of_key(key.public_key()).encode())


def test_an_attestation_of_any_length_does_not_reach_its_verifier(
    store: Store, clock: HandClock, key: ec.EllipticCurvePrivateKey
) -> None:
    seen: list[int] = []

    class Measuring:
        def verify(self, evidence: bytes, device: DeviceId) -> None:
            seen.append(len(evidence))

    access = open_access(store, clock, Measuring())
    token = token_of(access)
    with pytest.raises(EnrolmentRefused, match="the limit is"):
        access.enrol(token, make_request(key), bytes(MAX_ATTESTATION_BYTES + 1))
    access.enrol(token, make_request(key), bytes(MAX_ATTESTATION_BYTES))
    assert seen == [MAX_ATTESTATION_BYTES]


def test_a_device_is_written_down_once(access: Access, store: Store, key: ec.EllipticCurvePrivateKey) -> None:
    for _ in range(2):
        access.enrol(token_of(access), make_request(key), b"")
    with store.reading() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(DEVICES)) == 1
