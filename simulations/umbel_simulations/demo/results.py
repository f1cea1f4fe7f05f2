"""What a run of the demo gave, as values and as `report.json`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RoundResult:
    """One training round that ended in a version: its accuracy is the new version's, on held-back windows."""

    round: int
    accuracy: float
    reports: int
    seconds: float
    version: int
    bytes_up: int
    bytes_per_weight: float
    """Of one sealed report."""


@dataclass(frozen=True, slots=True)
class DeviceResult:
    """One device at the end, as its own process told it."""

    id: str
    name: str
    examples: int
    held_back: int
    global_accuracy: float
    personal_accuracy: float
    peak_memory_mb: float
    runtime: str
    modules: tuple[str, ...]
    """Which of torch, tensorflow and flwr the process had imported."""
    bytes_up: int
    bytes_down: int
    shapes: dict[str, int]
    """How often each session shape occurred."""


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """One rollout at its end."""

    rollout: str
    release: int
    stage: str
    wave: int
    """The last wave that was opened, counted from 1."""
    most_devices: int
    """How many devices answered with the release at a time, at most."""
    devices_left: int
    """How many do at the end."""
    gate: str
    """What the last gate said, in words."""
    seconds: float


@dataclass(frozen=True, slots=True)
class Results:
    """The whole run. Accuracies are means over devices, each weighing the same."""

    rounds: tuple[RoundResult, ...]
    devices: tuple[DeviceResult, ...]
    seconds: float
    trust_mode: str
    rollouts: tuple[RolloutResult, ...] = ()
    audit_rows: int = 0
    """Rows of the audit log, all intact and as witnessed at the end."""

    @property
    def bytes_up(self) -> int:
        """All that devices sent."""
        return sum(device.bytes_up for device in self.devices)

    @property
    def bytes_down(self) -> int:
        """All that devices fetched and were told."""
        return sum(device.bytes_down for device in self.devices)

    @property
    def shapes(self) -> Counter[str]:
        """How often each session shape occurred over the fleet."""
        return sum((Counter(device.shapes) for device in self.devices), Counter())

    @property
    def global_accuracy(self) -> float:
        """Mean accuracy of the newest version on the devices' held-back windows."""
        return _mean([device.global_accuracy for device in self.devices])

    @property
    def personal_accuracy(self) -> float:
        """Mean accuracy of the model that each device tuned for itself."""
        return _mean([device.personal_accuracy for device in self.devices])

    def write_json(self, path: Path) -> None:
        """Write `report.json`: the fields, and the totals, at the top level."""
        totals = ("global_accuracy", "personal_accuracy", "bytes_up", "bytes_down", "shapes")
        tree = asdict(self) | {name: getattr(self, name) for name in totals}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree, indent=2) + "\n")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0
