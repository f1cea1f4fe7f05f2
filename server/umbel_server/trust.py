"""How far a coordinator's private rounds can be believed: it depends on who runs the helper."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Trust:
    """Who runs the helper: how far a private round can be believed."""

    operator: str = ""
    """The other party; empty: the one that runs the coordinator too."""

    @property
    def is_development(self) -> bool:
        """Whether one party holds both halves."""
        return not self.operator

    @property
    def words(self) -> str:
        """For people."""
        if self.is_development:
            return "development trust: one party runs leader and helper, and could combine what they hold"
        return f"split trust: the helper is run by {self.operator}"
