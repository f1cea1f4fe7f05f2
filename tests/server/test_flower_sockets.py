"""`umbel serve --app`: an unmodified ServerApp from a file, real sockets, real devices."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.server.fleets import driven
from tests.server.live import Live, serving
from umbel.enrolment_code import EnrolmentCode
from umbel.runtime.onnx import OnnxRuntime
from umbel_client import ALWAYS, Device, HostStatus
from umbel_client.enrolment import identity_of, new_key, request_enrolment
from umbel_client.examples import MemoryExamples
from umbel_simulations.smartwatch import Wearer, load_wearers

RUNTIME = OnnxRuntime()
PATIENCE = 60.0
APP = """
import flwr, json, numpy
from flwr.app import Array, ArrayRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()

@app.main()
def main(grid, context):
    start = numpy.load(context.run_config["start"])
    arrays = ArrayRecord({name: Array(start[name]) for name in start.files})
    rounds = context.run_config["num-server-rounds"]
    result = FedAvg(min_available_nodes=3).start(grid, arrays, num_rounds=rounds)
    metrics = {number: dict(found) for number, found in result.evaluate_metrics_clientapp.items()}
    with open("result.json.part", "w") as file:
        json.dump(metrics, file)
    __import__("os").replace("result.json.part", "result.json")
"""


async def enrolled(live: Live, home: Path, wearer: Wearer) -> Device:
    code = EnrolmentCode(live.addresses.enrol, live.token(), live.parts.authorities.server.certificate_pem)
    key = new_key()
    identity = identity_of(await request_enrolment(code, key), key)
    examples = MemoryExamples()
    examples.add({"x": wearer.training.x}, {"y": wearer.training.y}, at=0.0, held_back=False)
    examples.add({"x": wearer.held_back.x}, {"y": wearer.held_back.y}, at=0.0, held_back=True)
    return Device.open(home, identity=identity, runtime=RUNTIME, examples=examples, status=HostStatus(), policy=ALWAYS)


async def work(devices: list[Device], until: Path, coordinator: asyncio.subprocess.Process) -> None:
    """Visit again and again, as agents do."""
    deadline = time.monotonic() + PATIENCE
    while not await asyncio.to_thread(until.exists):
        assert coordinator.returncode is None
        assert time.monotonic() < deadline, [device.kit.memory.state.last_error for device in devices]
        await asyncio.gather(*(device.wake() for device in devices))
        await asyncio.sleep(0.05)


@pytest.mark.slow  # test_flower_live does it without sockets
@pytest.mark.usefixtures("quick_disk")
async def test_an_operator_runs_a_server_app_over_enrolled_devices(tmp_path: Path) -> None:
    state, task = tmp_path / "state", driven(goal=3)
    with serving(state) as live:
        live.add_model()
        live.do(lambda: live.parts.coordinator.operations.create_task(task, "operator:test"))
        wearers = load_wearers()[:3]
        devices = [await enrolled(live, tmp_path / wearer.name, wearer) for wearer in wearers]
        start = live.parts.coordinator.operations.bundle(task.model, 1).shared_weights()
        port = live.addresses.device.rpartition(":")[2]
    (tmp_path / "my_app.py").write_text(APP)
    torch_names: dict[str, Any] = {name[2:]: array for name, array in start.arrays.items()}
    np.savez(tmp_path / "start.npz", **torch_names)
    command = [sys.executable, "-m", "umbel_server.cli", "serve", "--state", str(state), "--device-port", port]
    command += ["--enrol-port", "0", "--admin-port", "0", "--app", "my_app:app", "--app-task", task.name]
    command += ["--app-config", "num-server-rounds=2", "--app-config", f"start={tmp_path / 'start.npz'}"]
    coordinator = await asyncio.create_subprocess_exec(*command, cwd=tmp_path, stderr=asyncio.subprocess.PIPE)
    try:
        await work(devices, tmp_path / "result.json", coordinator)
    finally:
        if coordinator.returncode is None:
            coordinator.terminate()
        log = (await coordinator.communicate())[1].decode()
    assert coordinator.returncode == 0, log
    assert "the program has ended" in log, log
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["2"]["correct"] > found["1"]["correct"]
