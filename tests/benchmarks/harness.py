"""What the benchmarks share: a table to fill, a process of its own to measure in, and the peak of its memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Table:
    """The outcome of one benchmark."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str | float, ...]]
    ratios: dict[str, float]
    """What is compared from machine to machine, by a name that says what it is."""
    aims: dict[str, tuple[str, float]] = field(default_factory=dict)
    """For some of the ratios: "<=" or ">=", and the figure aimed at."""

    def met(self, name: str) -> bool | None:
        if name not in self.aims:
            return None
        sign, bound = self.aims[name]
        return self.ratios[name] <= bound if sign == "<=" else self.ratios[name] >= bound

    def to_tree(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "rows": [dict(zip(self.columns, row, strict=True)) for row in self.rows],
            "ratios": self.ratios,
            "aims": {name: {"aim": " ".join(map(str, aim)), "met": self.met(name)} for name, aim in self.aims.items()},
        }

    def __str__(self) -> str:
        cells = [self.columns, *[tuple(_shown(value) for value in row) for row in self.rows]]
        widths = [max(len(row[column]) for row in cells) for column in range(len(self.columns))]
        lines = [self.title, "-" * len(self.title)]
        for row in cells:
            aligned = [
                cell.ljust(widths[0]) if not index else cell.rjust(widths[index]) for index, cell in enumerate(row)
            ]
            lines.append("  ".join(aligned).rstrip())
        for name, value in self.ratios.items():
            aim = "" if name not in self.aims else f"   (aim: {self.aims[name][0]} {_shown(self.aims[name][1])}"
            verdict = {None: "", True: ", met)", False: ", MISSED)"}[self.met(name)]
            lines.append(f"  {name}: {_shown(value)}{aim}{verdict}")
        return "\n".join(lines) + "\n"


def _shown(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def child(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m module arguments` and read the JSON object of its last line."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def peak_mb() -> float:
    """The most memory that this process has had resident, in MB (10^6 bytes).

    From /proc, since `getrusage` counts what the parent had before this process was its own.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status tells no VmHWM")


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
