"""Operators: added and revoked by admins, allowed what their role allows, and never without one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import String

from umbel.clock import DAY
from umbel.errors import (
    AlreadyExists,
    CertificateRefused,
    EnrolmentRefused,
    MalformedMessage,
    NotAllowed,
    NotFound,
    OutOfBounds,
    WrongState,
)
from umbel.identity import DeviceId
from umbel.oip import open_inference_pb2
from umbel.v1 import admin_pb2
from umbel_server.authority import Authority, PeerKind, make_request
from umbel_server.operators import FIRST, MAX_NAME_CHARS, REALM, Operator, Operators
from umbel_server.roles import ALLOWED, Role, parse_role, reaches, require_role
from umbel_server.store import Store
from umbel_server.tables import AUDIT, HOLDS, OPERATORS, REQUESTS, TOKENS
from umbel_server.tokens import MAX_SUBJECT_CHARS

NOW = 1_700_000_000.0
AUTHORITY = Authority.create("operators", NOW)


@dataclasses.dataclass
class HandClock:
    instant: float = NOW

    def now(self) -> float:
        return self.instant


def fresh_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def first_certificate() -> bytes:
    return AUTHORITY.issue(fresh_key().public_key(), PeerKind.OPERATOR, REALM, NOW, DAY)


@pytest.fixture
def store(sqlite_url: str) -> Iterator[Store]:
    """On SQLite alone: the statements are of the kinds that test_access.py tries on both databases."""
    store = Store.open(sqlite_url)
    yield store
    store.close()


@pytest.fixture
def operators(store: Store) -> Operators:
    return Operators(store, AUTHORITY, HandClock(), 90 * DAY)


@pytest.fixture
def admin(operators: Operators) -> Operator:
    certificate = first_certificate()
    operators.bootstrap(certificate)
    return operators.authorize("ListOperators", certificate)


def test_the_table_names_every_method_and_no_other() -> None:
    services = [
        admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
        open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
    ]
    methods = [method.name for service in services for method in service.methods]
    assert sorted(ALLOWED) == sorted(methods), "a name that both services had would be allowed by one of them for both"


def test_a_caller_sees_nothing_of_what_operators_do() -> None:
    service = admin_pb2.DESCRIPTOR.services_by_name["AdminService"]
    assert not any(reaches(method.name, Role.CALLER) for method in service.methods)


def test_a_method_without_a_row_is_nobodys() -> None:
    with pytest.raises(NotAllowed):
        require_role("DropEverything", Role.ADMIN)
    assert not any(reaches("DropEverything", role) for role in Role)


def test_going_and_stopping_and_signing_and_looking_are_different_peoples() -> None:
    assert Role.OPERATOR not in ALLOWED["DecideRollout"]
    assert Role.APPROVER not in ALLOWED["CreateRollout"]
    assert {Role.OPERATOR, Role.APPROVER} <= ALLOWED["StopRollout"]
    assert ALLOWED["SubmitListing"] == {Role.RELEASE_SIGNER, Role.ADMIN}
    assert Role.OPERATOR not in ALLOWED["ListAudit"]
    assert Role.AUDITOR not in ALLOWED["StopRollout"]


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("method", sorted(ALLOWED))
def test_a_role_reaches_as_far_as_the_table_says(method: str, role: Role) -> None:
    if role in ALLOWED[method]:
        require_role(method, role)
    else:
        with pytest.raises(NotAllowed, match=method):
            require_role(method, role)


def test_only_the_first_certificate_of_an_empty_store_makes_an_admin(operators: Operators, admin: Operator) -> None:
    assert (admin.name, admin.role) == (FIRST, Role.ADMIN)
    second = first_certificate()
    operators.bootstrap(second)
    with pytest.raises(CertificateRefused):
        operators.authorize("GetStatus", second)


def test_a_foreign_certificate_does_not_become_the_first_admin(operators: Operators) -> None:
    foreign = Authority.create("operators", NOW)
    with pytest.raises(CertificateRefused):
        operators.bootstrap(foreign.issue(fresh_key().public_key(), PeerKind.OPERATOR, REALM, NOW, DAY))
    assert operators.all() == []


def test_whoever_gets_in_has_a_name_that_the_store_has_room_for(operators: Operators, admin: Operator) -> None:
    """PostgreSQL refuses what is longer than its column: nothing that such an operator does could be written down."""
    longest, _ = operators.add(admin, "a" * MAX_NAME_CHARS, Role.OPERATOR, make_request(fresh_key()))
    person = dataclasses.replace(longest, kind="token", name="a" * MAX_SUBJECT_CHARS)
    for column in (AUDIT.c.actor, REQUESTS.c.actor, TOKENS.c.created_by, OPERATORS.c.added_by, HOLDS.c.actor):
        assert isinstance(column.type, String) and column.type.length is not None
        assert max(len(longest.actor), len(person.actor)) <= column.type.length
    with pytest.raises(OutOfBounds, match="91 characters"):
        operators.add(admin, "a" * (MAX_NAME_CHARS + 1), Role.OPERATOR, make_request(fresh_key()))


def test_an_operator_is_known_after_a_restart(operators: Operators, admin: Operator, store: Store) -> None:
    added, certificate = operators.add(admin, "ada", Role.VIEWER, make_request(fresh_key()))
    again = Operators(store, AUTHORITY, HandClock(), 90 * DAY)
    assert again.authorize("GetStatus", certificate) == added
    with pytest.raises(NotAllowed):
        again.authorize("CreateTask", certificate)


def test_a_revoked_operator_is_refused_at_once_and_after_a_restart(
    operators: Operators, admin: Operator, store: Store
) -> None:
    _, certificate = operators.add(admin, "ada", Role.OPERATOR, make_request(fresh_key()))
    operators.revoke(admin, "ada")
    for one in (operators, Operators(store, AUTHORITY, HandClock(), 90 * DAY)):
        with pytest.raises(CertificateRefused, match="revoked"):
            one.authorize("GetStatus", certificate)


def test_a_signed_certificate_without_a_row_opens_nothing(operators: Operators, admin: Operator) -> None:
    with pytest.raises(CertificateRefused, match="known"):
        operators.authorize("GetStatus", first_certificate())


def test_no_certificate_opens_nothing(operators: Operators) -> None:
    with pytest.raises(CertificateRefused, match="an operator's certificate"):
        operators.authorize("GetStatus", None)


def test_the_last_admin_stays(operators: Operators, admin: Operator) -> None:
    with pytest.raises(WrongState, match="last admin"):
        operators.revoke(admin, admin.id)
    operators.add(admin, "ada", Role.ADMIN, make_request(fresh_key()))
    assert operators.revoke(admin, admin.id).revoked_at == NOW


def test_revoking_twice_is_revoking_once(operators: Operators, admin: Operator) -> None:
    operators.add(admin, "ada", Role.VIEWER, make_request(fresh_key()))
    assert operators.revoke(admin, "ada") == operators.revoke(admin, "ada")


def test_who_is_not_there_can_not_be_revoked(operators: Operators, admin: Operator) -> None:
    with pytest.raises(NotFound):
        operators.revoke(admin, "nobody")


def test_a_name_is_given_once(operators: Operators, admin: Operator) -> None:
    operators.add(admin, "ada", Role.VIEWER, make_request(fresh_key()))
    with pytest.raises(AlreadyExists):
        operators.add(admin, "ada", Role.VIEWER, make_request(fresh_key()))


def test_a_key_renews_its_certificate_but_does_not_change_its_role(operators: Operators, admin: Operator) -> None:
    request = make_request(fresh_key())
    operators.add(admin, "ada", Role.VIEWER, request)
    operator, certificate = operators.add(admin, "ada", Role.VIEWER, request)
    assert operators.authorize("GetStatus", certificate) == operator
    with pytest.raises(AlreadyExists):
        operators.add(admin, "ada", Role.ADMIN, request)
    operators.revoke(admin, "ada")
    with pytest.raises(AlreadyExists):
        operators.add(admin, "ada", Role.VIEWER, request)


@pytest.mark.parametrize("name", ["", "a b", "ada\n", "x" * 101])
def test_a_bad_name_is_refused(operators: Operators, admin: Operator, name: str) -> None:
    with pytest.raises(MalformedMessage):
        operators.add(admin, name, Role.VIEWER, make_request(fresh_key()))
    assert len(operators.all()) == 1


def test_an_unproven_key_is_refused(operators: Operators, admin: Operator) -> None:
    request = make_request(fresh_key())
    with pytest.raises((MalformedMessage, EnrolmentRefused)):
        operators.add(admin, "ada", Role.VIEWER, request[:-4] + bytes(4))


def test_an_unknown_role_is_named(operators: Operators) -> None:
    with pytest.raises(MalformedMessage, match="viewer, operator, approver, release-signer, auditor, admin"):
        parse_role("root")


def test_ids_are_taken_as_text_too(operators: Operators, admin: Operator) -> None:
    added, _ = operators.add(admin, "ada", Role.VIEWER, make_request(fresh_key()))
    assert operators.revoke(admin, DeviceId(str(added.id))).name == "ada"
