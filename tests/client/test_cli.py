"""`umbel-device` as its user drives it: real processes, a real coordinator on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.client.coordinator import Coordinator, retuned
from tests.client.grpc_peer import Peer, serving
from tests.client.recordings import recordings
from umbel.bundle import Bundle
from umbel.clock import SystemClock
from umbel.plan import Plan
from umbel_client.cli import main
from umbel_client.enrolment import load_identity
from umbel_models.zoo import bundle_path

CONFIG = """
[policy]
version = 1
require_power = false
require_unmetered = false
max_temperature = 1000
allow_unknown = ["temperature"]
min_free_bytes = 0

[personal]
epochs = 2
hyperparameters = { lr = 0.1 }
"""


@dataclass
class User:
    """Somebody at a terminal."""

    home: Path
    peer: Peer

    async def start(self, *words: object) -> asyncio.subprocess.Process:
        environment = {**os.environ, "UMBEL_DEVICE_HOME": str(self.home), "COLUMNS": "120"}
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "umbel_client.cli", *map(str, words), env=environment,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    async def types(self, *words: object, code: int = 0) -> str:
        process = await self.start(*words)
        out, err = await process.communicate()
        assert process.returncode == code, err.decode()
        assert b"Traceback" not in err
        return out.decode() if code == 0 else err.decode()

    async def does(self, *words: object, code: int = 0) -> str:
        """As `types`, but in this process: for words whose process no promise is about."""
        told = {"stdout": io.StringIO(), "stderr": io.StringIO()}
        with contextlib.redirect_stdout(told["stdout"]), contextlib.redirect_stderr(told["stderr"]):
            ended = await asyncio.to_thread(ended_with, ["--home", str(self.home), *map(str, words)])
        assert ended == code, told["stderr"].getvalue()
        return told["stderr" if code else "stdout"].getvalue()

    async def enrols(self) -> None:
        ca = self.home.parent / "ca.pem"
        ca.write_bytes(self.peer.server_authority)
        await self.does("enrol", "--server", self.peer.enrol_address, "--token", "token-1", "--ca", ca)
        (self.home / "device.toml").write_text(CONFIG)
        self.status(idle=True)

    def status(self, **facts: object) -> None:
        (self.home / "status-now.json").write_text(json.dumps(facts))

    @property
    def conditions(self) -> tuple[object, ...]:
        return ("--status-file", self.home / "status-now.json")

    def archive(self, count: int = 70) -> Path:
        path = self.home.parent / "mine.npz"
        inputs, classes = recordings(count, "mine")
        np.savez(path, x=inputs, y=classes)
        return path


def ended_with(words: list[str]) -> int:
    """The code that the program would exit with."""
    try:
        return main(words)
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.fixture
async def user(tmp_path: Path) -> AsyncIterator[User]:
    async with serving(Coordinator(SystemClock().now)) as peer:
        peer.coordinator.publish()
        yield User(tmp_path / "home", peer)


async def test_from_an_empty_folder_to_an_answer(user: User) -> None:
    await user.enrols()
    assert "70 examples added" in await user.types("examples", "import", user.archive(), "--subject", "anna")
    assert "every condition holds" in await user.types("why", *user.conditions)
    user.peer.coordinator.tasks = [Plan(epochs=2, hyperparameters={"lr": 0.1})]
    told = await user.types("run", "--once", *user.conditions)
    assert "contributed; learn round 1 -v[]+^; release 1 adopted" in told
    status = json.loads(await user.types("status", "--json"))
    assert status["id"] == load_identity(user.home).device_id
    assert status["release"] == 1
    bytes_held = status["examples"]["bytes"]
    assert status["examples"] == {"training": 56, "held_back": 14, "bytes": bytes_held, "left_out": 0}
    assert status["contributions"] == 1
    assert status["modules"] == []
    assert 30 < status["peak_memory_mb"] < 150
    assert status["session_shapes"] == {"-v[]+^": 1}
    assert 0 <= status["global_accuracy"] <= 1
    assert 0 <= status["personal_accuracy"] <= 1
    np.save(user.home.parent / "window.npy", recordings(2)[0])
    lines = (await user.types("predict", user.home.parent / "window.npy")).splitlines()
    assert len(lines) == 2
    assert "%" in lines[0]
    np.savez(user.home.parent / "wrong.npz", x=np.zeros((1, 6, 100), np.float32), y=np.array([7]))
    assert "labels 0 to 6" in await user.does("examples", "import", user.home.parent / "wrong.npz", code=1)
    assert "70 examples deleted" in await user.does("examples", "forget", "--subject", "anna")
    stats = json.loads(await user.does("examples", "stats", "--json"))
    assert stats["training"] == stats["held_back"] == 0


async def test_an_agent_follows_releases_until_one_and_ends(user: User) -> None:
    await user.enrols()
    user.peer.coordinator.publish(retuned(Bundle.open(bundle_path("smartwatch")).shared_weights(), 1.1))
    told = await user.types("run", "--until-release", 2, "--json", *user.conditions)
    assert json.loads(told.splitlines()[-1])["release"] == {"number": 2, "outcome": "adopted"}
    assert json.loads((user.home / "status.json").read_text())["slots"]["active"]["release"] == 2


@pytest.mark.slow
async def test_a_told_agent_stops_in_the_middle_of_training_and_the_next_goes_on(user: User) -> None:
    await user.enrols()
    await user.does("examples", "import", user.archive())
    user.peer.coordinator.tasks = [Plan(epochs=20_000, batch_size=4, max_steps=2000)]
    agent = await user.start("run", *user.conditions)
    await asyncio.to_thread(_wait_for_training, user.home)
    agent.send_signal(signal.SIGTERM)
    out, err = await agent.communicate()
    assert agent.returncode == 0, err
    assert b"interrupted" in out
    assert (user.home / "session" / "progress.safetensors").exists()
    told = await user.types("run", "--once", *user.conditions)
    assert "contributed; learn round 1 -v[!v[]+^" in told


def _wait_for_training(home: Path) -> None:
    """Until the agent has begun to train; a minute is far more than it takes."""
    for _ in range(3000):
        with contextlib.suppress(FileNotFoundError):
            if "[" in json.loads((home / "session" / "session.json").read_text())["shape"]:
                return
        time.sleep(0.02)
    raise AssertionError("the agent never began to train")


async def test_a_killed_agent_loses_nothing_that_counts(user: User) -> None:
    await user.enrols()
    await user.does("examples", "import", user.archive())
    user.peer.coordinator.tasks = [Plan(epochs=20_000, batch_size=4, max_steps=2000)]
    agent = await user.start("run", *user.conditions)
    await asyncio.to_thread(_wait_for_training, user.home)
    agent.kill()
    await agent.communicate()
    assert "contributed" in await user.types("run", "--once", *user.conditions)
    assert len(user.peer.coordinator.updates) == 1


async def test_why_tells_in_words_what_holds_the_device_back(user: User) -> None:
    await user.enrols()
    user.status(idle=False)
    assert "the device is in use" in await user.types("why", *user.conditions)
    told = json.loads(await user.does("why", "--json", *user.conditions))
    assert told["eligible"] is False
    assert "waited; the device is in use" in await user.types("run", "--once", *user.conditions)


async def test_refusals_say_what_to_do_and_exit_with_one(user: User, tmp_path: Path) -> None:
    assert "umbel-device enrol" in await user.types("run", "--once", code=1)
    await user.enrols()
    assert "--again" in await user.does("enrol", "--code", user.peer.code().to_text(), code=1)
    assert "was used" in await user.does("enrol", "--again", "--code", user.peer.code().to_text(), code=1)
    assert "brings what is released" in await user.does("predict", user.archive(), code=1)
    assert "no file at" in await user.does("examples", "import", tmp_path / "missing.npz", code=1)
    (user.home / "device.toml").write_text("[policy]\nversion = 1\nrequire_idel = true\n")
    assert "require_idel" in await user.does("why", code=1)
    assert "usage" in await user.does("examples", "forget", code=2)


async def test_an_enrolment_code_in_a_file_is_enough(user: User, tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.write_text(user.peer.code().to_text())
    told = await user.types("enrol", "--code", f"@{code}", "--channel", "beta")
    assert load_identity(user.home).device_id in told
    assert load_identity(user.home).channel == "beta"


def test_who_has_no_home_is_told_and_needs_none_beside_a_named_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UMBEL_DEVICE_HOME", "~nobody-of-this-name/device")
    for words, told in (([], "no home folder is known"), (["--home", str(tmp_path)], "isn't enrolled")):
        assert main([*words, "status"]) == 1
        assert told in capsys.readouterr().err


async def test_help_shows_how_to_begin(user: User) -> None:
    told = await user.types("--help")
    assert "umbel-device enrol --server" in told
    for verb in ("enrol", "run", "predict", "status", "why"):
        assert "usage: umbel-device " + verb in await user.does(verb, "--help")
