"""The devices of the demo: a folder and a process each, told apart by whose recordings they hold."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from umbel_simulations.demo import device
from umbel_simulations.demo.programs import Programs
from umbel_simulations.demo.results import DeviceResult
from umbel_simulations.smartwatch import Wearer

SETTINGS = "device.toml"
LITERT = b'\n# One device in four runs the other runtime, in the same rounds.\n[runtime]\nname = "litert"\n'


@dataclass(frozen=True, slots=True)
class Member:
    """One device of the fleet."""

    name: str
    home: Path

    def status(self) -> dict[str, Any] | None:
        """What its agent wrote after its last visit; None before the first."""
        try:
            tree: dict[str, Any] = json.loads((self.home / "status.json").read_bytes())
        except FileNotFoundError:
            return None
        return tree

    def judged(self) -> int:
        """The newest release that it has tested."""
        status = self.status()
        return int(status["release"]) if status else 0

    def answers_with(self) -> int:
        """The release that answers; 0 before the first."""
        status = self.status()
        active = status["slots"]["active"] if status else None
        return int(active["release"]) if active else 0

    def result(self) -> DeviceResult:
        """How it stands, once it has tested a release."""
        status = self.status() or {}
        return DeviceResult(
            id=status["id"],
            name=self.name,
            examples=status["examples"]["training"],
            held_back=status["examples"]["held_back"],
            global_accuracy=status["global_accuracy"],
            personal_accuracy=status["personal_accuracy"],
            peak_memory_mb=status["peak_memory_mb"],
            runtime=status["runtime"],
            modules=tuple(status["modules"]),
            bytes_up=status["bytes_up"],
            bytes_down=status["bytes_down"],
            shapes=status["session_shapes"],
        )


def settle(
    root: Path, wearers: Sequence[Wearer], codes: Sequence[str], card: Path | None, tokens: Sequence[str]
) -> list[Member]:
    """Give each wearer's device a folder with its settings, what it enrols with, and its own recordings.

    Args:
        root: where the folders go.
        wearers: whose devices.
        codes: the coordinator's enrolment codes, one each.
        card: the helper's card, which every device pins; None without a helper.
        tokens: the helper's tokens, one each; none without a helper.
    """
    members = []
    for place, (wearer, code) in enumerate(zip(wearers, codes, strict=True)):
        home = root / wearer.name
        home.mkdir(parents=True)
        _keep(home / device.CODE, code)
        if card:
            _keep(home / device.HELPER_TOKEN, tokens[place])
            shutil.copyfile(card, home / device.HELPER_CARD)
        with (files(__package__) / SETTINGS).open("rb") as source, (home / SETTINGS).open("wb") as target:
            shutil.copyfileobj(source, target)
            if place % 4 == 3:
                target.write(LITERT)
        _hand_over(home / device.RECORDINGS, wearer)
        members.append(Member(wearer.name, home))
    return members


def _keep(path: Path, secret: str) -> None:
    path.write_text(secret)
    path.chmod(0o600)


def _hand_over(path: Path, wearer: Wearer) -> None:
    parts = (wearer.training, wearer.held_back)
    np.savez(
        path,
        x=np.concatenate([part.x for part in parts]),
        y=np.concatenate([part.y for part in parts]),
        held_back=np.repeat([False, True], [len(part) for part in parts]),
    )


def start(members: Sequence[Member], programs: Programs) -> None:
    """Start a process for each device."""
    for member in members:
        programs.start(member.name, [sys.executable, "-m", device.__name__, str(member.home)])
