"""What an operator may ask, by role: a table that refuses whatever it doesn't name."""

from __future__ import annotations

from enum import Enum
from types import MappingProxyType

from umbel.errors import MalformedMessage, NotAllowed


class Role(Enum):
    """An operator's role; each may do all that the ones before it may."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMIN = "admin"

    def covers(self, needed: Role) -> bool:
        """Whether this role may do what `needed` may."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


_VIEWER = (
    "ListModels ListTasks GetTask GetTaskPrivacy ListRounds GetRound Watch ListVersions GetVersion GetLineage "
    "ListReleases ListDevices GetDevice GetStatus"
)
_OPERATOR = "AddModel AddHoldout CreateTask PauseTask ResumeTask StopTask Publish ExportVersion CreateTokens"
_ADMIN = "RevokeDevice AddOperator ListOperators RevokeOperator ListAudit VerifyAudit"

NEEDED = MappingProxyType(
    {
        method: role
        for role, methods in ((Role.VIEWER, _VIEWER), (Role.OPERATOR, _OPERATOR), (Role.ADMIN, _ADMIN))
        for method in methods.split()
    }
)
"""AdminService method -> the least role that may call it."""


def require_role(method: str, role: Role) -> None:
    """Raise `NotAllowed` unless `role` may call `method`; a method without a row is nobody's."""
    needed = NEEDED.get(method)
    if needed is None:
        raise NotAllowed(f"{method} isn't open to any role")
    if not role.covers(needed):
        raise NotAllowed(f"{method} needs the role {needed.value}, yours is {role.value}; ask an admin")


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
