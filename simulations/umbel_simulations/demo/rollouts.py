"""The demo's two rollouts: a good version climbs its waves, a broken one is stopped in its canary and taken back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from umbel.bundle import Bundle, file_refs, write_bundle
from umbel.manifest import WEIGHTS_FILE
from umbel_simulations.demo.fleet import Member
from umbel_simulations.demo.operator import Operator
from umbel_simulations.demo.results import RolloutResult

APPROVER: Final = "grace"
ENDS: Final = ("succeeded", "rolled-back", "paused", "denied", "canceled", "superseded")
_SPEC: Final = """\
model = "{model}"
channel = "stable"
population = "{population}"
release = {release}
revert_release = {revert}
from_release = {head}

# In a fleet of twenty the canary is a device or two: one failure stops the rollout, and nothing is tested for rarity.
[gate]
least_answers = 1
ceiling_devices = 1
ceiling_share = 0.0
most_kept_own_share = 1.0
margin = 0.0

{waves}"""
_WAVE: Final = """\
[[waves]]
percent = {percent}
soak_seconds = 2.0
deadline_seconds = 120.0
"""
_PERCENT: Final = (5.0, 25.0, 100.0)


@dataclass(frozen=True, slots=True)
class Stage:
    """Where the rollouts happen."""

    author: Operator
    approver: Operator
    folder: Path
    model: str
    population: str
    members: Sequence[Member]
    wait: Callable[[Callable[[], bool]], None]
    """Looks on until something is so."""


def second_person(author: Operator, folder: Path) -> Operator:
    """An approver: who writes a rollout can't let it go alone."""
    author.call("operators", "add", APPROVER, "--role", "approver", "--out", str(folder / APPROVER))
    return Operator(author.state, folder / APPROVER)


def roll_out(stage: Stage, name: str, version: int) -> RolloutResult:
    """Prepare, write, submit, approve and start a rollout of a version, and look on to its end."""
    began = time.monotonic()
    prepared = stage.author.call("releases", "prepare", stage.model, str(version))
    release = int(prepared["number"])
    waves = "\n".join(_WAVE.format(percent=percent) for percent in _PERCENT)
    spec = _SPEC.format(
        model=stage.model, population=stage.population, release=release, revert=prepared["revert"],
        head=prepared["head"], waves=waves,
    )  # fmt: skip
    file = stage.folder / f"rollout-{name}.toml"
    file.write_text(spec)
    stage.author.call("rollouts", "create", name, "--file", str(file))
    stage.author.call("rollouts", "submit", name)
    stage.approver.call("rollouts", "approve", name)
    stage.author.call("rollouts", "start", name)
    shares, found = [], dict[str, Any]()

    def over() -> bool:
        found.update(stage.author.call("rollouts", "show", name))
        shares.append(_holding(stage.members, release))
        return found["stage"] in ENDS

    stage.wait(over)
    if found["stage"] == "succeeded":
        stage.wait(lambda: all(member.judged() >= release for member in stage.members))
    return RolloutResult(
        rollout=name,
        release=release,
        stage=str(found["stage"]),
        wave=int(found["wave"]) + 1,
        most_devices=max([*shares, _holding(stage.members, release)]),
        devices_left=_holding(stage.members, release),
        gate=str(found["judgement"]),
        seconds=round(time.monotonic() - began, 2),
    )


def break_version(stage: Stage, version: int) -> int:
    """Add a version whose weights were spoilt after its maker had noted its golden answers; returns its number."""
    folder = stage.folder / "good-version"
    stage.author.call("versions", "export", stage.model, str(version), str(folder))
    good = Bundle.open(folder)
    files = {name: path.read_bytes() for name, path in good.paths.items()}
    files[WEIGHTS_FILE] = good.weights().scaled(-1.0).to_bytes()
    spoilt = stage.folder / "broken-version"
    write_bundle(spoilt, replace(good.manifest, files=file_refs(files)), files)
    added = stage.author.call("models", "add", str(spoilt), "--name", stage.model, "--parent", str(version))
    return int(added["number"])


def _holding(members: Sequence[Member], release: int) -> int:
    return sum(member.answers_with() == release for member in members)
