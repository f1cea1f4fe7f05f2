"""What the demo shows while it runs, and at its end: rich tables made of what coordinator and devices tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from umbel.v1 import admin_pb2 as pb
from umbel_simulations import terminal
from umbel_simulations.demo.page import device_row, megabytes
from umbel_simulations.demo.results import Results

ROUNDS_SHOWN = 8


@dataclass(slots=True)
class Board:
    """The live display; whoever runs the demo puts in what it has heard."""

    wanted_rounds: int
    doing: str = "starting"
    status: pb.Status = field(default_factory=pb.Status)
    rounds: Sequence[pb.Round] = ()
    """Training rounds, newest first."""
    devices_ready: int = 0
    devices: int = 0

    def __rich__(self) -> RenderableType:
        done = sum(entry.state == "completed" for entry in self.rounds)
        bar = ProgressBar(total=self.wanted_rounds, completed=done, width=40)
        head = Table.grid(padding=(0, 2))
        head.add_row(Text(self.doing, style="bold"), bar, f"{done}/{self.wanted_rounds} rounds")
        parts: list[RenderableType] = [head, _round_table(self.rounds[:ROUNDS_SHOWN]), self._fleet()]
        parts += [Text(warning, style="yellow") for warning in self.status.warnings]
        return Panel(Group(*parts), title="Umbel: a fleet that learns where its data is", border_style="cyan")

    def _fleet(self) -> Table:
        table = Table.grid(padding=(0, 2))
        status = self.status
        table.add_row("devices", f"{status.devices} enrolled of {self.devices}, {self.devices_ready} hold a release")
        table.add_row("traffic", f"{megabytes(status.bytes_up)} up, {megabytes(status.bytes_down)} down")
        most = sorted(status.shapes.items(), key=lambda entry: -entry[1])[:5]
        table.add_row("sessions", Text("   ".join(f"{shape} × {count}" for shape, count in most) or "none ended yet"))
        return table


def _round_table(rounds: Sequence[pb.Round]) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    for heading in ("round", "state", "reports", "accuracy", "version", "seconds", "sealed updates", "bytes/weight"):
        table.add_column(heading, justify="left" if heading == "state" else "right", min_width=8)
    for entry in rounds:
        table.add_row(
            str(entry.number),
            entry.state,
            f"{entry.reports} of {entry.goal}",
            f"{entry.candidate_accuracy:.1%}" if entry.HasField("candidate_accuracy") else "",
            str(entry.version) if entry.version else "",
            f"{entry.seconds:.1f}" if entry.HasField("seconds") else "",
            megabytes(entry.bytes_up),
            f"{entry.bytes_per_weight:.2f}" if entry.HasField("bytes_per_weight") else "",
        )
    return table


def summary(results: Results) -> RenderableType:
    """The table per device that a run ends with."""
    table = Table(title="Accuracy on each device's held-back windows", title_justify="left", header_style="bold")
    for heading in ("device", "train", "held", "global", "personal", "runtime", "memory"):
        table.add_column(heading, justify="left" if heading == "device" else "right", overflow="fold")
    for device in results.devices:
        table.add_row(*device_row(device))
    table.add_section()
    examples, held_back = (sum(getattr(d, name) for d in results.devices) for name in ("examples", "held_back"))
    most = max((device.peak_memory_mb for device in results.devices), default=0.0)
    means = (f"{results.global_accuracy:.1%}", f"{results.personal_accuracy:.1%}")
    table.add_row("mean, sum or most", str(examples), str(held_back), *means, "", f"{most:.0f} MB", style="bold")
    return table


def rollout_table(results: Results) -> RenderableType:
    """How the rollouts ended."""
    head = ("rollout", "release", "ended", "in wave", "devices at most", "devices left on it", "seconds")
    rows = [
        (
            one.rollout,
            *map(str, (one.release, one.stage, one.wave, one.most_devices, one.devices_left)),
            f"{one.seconds:.1f}",
        )
        for one in results.rollouts
    ]
    return terminal.table(head, rows, title=Text("Rollouts"))
