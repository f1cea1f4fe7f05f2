"""Devices in JavaScript and in Python, and a coordinator and a helper that both meet: all of them real processes."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from tests.client.recordings import recordings
from tests.javascript.test_onnxruntime_web import packages
from tests.server.processes import ALWAYS_READY, wait_until
from umbel.bundle import Bundle
from umbel_client.cli import main as umbel_device
from umbel_models.zoo import bundle_path
from umbel_server.cli import main as umbel
from umbel_simulations.demo.operator import UMBEL, HelperOperator, Operator
from umbel_simulations.demo.programs import Programs

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
MODEL = "smartwatch"
TRAINING, HELD_BACK = 40, 14
_TASK = """\
name = "{name}"
population = "{name}"
model = "{name}"
rounds = 1
goal = {devices}
minimum = {devices}
updates_private = {private}

[plan]
kind = "{kind}"
batch_size = {batch_size}
epochs = 5
max_steps = 4
clip_norm = 1.0
max_weight = {max_weight}
hyperparameters = {{ lr = 0.03, mu = 0.01 }}

[validation]
max_accuracy_drop = 1.0
max_step_ratio = 0.0
{privacy}
"""


def scripts(folder: Path) -> Path:
    """The modules, with their packages beside them, as an app has them."""
    folder.mkdir(exist_ok=True)
    for path in HERE.glob("*.mjs"):
        shutil.copy(path, folder)
    (folder / "node_modules").symlink_to(packages() / "node_modules")
    return folder


class OperatorHere(Operator):
    """Calls `umbel` in this process: its verbs are tested elsewhere, and programs would take most of the time."""

    def call(self, *verb: str) -> Any:
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        words = ["umbel", *verb, "--state", str(self.state), "--json"]
        with pytest.MonkeyPatch.context() as hands, contextlib.redirect_stdout(out):
            hands.setattr(sys, "argv", words)
            with pytest.raises(SystemExit) as ended:
                umbel()
        assert not ended.value.code, words
        out.seek(0)
        return json.loads(out.read())


@dataclass
class JavaScriptDevice:
    """One device's folder; each call is a process of its own."""

    scripts: Path
    home: Path

    def words(self, *words: str) -> list[str]:
        """The command line of one call."""
        return ["node", str(self.scripts / "main.mjs"), str(CHECKOUT / "protos"), str(self.home), *words]

    def call(self, *words: str) -> dict[str, Any]:
        """What `main.mjs` prints."""
        done = subprocess.run(self.words(*words), capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        return told

    def for_a_visit(self, ahead: float = 0.0, **floors: float) -> list[str]:
        """The words for a visit, with examples of its own; `ahead`: by how many seconds its clock is fast."""
        x, y = recordings(TRAINING + HELD_BACK, self.home.name)
        tensors = {}
        for name, rows in (("training", slice(TRAINING)), ("heldBack", slice(TRAINING, None))):
            tensors |= {f"{name}.input.x": x[rows], f"{name}.target.y": y[rows]}
        file = self.home / "examples.safetensors"
        file.write_bytes(safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in tensors.items()}))
        return ["visit", str(file), json.dumps({"minimum_cohort": 2, **floors}), str(ahead)]

    def visit(self, ahead: float = 0.0, **floors: float) -> dict[str, Any]:
        """One visit."""
        return self.call(*self.for_a_visit(ahead, **floors))

    def contribute(self) -> None:
        """Visits until a report was accepted: a helper may not have signed the round yet."""
        wait_until(lambda: self.visit()["ending"] == "contributed", f"{self.home.name} reported", 60)

    def update(self) -> dict[str, Any]:
        """What its last report holds."""
        return dict(json.loads((self.home / "update.json").read_text()))

    def identity(self) -> dict[str, Any]:
        """Where it calls, and whom it pinned."""
        return dict(json.loads((self.home / "identity.json").read_text()))

    def call_at(self, address: str) -> None:
        """Reach the coordinator by another way."""
        (self.home / "identity.json").write_text(json.dumps(self.identity() | {"address": address}))


@dataclass
class PythonDevice:
    """A device of the SDK, by the commands that a user types."""

    home: Path

    def call(self, *words: str) -> None:
        assert umbel_device(["--home", str(self.home), *words]) == 0

    def contribute(self) -> None:
        """Visits until its session is over."""
        shapes = self.home / "state.json"
        for _ in range(100):
            self.call("run", "--once", "--json")
            if "[]+^" in shapes.read_text():
                return
        raise AssertionError("the Python device never reported")


@dataclass
class Parties:
    """A coordinator and a helper that run, for as many populations as there are tests."""

    folder: Path
    operator: Operator
    helper: HelperOperator
    scripts: Path

    def task(
        self,
        name: str,
        devices: int = 2,
        private: bool = False,
        max_weight: float = 1000.0,
        kind: str = "train",
        batch_size: int = 16,
        **privacy: float,
    ) -> None:
        """A model, a population and a task of this name; what stands in `privacy` goes into its `[privacy]`."""
        self.operator.call("models", "add", str(bundle_path(MODEL)), "--name", name)
        spec = {"name": name, "devices": devices, "private": str(private).lower(), "max_weight": max_weight}
        spec |= {"kind": kind, "batch_size": batch_size}
        table = "".join(f"{key} = {value}\n" for key, value in privacy.items())
        file = self.folder / f"{name}.toml"
        file.write_text(_TASK.format(**spec, privacy="[privacy]\n" + table if private else ""))
        self.operator.call("tasks", "create", "--file", str(file))

    def code(self, population: str) -> str:
        """An enrolment code."""
        words = ("--population", population, "--count", "1", "--codes")
        return str(self.operator.call("devices", "tokens", "create", *words)["codes"][0])

    def javascript(self, population: str, private: bool = False) -> JavaScriptDevice:
        """An enrolled device in JavaScript."""
        device = JavaScriptDevice(self.scripts, self.folder / f"javascript-{population}")
        device.call("enrol", self.code(population), *self._at_helper(population, private))
        return device

    def python(self, population: str, private: bool = False) -> PythonDevice:
        """An enrolled device in Python, with examples."""
        device = PythonDevice(self.folder / f"python-{population}")
        device.home.mkdir()
        floors = "\n[personal]\nepochs = 0\n[privacy]\nminimum_cohort = 2\n"
        (device.home / "device.toml").write_text(ALWAYS_READY + floors)
        words = zip(("--helper", "--helper-token"), self._at_helper(population, private), strict=False)
        device.call("enrol", "--code", self.code(population), *(word for pair in words for word in pair))
        count = TRAINING // 2 + HELD_BACK
        x, y = recordings(count, device.home.name)
        archive = device.home / "mine.npz"
        np.savez(archive, x=x, y=y, held_back=np.arange(count) >= TRAINING // 2)
        device.call("examples", "import", str(archive))
        return device

    def _at_helper(self, population: str, private: bool) -> list[str]:
        return [str(self.helper.card), *self.helper.tokens(population, 1)] if private else []

    def round(self, task: str) -> dict[str, Any]:
        """The task's one round, once it is over."""
        wait_until(lambda: self.operator.call("tasks", "show", task)["state"] == "done", f"{task} is done")
        (found,) = self.operator.call("rounds", "list", "--task", task)["rounds"]
        return dict(found)

    def step(self, model: str) -> NDArray[np.float64]:
        """By how much version 2 differs from version 1, as one vector."""
        vectors = []
        for version in ("1", "2"):
            folder = self.folder / f"{model}-{version}"
            self.operator.call("versions", "export", model, version, str(folder))
            vectors.append(Bundle.open(folder).shared_weights().to_vector().astype(np.float64))
        return np.asarray(vectors[1] - vectors[0])


@contextmanager
def parties(folder: Path) -> Iterator[Parties]:
    """Both as processes, until the tests are done."""
    operator, helper = OperatorHere(folder / "leader"), HelperOperator(folder / "helper")
    operator.init()
    with (operator.state / "config.toml").open("a") as config:
        config.write("pace_shortest_seconds = 0.2\npace_idle_seconds = 0.5\n")
    helper.init(operator.release_key, 2)
    with Programs(folder / "logs") as programs:
        programs.start("helper", [*UMBEL, "helper", "run", "--state", str(helper.state)])
        wait_until(helper.listens, "the helper listens")
        ready = folder / "ready.json"
        serve = ["serve", "--state", str(operator.state), "--helper", str(helper.card), "--ready-file", str(ready)]
        programs.start("leader", [*UMBEL, *serve, *(f"--{port}-port=0" for port in ("device", "enrol", "admin"))])
        wait_until(ready.exists, "the coordinator listens")
        yield Parties(folder, operator, helper, scripts(folder / "scripts"))
