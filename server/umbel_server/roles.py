"""What an operator may ask, by role: a table that refuses whatever it doesn't name.

Stopping is every operator's; going needs an approver beside (`umbel_server.rollout` asks for a second person); keys
and signatures are a release signer's, the log an auditor's. An admin may call everything, and is still one person.
A caller is a program that asks models over the network, and may do nothing else.
"""

from __future__ import annotations

from enum import Enum
from types import MappingProxyType

from umbel.errors import MalformedMessage, NotAllowed


class Role(Enum):
    """An operator's role."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    APPROVER = "approver"
    RELEASE_SIGNER = "release-signer"
    AUDITOR = "auditor"
    ADMIN = "admin"
    CALLER = "caller"


_EVERYBODY = frozenset(Role) - {Role.CALLER}
_OPERATOR = frozenset({Role.OPERATOR, Role.ADMIN})
_TABLE = (
    (
        _EVERYBODY,
        "ListModels ListTasks GetTask GetTaskDrift GetTaskPrivacy ListRounds GetRound Watch ListVersions GetVersion "
        "GetLineage ListReleases GetRelease ListDevices GetDevice GetStatus GetListing GetRollout ListRollouts "
        "PreviewRollout",
    ),
    (
        _OPERATOR,
        "AddModel AddHoldout CreateTask PauseTask ResumeTask StopTask Publish ExportVersion CreateTokens "
        "PrepareRelease CreateRollout EditRollout",
    ),
    (_OPERATOR | {Role.APPROVER}, "GoOnRollout StopRollout HoldReleases"),
    (frozenset({Role.APPROVER, Role.ADMIN}), "DecideRollout LiftHold"),
    (frozenset({Role.RELEASE_SIGNER, Role.ADMIN}), "DraftListing SubmitListing"),
    (frozenset({Role.AUDITOR, Role.ADMIN}), "ListAudit VerifyAudit GetCheckpoint"),
    (frozenset({Role.ADMIN}), "RevokeDevice AddOperator ListOperators RevokeOperator"),
    (_EVERYBODY | {Role.CALLER}, "ServerLive ServerReady ServerMetadata ModelReady ModelMetadata RepositoryIndex"),
    (_OPERATOR | {Role.CALLER}, "ModelInfer"),
)
ALLOWED = MappingProxyType({method: roles for roles, methods in _TABLE for method in methods.split()})
"""Method of AdminService or GRPCInferenceService -> the roles that may call it."""


def require_role(method: str, role: Role) -> None:
    """Raise `NotAllowed` unless `role` may call `method`; a method without a row is nobody's."""
    allowed = ALLOWED.get(method)
    if allowed is None:
        raise NotAllowed(f"{method} isn't open to any role")
    if role not in allowed:
        wanted = " or ".join(one.value for one in Role if one in allowed)
        raise NotAllowed(f"{method} needs the role {wanted}, yours is {role.value}; ask an admin")


def reaches(method: str, role: Role) -> bool:
    """Whether `role` may call `method`."""
    return role in ALLOWED.get(method, ())


def parse_role(text: str) -> Role:
    """The role of this name.

    Raises:
        MalformedMessage: there is no such role.
    """
    try:
        return Role(text)
    except ValueError as error:
        known = ", ".join(role.value for role in Role)
        raise MalformedMessage(f"no role {text[:80]!r}; there are {known}") from error
