"""What a device tells about itself, to its owner: the content of `status.json` and of `umbel-device status`."""

from __future__ import annotations

import datetime
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from umbel_client.enrolment import Identity
from umbel_client.examples import ExampleStore
from umbel_client.files import Disk
from umbel_client.idle import IdlePolicy
from umbel_client.slots import Slot, Slots
from umbel_client.state import DeviceState, Known

FILE: Final = "status.json"
HEAVY: Final = ("torch", "tensorflow", "flwr")
"""What a device must never import; the agent says so itself."""


def describe(
    identity: Identity,
    known: Known,
    state: DeviceState,
    slots: Slots,
    examples: ExampleStore,
    policy: IdlePolicy,
    now: float,
) -> dict[str, Any]:
    """The facts about a device that stand in its home, ready for JSON."""
    held, scores, used = examples.stats(now), state.scores, state.history(0, now)
    return {
        "id": identity.device_id,
        "population": identity.population,
        "channel": identity.channel,
        "model": known.model,
        "release": state.judged,
        "slots": {
            "active": _slot(slots.active),
            "previous": _slot(slots.previous),
            "personal": slots.personal is not None,
            "trial": None
            if slots.trial is None
            else {"since": slots.trial.since, "tries_left": slots.trial.tries_left},
            "blocked": list(slots.blocked),
        },
        "releases": [asdict(decided) for decided in state.decided],
        "global_accuracy": scores.global_,
        "personal_accuracy": scores.personal,
        "serving_accuracy": scores.serving,
        "judged_release": scores.release,
        "judged_examples": scores.examples,
        "examples": {
            "training": held.training,
            "held_back": held.held_back,
            "bytes": held.bytes,
            "left_out": state.left_out,
        },
        "visits": state.visits,
        "contributions": state.contributions,
        "last_contribution": state.last_contribution,
        "session_shapes": dict(state.shapes),
        "bytes_up": state.bytes_up,
        "bytes_down": state.bytes_down,
        "fetched": asdict(state.fetched),
        "budgets": {
            "bytes_today": used.bytes_today,
            "max_bytes_per_day": policy.max_bytes_per_day,
            "seconds_today": round(used.seconds_today, 3),
            "max_seconds_per_day": policy.max_seconds_per_day,
        },
        "next_wake": state.next_wake,
        "last_error": state.last_error,
    }


def of_this_process(runtime: str) -> dict[str, Any]:
    """What only the agent's own process knows."""
    return {
        "runtime": runtime,
        "pid": os.getpid(),
        "peak_memory_mb": peak_memory_mb(),
        "modules": [name for name in HEAVY if name in sys.modules],
    }


def peak_memory_mb() -> float:
    """The most memory (resident, MB of 10^6 bytes) that this process has had.

    Not `getrusage`: on Linux that counts what the parent had when it started this process.
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) * 1024 / 1e6, 1)
    except OSError:
        pass
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


def write_report(home: Path, tree: dict[str, Any], disk: Disk) -> None:
    """Replace the home's `status.json`."""
    disk.write(home / FILE, json.dumps(tree, indent=1).encode(), mode=0o644, durable=False)


def read_report(home: Path) -> dict[str, Any]:
    """What the agent wrote last; empty if it never did."""
    try:
        tree = json.loads((home / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def slots_in_words(slots: dict[str, Any]) -> str:
    """What answers, what answered before, and what never will again."""
    active, trial = slots["active"], slots["trial"]
    words = [_named(active) if active else "nothing answers yet"]
    if trial is not None:
        words[0] += f", on trial since {instant(trial['since'])}, {trial['tries_left']} tries left"
    elif active:
        words[0] += ", committed"
    if slots["personal"]:
        words.append("made this device's own")
    if slots["previous"]:
        words.append(f"before it {_named(slots['previous'])}")
    if slots["blocked"]:
        words.append(f"{len(slots['blocked'])} bundles blocked")
    return "; ".join(words)


def releases_in_words(releases: list[dict[str, Any]]) -> list[str]:
    """What became of the last releases, and why: a line each, newest first."""
    return [
        f"{instant(it['at'])}  release {it['release']}  {it['outcome']}  {it['reason']}".rstrip()
        for it in reversed(releases)
    ]


def instant(seconds: float) -> str:
    """An instant as a person reads it."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _named(slot: dict[str, Any]) -> str:
    return f"release {slot['release']} (version {slot['version']})"


def _slot(slot: Slot | None) -> dict[str, Any] | None:
    if slot is None:
        return None
    return {"model": slot.model, "release": slot.number, "version": slot.version, "bundle": slot.bundle}
