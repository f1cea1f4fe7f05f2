"""A device fetches what it runs and lacks, and says what that came to."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.client.conftest import Bench
from umbel.bundle import Bundle
from umbel.errors import BundleInvalid, NotFound, Unreachable
from umbel.manifest import GOLDEN_FILE, WEIGHTS_FILE
from umbel.runtime.litert import LiteRTRuntime
from umbel_client import Device
from umbel_client.cli import main
from umbel_client.enrolment import save_identity
from umbel_client.visits import Ending
from umbel_models.zoo import bundle_path

PACKAGED = Bundle.open(bundle_path("smartwatch"))
GRAPHS = {runtime: set(files.values()) for runtime, files in PACKAGED.manifest.graphs.items()}
PLAIN = {WEIGHTS_FILE, GOLDEN_FILE}


def sizes(names: set[str]) -> int:
    return sum(PACKAGED.manifest.files[name].size for name in names)


def held(device: Device) -> set[str]:
    return {name for name, ref in PACKAGED.manifest.files.items() if device.kit.shelf.holds(ref.digest)}


@pytest.mark.parametrize(("parts", "own", "foreign"), [
    ({}, "onnx", "litert"),
    ({"runtime": LiteRTRuntime()}, "litert", "onnx"),
])  # fmt: skip
async def test_a_device_fetches_its_own_runtimes_graphs_only(
    bench: Bench, parts: dict[str, Any], own: str, foreign: str
) -> None:
    bench.coordinator.publish()
    device = bench.open(**parts)
    assert (await device.wake()).ending is Ending.RESTED
    assert device.answers_with == "release 1"
    assert held(device) == PLAIN | GRAPHS[own]
    fetched = device.kit.memory.state.fetched
    manifest = len(PACKAGED.manifest.to_bytes())
    assert fetched.bytes == manifest + sizes(held(device))
    assert fetched.files == 1 + len(held(device))
    assert fetched.spared_by_runtime == sizes(GRAPHS[foreign])


async def test_graphs_that_two_versions_share_are_fetched_once(bench: Bench) -> None:
    bench.coordinator.publish()
    device = bench.open()
    await device.wake()
    before, calls = device.kit.memory.state.fetched, len(bench.channel.calls)
    bench.coordinator.publish(PACKAGED.shared_weights().scaled(1.001))
    await device.wake()
    after = device.kit.memory.state.fetched
    assert device.answers_with == "release 2"
    # The manifest, the weights, the golden examples.
    assert after.files - before.files == 3
    assert bench.channel.calls[calls:].count("fetch") == 3
    assert after.spared_by_reuse - before.spared_by_reuse == sizes(GRAPHS["onnx"])
    assert after.spared_by_runtime == before.spared_by_runtime


async def test_a_device_that_changes_its_runtime_fetches_what_it_lacks(bench: Bench) -> None:
    bench.coordinator.publish()
    await bench.open().wake()
    device = bench.open(runtime=LiteRTRuntime())
    assert not device.answers_with, "the graphs that it could run aren't here yet"
    await device.wake()
    assert device.answers_with == "release 1"
    assert held(device) == set(PACKAGED.manifest.files)


async def test_bytes_of_a_broken_stream_are_counted_too(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.channel.tamper = lambda digest, data: data[:100]
    device = bench.open()
    assert isinstance((await device.wake()).error, Unreachable)
    assert device.kit.memory.state.fetched.bytes == 100


def test_a_bundle_opens_with_one_runtimes_files_and_says_what_it_lacks(tmp_path: Any) -> None:
    for name in ("manifest.json", *PLAIN, *GRAPHS["onnx"]):
        (tmp_path / name).write_bytes((bundle_path("smartwatch") / name).read_bytes())
    bundle = Bundle.open(tmp_path, "onnx")
    assert bundle.runtimes == ("onnx",)
    assert bundle.graph_path("onnx", "infer").is_file()
    with pytest.raises(BundleInvalid, match="only the graphs of"):
        bundle.graph_path("litert", "infer")
    with pytest.raises(BundleInvalid, match="missing"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleInvalid, match="no path is given"):
        Bundle(bundle.manifest, {name: path for name, path in bundle.paths.items() if name != "infer.onnx"})
    with pytest.raises(BundleInvalid, match="runs 'abacus'"):
        Bundle.open(tmp_path, "abacus")


async def test_status_says_how_many_bytes_of_bundles_came(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.coordinator.publish()
    device = bench.open()
    await device.wake()
    save_identity(bench.home, bench.identity)
    assert main(["--home", str(bench.home), "status", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["fetched"]
    assert told["bytes"] == device.kit.memory.state.fetched.bytes > 0
    assert told["spared_by_runtime"] == sizes(GRAPHS["litert"])


async def test_a_blob_that_nobody_has_is_a_failure_of_the_release(bench: Bench) -> None:
    bench.coordinator.publish()
    del bench.coordinator.blobs[PACKAGED.manifest.files[WEIGHTS_FILE].digest]
    visit = await bench.open().wake()
    assert visit.release is not None and NotFound.code in visit.release.reason
