"""Memory of a device's process: all that the agent loads, a wearer's examples on disk, a report's work, an answer.

The demo measures the same of its twenty agents while they talk to a coordinator (`build/demo/report.json`).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.harness import Table, child, peak_mb

MODULE = "tests.benchmarks.device"
PEAK = "peak MB of a training device"
HEAVY = "modules of torch, tensorflow and flwr in it"


def run() -> Table:
    import numpy as np

    from umbel_models.zoo import bundle_path
    from umbel_simulations.smartwatch import load_wearers

    wearer = max(load_wearers(), key=lambda one: len(one.training))
    parts = (wearer.training, wearer.held_back)
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "examples.npz"
        held_back = np.repeat([False, True], [len(part) for part in parts])
        x, y = np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
        np.savez(archive, x=x, y=y, held_back=held_back)
        found = child(MODULE, folder, str(bundle_path("smartwatch")))
    return Table(
        f"Memory of a device's process ({len(wearer.training)} windows to train on)",
        ("after it has", "peak MB"),
        list(found["peaks"].items()),
        {PEAK: max(found["peaks"].values()), HEAVY: found["heavy"]},
        {PEAK: ("<=", 120.0), HEAVY: ("<=", 0.0)},
    )


def _work(folder: Path, bundle_folder: Path) -> dict[str, object]:
    peaks = {"started": peak_mb()}
    import umbel_client.agent
    import umbel_client.cli
    import umbel_client.grpc_channel  # noqa: F401 - all that an agent's process loads
    from umbel.bundle import Bundle
    from umbel.clock import SystemClock
    from umbel.digests import Digest
    from umbel.memory import give_back_what_is_freed
    from umbel.messages import update_to_bytes
    from umbel.plan import Plan
    from umbel.sealing import SEALED, Binding, Sealing, seal
    from umbel_client import opening
    from umbel_client.importing import import_npz
    from umbel_client.predictor import Predictor
    from umbel_client.trainer import Job
    from umbel_client.trainer import run as train

    give_back_what_is_freed()  # as `umbel-device` does
    peaks["loaded the SDK"] = peak_mb()
    clock = SystemClock()
    store = opening.examples_on_disk(folder)
    import_npz(store, folder / "examples.npz", at=clock.now())
    split = store.split(clock.now())
    peaks["imported its examples"] = peak_mb()
    bundle, runtime = Bundle.open(bundle_folder), opening.runtime_of(opening.RuntimeSettings())
    predictor = Predictor(bundle, bundle.weights(), runtime, "benchmark")
    predictor(split.held_back.take(slice(0, 1)).inputs)
    peaks["answered"] = peak_mb()
    update = train(Job(Plan(epochs=3), "bench", 1, "device"), bundle, split, runtime, clock)
    peaks["trained three epochs"] = peak_mb()
    # Any point of the curve will do for a key: nobody has to open this.
    binding = Binding("bench", 1, "session", "0" * 32, Digest("0" * 64))
    seal(update_to_bytes(update), Sealing(SEALED, bytes([9]) + bytes(31)), binding)
    peaks["sealed its report"] = peak_mb()
    return {"peaks": peaks, "heavy": sum(name in sys.modules for name in ("torch", "tensorflow", "flwr"))}


if __name__ == "__main__":
    print(json.dumps(_work(Path(sys.argv[1]), Path(sys.argv[2]))))
