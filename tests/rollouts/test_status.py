"""`umbel-device status` shows slots, releases and why, for every way that a release can go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.rollouts.fleet import AUTHOR, MODEL, Fleet
from umbel_client.cli import main
from umbel_client.enrolment import save_identity
from umbel_client.slots import TRIES, Slots


def told(fleet: Fleet, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    kit = fleet.devices[0].kit
    save_identity(kit.home, kit.identity)
    capsys.readouterr()
    assert main(["--home", str(kit.home), "status", *options]) == 0
    return capsys.readouterr().out


async def test_status_tells_what_answers_what_became_of_each_release_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = Fleet(tmp_path, devices=1)
    assert "nothing answers yet" in told(fleet, capsys)

    async def publish(version: int) -> int:
        number: int = fleet.verbs.publish(MODEL, version, "stable", AUTHOR)
        await fleet.visits()
        return number

    first = await publish(fleet.good_version())
    assert f"release {first} (version 2), on trial since 2026-" in told(fleet, capsys)
    await fleet.visits(40.0)
    assert f"release {first} (version 2), committed" in told(fleet, capsys)
    worse = await publish(fleet.broken_version())
    third = await publish(fleet.good_version())
    for _ in range(TRIES):
        fleet.devices[0].kit.shelf.change(Slots.loading)
    fleet.reopen(0)
    await fleet.visits()

    tree: dict[str, Any] = json.loads(told(fleet, capsys, "--json"))
    assert [(it["release"], it["outcome"]) for it in tree["releases"]] == [
        (first, "adopted"), (first, "committed"), (worse, "kept-own"), (third, "adopted"), (third, "reverted"),
    ]  # fmt: skip
    assert "held-back examples" in tree["releases"][2]["reason"]
    assert "took its process down" in tree["releases"][4]["reason"]
    assert tree["slots"]["active"]["release"] == first and tree["slots"]["trial"] is None
    assert len(tree["slots"]["blocked"]) == 1
    words = told(fleet, capsys)
    assert f"release {first} (version 2), committed; 1 bundles blocked" in words.replace("made this device's own; ", "")
    assert f"release {third}  reverted  it took its process down {TRIES} times" in words
    assert words.index("reverted") < words.index("kept-own"), "newest first"
