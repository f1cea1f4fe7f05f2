"""The Python of docs/how-to/embed-a-device.md works as it stands there."""

from __future__ import annotations

import asyncio
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.client.coordinator import Coordinator
from tests.client.grpc_peer import serving
from tests.client.recordings import recordings
from umbel.clock import SystemClock
from umbel.plan import Plan
from umbel_client import Device
from umbel_client.config import load_config
from umbel_client.idle import Waiting

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "embed-a-device.md").read_text("utf-8")


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def app() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec("\n".join(fenced("python")), names)  # the page itself is what is tested
    return names


async def test_an_app_as_the_page_shows_it(app: dict[str, Any], tmp_path: Path) -> None:
    home = tmp_path / "home"
    async with serving(Coordinator(SystemClock().now)) as peer:
        peer.coordinator.publish()
        peer.coordinator.tasks = [Plan(epochs=1)]
        await asyncio.to_thread(app["first_start"], home, peer.code().to_text())
        device: Device = app["open_device"](home)
        inputs, classes = recordings(20, "app")
        for window, label in zip(inputs, classes, strict=True):
            app["on_label"](device, window, label, "anna")
        assert isinstance(device.verdict(), Waiting)
        app["on_battery_changed"](0.9, False)
        app["on_network_changed"](False)
        app["on_screen"](True)
        assert app["why_not"](device) == ()
        assert await app["background_job"](device) > 0
        assert len(peer.coordinator.updates) == 1
        assert sum(app["on_recording"](device, inputs[0]).values()) == pytest.approx(1.0)
        app["on_screen"](False)
        assert app["why_not"](device) == ("the device is in use",)
        assert app["on_delete_my_data"](device, "anna") == 20


def test_the_settings_on_the_page_are_taken(tmp_path: Path) -> None:
    [settings] = fenced("toml")
    (tmp_path / "device.toml").write_text(settings)
    config = load_config(tmp_path)
    assert config.policy.quiet_hours == ((1320, 420),)
    assert config.personal.hyperparameters == tomllib.loads(settings)["personal"]["hyperparameters"]
