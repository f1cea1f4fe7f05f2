"""Certificates: whose they are, for how long, and for which port."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from umbel.clock import DAY
from umbel.errors import BadInput, CertificateRefused, EnrolmentRefused, MalformedMessage
from umbel.identity import id_of_key
from umbel_client import Identity
from umbel_server.authority import Authority, PeerKind, key_of_request, key_to_pem, make_request

NOW = 1_700_000_000.0
WEEK = 7 * DAY


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create("test device authority", NOW)


@pytest.fixture(scope="module")
def key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def certificate(authority: Authority, key: ec.EllipticCurvePrivateKey, kind: PeerKind = PeerKind.DEVICE) -> bytes:
    return authority.issue(key.public_key(), kind, "watches", NOW, WEEK)


def test_the_id_comes_from_the_key_and_the_realm_from_the_certificate(
    authority: Authority, key: ec.EllipticCurvePrivateKey
) -> None:
    peer = authority.verify(certificate(authority, key), PeerKind.DEVICE, NOW)
    assert (peer.id, peer.realm, peer.not_after) == (id_of_key(key.public_key()), "watches", NOW + WEEK)


@pytest.mark.parametrize("late", [-DAY - 1, WEEK, WEEK + 1])
def test_a_certificate_outside_its_time_is_refused(
    authority: Authority, key: ec.EllipticCurvePrivateKey, late: float
) -> None:
    with pytest.raises(CertificateRefused, match="time"):
        authority.verify(certificate(authority, key), PeerKind.DEVICE, NOW + late)


@pytest.mark.parametrize("kind", PeerKind)
def test_what_was_given_by_a_clock_that_was_hours_ahead_is_good_once_it_is_set_right(
    authority: Authority, key: ec.EllipticCurvePrivateKey, kind: PeerKind
) -> None:
    ahead = NOW + 14 * 3600.0
    first = authority.issue(key.public_key(), kind, "watches", ahead, WEEK)
    for given_ahead in (first, authority.renew(first, kind, ahead, WEEK)):
        assert authority.verify(given_ahead, kind, NOW).id == id_of_key(key.public_key())


@pytest.mark.parametrize("life", [WEEK, DAY, 600.0])
def test_a_new_certificate_of_any_life_is_not_due_for_renewal(
    authority: Authority, key: ec.EllipticCurvePrivateKey, life: float
) -> None:
    chain = authority.issue(key.public_key(), PeerKind.DEVICE, "watches", NOW, life)
    device = Identity(key_to_pem(key), chain, b"", b"", "watches", "")
    assert not device.renewal_due(NOW + life / 4)
    assert device.renewal_due(NOW + life * 2 / 3)


def test_one_kind_of_certificate_does_not_do_for_the_other(
    authority: Authority, key: ec.EllipticCurvePrivateKey
) -> None:
    with pytest.raises(CertificateRefused, match="operator"):
        authority.verify(certificate(authority, key), PeerKind.OPERATOR, NOW)


def test_the_same_names_under_another_authority_are_foreign(
    authority: Authority, key: ec.EllipticCurvePrivateKey
) -> None:
    namesake = Authority.create("test device authority", NOW)
    with pytest.raises(CertificateRefused, match="authority"):
        authority.verify(certificate(namesake, key), PeerKind.DEVICE, NOW)


def test_a_server_certificate_is_none_to_call_with(authority: Authority, key: ec.EllipticCurvePrivateKey) -> None:
    with pytest.raises(CertificateRefused):
        authority.verify(authority.issue_server(key.public_key(), ["localhost"], NOW), PeerKind.DEVICE, NOW)


def test_the_authority_itself_is_no_caller(authority: Authority) -> None:
    with pytest.raises(CertificateRefused):
        authority.verify(authority.certificate_pem, PeerKind.DEVICE, NOW)


def test_a_leaf_can_not_sign_further_certificates(authority: Authority, key: ec.EllipticCurvePrivateKey) -> None:
    leaf = x509.load_pem_x509_certificates(certificate(authority, key))[0]
    other = ec.generate_private_key(ec.SECP256R1())
    forged = Authority(leaf, key).issue(other.public_key(), PeerKind.DEVICE, "watches", NOW, WEEK)
    with pytest.raises(CertificateRefused):
        authority.verify(forged, PeerKind.DEVICE, NOW)


def signed_by_hand(
    authority: Authority, key: ec.EllipticCurvePrivateKey, uris: list[str], purposes: list[x509.ObjectIdentifier]
) -> bytes:
    """A certificate that the authority did sign, with whatever names and purposes."""
    good = x509.load_pem_x509_certificates(certificate(authority, key))[0]
    names = [x509.UniformResourceIdentifier(uri) for uri in uris]
    builder = (
        x509.CertificateBuilder()
        .subject_name(good.subject)
        .issuer_name(good.issuer)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(good.not_valid_before_utc)
        .not_valid_after(good.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=True)
    )
    return builder.sign(authority.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@pytest.mark.parametrize(
    ("uris", "purposes"),
    [
        (["umbel://watches/device/OTHER"], [CLIENT]),
        (["umbel://watches/device/OWN"], [SERVER]),
        (["umbel://watches/device/OWN"], [CLIENT, SERVER]),
        (["umbel://watches/device/OWN", "umbel://phones/device/OWN"], [CLIENT]),
        (["https://watches/device/OWN"], [CLIENT]),
        (["umbel://watches/admin/OWN"], [CLIENT]),
    ],
    ids=["another key's id", "for servers", "for both", "two populations", "another scheme", "unknown kind"],
)
def test_a_signed_certificate_of_another_form_opens_nothing(
    authority: Authority, key: ec.EllipticCurvePrivateKey, uris: list[str], purposes: list[x509.ObjectIdentifier]
) -> None:
    own = id_of_key(key.public_key())
    named = [uri.replace("OWN", own).replace("OTHER", "0" * 32) for uri in uris]
    with pytest.raises(CertificateRefused, match="call with"):
        authority.verify(signed_by_hand(authority, key, named, purposes), PeerKind.DEVICE, NOW)


def test_the_form_made_by_hand_is_otherwise_good(authority: Authority, key: ec.EllipticCurvePrivateKey) -> None:
    uri = f"umbel://watches/device/{id_of_key(key.public_key())}"
    assert authority.verify(signed_by_hand(authority, key, [uri], [CLIENT]), PeerKind.DEVICE, NOW).realm == "watches"


@given(st.binary(max_size=200))
def test_bytes_that_are_no_certificate_are_refused(data: bytes) -> None:
    with pytest.raises(CertificateRefused):
        FIXED.verify(data, PeerKind.DEVICE, NOW)


@given(st.binary(max_size=200))
def test_bytes_that_are_no_request_are_refused(data: bytes) -> None:
    with pytest.raises(BadInput):
        key_of_request(data)


@given(st.integers(0, 8 * 200), st.data())
def test_a_request_with_any_bit_flipped_proves_nothing(position: int, data: st.DataObject) -> None:
    request = bytearray(REQUEST)
    bit = position % (8 * len(request))
    request[bit // 8] ^= 1 << (bit % 8)
    with pytest.raises((MalformedMessage, EnrolmentRefused)):
        key_of_request(bytes(request))


def test_a_request_is_written_in_one_way_only() -> None:
    """A signature that ends in a bit of 0 would be as good without it, were its last bit said not to count."""
    requests = (make_request(ec.generate_private_key(ec.SECP256R1())) for _ in range(100))
    request = bytearray(next(one for one in requests if one[-1] % 2 == 0))
    before = -1 - len(x509.load_der_x509_csr(bytes(request)).signature)
    assert request[before] == 0
    request[before] = 1
    with pytest.raises(EnrolmentRefused):
        key_of_request(bytes(request))


def test_a_request_proves_its_key(key: ec.EllipticCurvePrivateKey) -> None:
    assert id_of_key(key_of_request(make_request(key))) == id_of_key(key.public_key())


@pytest.mark.parametrize(
    "other", [rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate()], ids=["rsa", "ed25519"]
)
def test_keys_that_tls_or_we_do_not_take_are_refused(other: rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey) -> None:
    algorithm = hashes.SHA256() if isinstance(other, rsa.RSAPrivateKey) else None
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(other, algorithm)
    with pytest.raises(EnrolmentRefused, match="P-256"):
        key_of_request(request.public_bytes(serialization.Encoding.DER))


def test_an_authority_survives_its_files(authority: Authority) -> None:
    again = Authority.from_pem(authority.certificate_pem, authority.key_pem)
    assert again.certificate == authority.certificate
    assert "PRIVATE" not in repr(again)


def test_files_of_two_authorities_do_not_make_one(authority: Authority) -> None:
    with pytest.raises(CertificateRefused, match="doesn't belong"):
        Authority.from_pem(authority.certificate_pem, Authority.create("other", NOW).key_pem)


FIXED = Authority.create("fixed", NOW)
REQUEST = make_request(ec.generate_private_key(ec.SECP256R1()))
