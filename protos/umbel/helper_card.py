"""A helper's visiting card: all that others need to reach it and to know it again. Nothing in it is secret.

The helper's operator hands it out; coordinator and devices keep it. A device never takes it from the coordinator.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from umbel import fields
from umbel.errors import MalformedMessage
from umbel.participants import KEY_BYTES


@dataclass(frozen=True, slots=True)
class HelperCard:
    """Address and keys of one helper."""

    address: str
    """host:port"""
    identity: bytes
    """Ed25519, raw: countersigns descriptors and signs sums."""
    certificate: bytes
    """Of its TLS port, PEM; pinned as it is."""
    operator: str = ""
    """Who runs it, in words."""

    def to_text(self) -> str:
        """As JSON, for a file."""
        tree = {
            "address": self.address,
            "identity": self.identity.hex(),
            "certificate": self.certificate.decode(),
            "operator": self.operator,
        }
        return json.dumps(tree, indent=1) + "\n"

    @classmethod
    def from_text(cls, text: str | bytes) -> HelperCard:
        """Read `to_text`; raises `MalformedMessage`."""
        try:
            tree = json.loads(text)
            card = cls(
                address=fields.text(tree["address"], "a helper's address"),
                identity=bytes.fromhex(tree["identity"]),
                certificate=tree["certificate"].encode(),
                operator=fields.text(tree["operator"], "a helper's operator"),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MalformedMessage(f"not a helper's card: {type(error).__name__}: {error}") from error
        if len(card.identity) != KEY_BYTES or not card.address.rpartition(":")[2].isdigit():
            raise MalformedMessage("a helper's card needs an address host:port and a key of 64 hex digits")
        return card
