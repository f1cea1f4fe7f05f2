"""A rollout as a person watches it: its facts, its waves with a bar each, and what the gate says."""

from __future__ import annotations

import json
from typing import Any, Final

from rich.console import Group
from rich.table import Table

from umbel.v1 import admin_pb2 as pb
from umbel_server.cli import output

BAR: Final = 20
"""Characters of a full bar."""
_ORDER: Final = ("committed", "adopted", "kept-own", "failed", "reverted", "waiting", "withdrawn")
_ANSWERED: Final = frozenset(_ORDER[:5])
_SETTLED: Final = ("succeeded", "rolled-back", "denied", "canceled", "superseded")


def picture(found: pb.Rollout) -> Group:
    """The whole of it."""
    return Group(facts_table(found), "", waves_table(found), "", found.judgement or "no gate has said anything yet")


def facts_table(found: pb.Rollout) -> Table:
    """What was written, who let it go, and where it stands."""
    spec = spec_of(found)
    back = spec["revert_release"] or "–"
    arms = ", ".join(f"{arm['release']} ({arm['weight']:g})" for arm in spec["arms"])
    facts = [
        ("rollout", found.id),
        ("light", found.light),
        ("stage", found.stage),
        ("release", f"{spec['release']} of {spec['model']} ({spec['channel']}), back with {back}"),
        *([("arms", arms)] if arms else []),
        ("wave", wave_in_words(found)),
        ("devices", counts_in_words(found)),
        ("revision", str(found.revision)),
        ("subject", found.subject),
        ("author", found.author),
        ("approved by", found.approved_by or "–"),
        ("reason", found.reason or "–"),
    ]
    return output.table("", [("", lambda fact: fact[0]), ("", lambda fact: fact[1])], facts)


def waves_table(found: pb.Rollout) -> Table:
    """A line for each wave: how many devices it takes, how many have answered, and what."""
    columns: list[output.Column] = [
        ("wave", lambda it: f"{it.wave + 1} ({it.percent:g} %)"),
        ("", lambda it: _standing(found, it.wave)),
        ("devices", lambda it: str(it.devices)),
        ("answered", lambda it: _bar(it)),
        ("", lambda it: ", ".join(f"{it.counts[name]} {name}" for name in _ORDER if name in it.counts) or "–"),
        ("its gate", lambda it: _gate_times(found, it.wave)),
    ]
    return output.table("", columns, found.waves)


def wave_in_words(found: pb.Rollout) -> str:
    """Which wave is open, of how many."""
    waves = spec_of(found)["waves"]
    return "–" if found.wave < 0 else f"{found.wave + 1} of {len(waves)} ({waves[found.wave]['percent']:g} %)"


def counts_in_words(found: pb.Rollout) -> str:
    """Devices by outcome and release."""
    return ", ".join(f"{it.devices} {it.outcome} ({it.release})" for it in found.counts) or "–"


def spec_of(found: pb.Rollout) -> dict[str, Any]:
    """What an approval covers, as plain values."""
    spec: dict[str, Any] = json.loads(found.spec)
    return spec


def _standing(found: pb.Rollout, wave: int) -> str:
    if wave > found.wave:
        return "waits" if found.stage not in _SETTLED else "never opened"
    return "open" if wave == found.wave and found.stage not in _SETTLED else "passed" if wave < found.wave else "ended"


def _bar(progress: pb.WaveProgress) -> str:
    answered = sum(count for outcome, count in progress.counts.items() if outcome in _ANSWERED)
    filled = round(BAR * min(1.0, answered / progress.devices)) if progress.devices else 0
    return f"{'█' * filled}{'░' * (BAR - filled)} {answered}"


def _gate_times(found: pb.Rollout, wave: int) -> str:
    if wave != found.wave or found.stage != "running":
        return ""
    open_wave = spec_of(found)["waves"][wave]
    soaked, last = (
        output.instant(found.wave_opened_at_ms + round(open_wave[name] * 1000))
        for name in ("soak_seconds", "deadline_seconds")
    )
    return f"may pass from {soaked}, decides by {last} UTC"
