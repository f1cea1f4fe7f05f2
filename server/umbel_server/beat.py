"""How often a coordinator looks at what time has brought; whatever devices bring is taken at once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Beat:
    """Intervals, in seconds."""

    tick: float = 0.5
    """Deadlines of rounds."""
    patience: float = 1.0
    """How long the others wait for a task whose helper takes its time."""
    flush: float = 2.0
    """Statistics into the store."""
    steer: float = 1.0
    """Gates and waves of rollouts."""
    look: float = 1.0
    """What other processes have revoked."""
    witness: float = 300.0
    """Checkpoints of the audit log."""
