"""What an operator hands to a new device: where to enrol, by which token, and whom to trust there, as one string."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Final

from umbel.errors import MalformedMessage

PREFIX: Final = "umbel-enrol-1."


@dataclass(frozen=True, slots=True)
class EnrolmentCode:
    """What an operator hands to a new device, as one string."""

    server: str
    """host:port of EnrolmentService."""
    token: str
    authority: bytes
    """The coordinator's authority, PEM."""

    def __repr__(self) -> str:
        return f"EnrolmentCode(server={self.server!r}, token of {len(self.token)} letters)"

    def to_text(self) -> str:
        """As one line, to be handed over out of band; it holds a secret."""
        tree = {"server": self.server, "token": self.token, "authority": self.authority.decode()}
        return PREFIX + base64.urlsafe_b64encode(json.dumps(tree).encode()).decode()

    @classmethod
    def from_text(cls, text: str) -> EnrolmentCode:
        """Read the line; raises `MalformedMessage` for anything else."""
        try:
            if not text.strip().startswith(PREFIX):
                raise ValueError("it doesn't start with " + PREFIX)
            tree = json.loads(base64.urlsafe_b64decode(text.strip().removeprefix(PREFIX)))
            server, token, authority = (tree[part] for part in ("server", "token", "authority"))
            if not all(isinstance(part, str) and part for part in (server, token, authority)):
                raise TypeError("server, token and authority are text")
            return cls(server, token, authority.encode())
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise MalformedMessage(f"not an enrolment code ({error}); ask the operator for a new one") from error
