"""A bundle opens only when each of its files is the one its manifest lists."""

from __future__ import annotations

import itertools
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.power_cut import PowerCut, dies_at
from tests.protos.watch import FILES, WATCH, copy_to
from umbel.bundle import MANIFEST_FILE, Bundle, file_refs, write_bundle
from umbel.errors import (
    BundleInvalid,
    DigestMismatch,
    GoldenMismatch,
    MalformedMessage,
    NotFinite,
    RuntimeFailure,
    WeightsMismatch,
)
from umbel.golden import GoldenExamples
from umbel.manifest import GOLDEN_FILE, MAX_MANIFEST_BYTES, WEIGHTS_FILE
from umbel.runtime.onnx import OnnxRuntime
from umbel.self_check import verify_golden
from umbel.successor import successor
from umbel.weights import Weights


def test_an_untouched_copy_opens_under_the_same_digest(tmp_path: Path) -> None:
    assert Bundle.open(copy_to(tmp_path)).manifest.digest == WATCH.manifest.digest


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_refused(name: str, tmp_path: Path) -> None:
    folder = copy_to(tmp_path)
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(DigestMismatch, match=name):
        Bundle.open(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused(name: str, tmp_path: Path) -> None:
    folder = copy_to(tmp_path)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(DigestMismatch, match=name):
        Bundle.open(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(name: str, tmp_path: Path) -> None:
    folder = copy_to(tmp_path)
    (folder / name).unlink()
    with pytest.raises(BundleInvalid, match=name):
        Bundle.open(folder)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleInvalid, match=MANIFEST_FILE):
        Bundle.open(tmp_path)


def test_an_endless_manifest_is_not_even_read(tmp_path: Path) -> None:
    folder = copy_to(tmp_path)
    with (folder / MANIFEST_FILE).open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(MalformedMessage, match="larger"):
        Bundle.open(folder)


def test_weights_of_another_model_are_refused_even_when_their_digest_is_right(tmp_path: Path) -> None:
    files = {name: WATCH.paths[name].read_bytes() for name in FILES}
    files[WEIGHTS_FILE] = Weights({"p_a": np.zeros(2, np.float32)}).to_bytes()
    with pytest.raises(WeightsMismatch):
        write_bundle(tmp_path, replace(WATCH.manifest, files=file_refs(files)), files)


def test_a_manifest_that_lists_other_files_is_not_written(tmp_path: Path) -> None:
    files = {name: WATCH.paths[name].read_bytes() for name in FILES}
    with pytest.raises(BundleInvalid, match="other files"):
        write_bundle(tmp_path / "new", WATCH.manifest, files | {"extra": b"1"})
    assert not (tmp_path / "new").exists()


def test_a_bundle_takes_the_place_of_another_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    folder = copy_to(tmp_path)
    (folder / "notes.txt").write_text("mine")
    only_onnx = {"onnx": WATCH.manifest.graphs["onnx"]}
    files = {name: WATCH.paths[name].read_bytes() for name in WATCH.manifest.files_for("onnx")}
    manifest = replace(WATCH.manifest, graphs=only_onnx, files=file_refs(files))
    assert write_bundle(folder, manifest, files).manifest == manifest
    assert {path.name for path in folder.iterdir()} == {*files, "manifest.json", "notes.txt"}


@pytest.mark.parametrize("is_new", [True, False])
def test_a_disk_that_fills_up_while_writing_changes_nothing(is_new: bool, tmp_path: Path) -> None:
    folder = tmp_path / "new" if is_new else copy_to(tmp_path)
    files = {name: path.read_bytes() for name, path in WATCH.paths.items()}
    manifest = replace(WATCH.manifest, description="another")
    size = max(map(len, files.values())) // 2
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        with pytest.raises(OSError, match="large"):
            write_bundle(folder, manifest, files)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    if is_new:
        assert not folder.exists()
    else:
        assert Bundle.open(folder).manifest == WATCH.manifest
        assert {path.name for path in folder.iterdir()} == {*FILES, "manifest.json"}


def test_a_bundle_that_was_being_replaced_is_the_old_or_the_new_one_wherever_the_writer_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_onnx = {"onnx": WATCH.manifest.graphs["onnx"]}
    files = {name: WATCH.paths[name].read_bytes() for name in WATCH.manifest.files_for("onnx")}
    files[WEIGHTS_FILE] = WATCH.weights().scaled(0.5).to_bytes()
    new = replace(WATCH.manifest, graphs=only_onnx, files=file_refs(files))
    found = []
    for last in itertools.count():
        folder = copy_to(tmp_path / str(last))
        with monkeypatch.context() as patch, suppress(PowerCut):
            taken = dies_at(patch, last)
            write_bundle(folder, new, files)
        found.append(Bundle.open(folder).manifest)
        if len(taken) < last:
            break
    assert [manifest in (WATCH.manifest, new) for manifest in found] == [True] * len(found)
    first = found.index(new)
    assert first == len(files) + 1, "once all of it is written, it is the new one"
    assert set(map(str, found[first:])) == {str(new)}
    assert {path.name for path in folder.iterdir()} == {*files, "manifest.json"}


def test_two_who_write_into_one_folder_leave_one_of_their_bundles_never_a_mixture(tmp_path: Path) -> None:
    def write(factor: float) -> None:
        files = {name: path.read_bytes() for name, path in WATCH.paths.items()}
        files |= {WEIGHTS_FILE: WATCH.weights().scaled(factor).to_bytes()}
        manifest = replace(WATCH.manifest, files=file_refs(files))
        for _ in range(10):
            assert write_bundle(tmp_path, manifest, files).manifest == manifest

    with ThreadPoolExecutor(2) as writers:
        for done in [writers.submit(write, factor) for factor in (0.5, 2.0)]:
            done.result()
    Bundle.open(tmp_path)


def test_half_a_manifest_that_was_never_finished_is_not_followed(tmp_path: Path) -> None:
    folder = copy_to(tmp_path)
    whole = replace(WATCH.manifest, description="another").to_bytes()
    missing = file_refs({WEIGHTS_FILE: WATCH.weights().scaled(0.5).to_bytes()})
    lacks_a_file = replace(WATCH.manifest, files={**WATCH.manifest.files, **missing}).to_bytes()
    for spoilt in (whole[: len(whole) // 2], b"", lacks_a_file):
        (folder / ".manifest.json.part").write_bytes(spoilt)
        assert Bundle.open(folder).manifest == WATCH.manifest


def test_files_may_lie_anywhere_by_content(tmp_path: Path) -> None:
    paths = {}
    for name, ref in WATCH.manifest.files.items():
        paths[name] = tmp_path / ref.digest
        paths[name].write_bytes(WATCH.paths[name].read_bytes())
    bundle = Bundle(WATCH.manifest, paths)
    bundle.verify()
    assert verify_golden(OnnxRuntime(), bundle) <= WATCH.manifest.golden_tolerance


def test_a_path_for_each_file_is_asked_for() -> None:
    with pytest.raises(BundleInvalid, match="fetch"):
        Bundle(WATCH.manifest, {WEIGHTS_FILE: WATCH.paths[WEIGHTS_FILE]})


def test_a_graph_for_another_runtime_is_not_there() -> None:
    with pytest.raises(BundleInvalid, match="'abacus'"):
        WATCH.graph_path("abacus", "infer")


def test_a_successor_shares_its_parent_s_graphs_and_answers_for_itself(tmp_path: Path) -> None:
    weights = WATCH.shared_weights().scaled(1.5)
    manifest, new = successor(WATCH, weights, OnnxRuntime())
    assert set(new) == {WEIGHTS_FILE, GOLDEN_FILE}
    assert manifest.digest != WATCH.manifest.digest
    assert {n for n in FILES if manifest.files[n] == WATCH.manifest.files[n]} == set(FILES) - set(new)
    child = write_bundle(tmp_path, manifest, {n: WATCH.paths[n].read_bytes() for n in FILES} | new)
    assert child.shared_weights() == weights
    assert verify_golden(OnnxRuntime(), child) == 0.0
    assert successor(WATCH, weights, OnnxRuntime()) == (manifest, new)


def test_a_successor_of_wrong_or_endless_weights_is_refused() -> None:
    good = WATCH.shared_weights()
    with pytest.raises(WeightsMismatch):
        successor(WATCH, good.subset(list(good)[1:]), OnnxRuntime())
    spoiled = {**good.arrays, "p_head.bias": np.full(7, np.nan, np.float32)}
    with pytest.raises(NotFinite, match=r"head\.bias"):
        successor(WATCH, Weights(spoiled), OnnxRuntime())
    huge = {**good.arrays, "p_head.weight": np.full((7, 128), 3e38, np.float32)}
    with pytest.raises(GoldenMismatch, match="NaN or infinity"):
        successor(WATCH, Weights(huge), OnnxRuntime())


def _with_golden(golden: GoldenExamples, folder: Path) -> Bundle:
    files = {name: WATCH.paths[name].read_bytes() for name in FILES} | {GOLDEN_FILE: golden.to_bytes()}
    return write_bundle(folder, replace(WATCH.manifest, files=file_refs(files)), files)


def test_an_answer_off_by_more_than_the_tolerance_is_a_mismatch(tmp_path: Path) -> None:
    golden = WATCH.golden()
    off = golden.outputs["logits"].copy()
    off[3, 2] += 2e-4 * max(1.0, float(np.abs(off).max()))
    with pytest.raises(GoldenMismatch, match=r"'logits' differs by 0\.0002"):
        verify_golden(OnnxRuntime(), _with_golden(GoldenExamples(golden.inputs, {"logits": off}), tmp_path))


def test_an_answer_that_is_no_number_never_agrees(tmp_path: Path) -> None:
    golden = WATCH.golden()
    nothing = np.full_like(golden.outputs["logits"], np.nan)
    with pytest.raises(GoldenMismatch):
        verify_golden(OnnxRuntime(), _with_golden(GoldenExamples(golden.inputs, {"logits": nothing}), tmp_path))


def test_golden_examples_of_other_shapes_or_names_are_refused(tmp_path: Path) -> None:
    golden = WATCH.golden()
    fewer = GoldenExamples(golden.inputs, {"logits": golden.outputs["logits"][:2]})
    with pytest.raises(GoldenMismatch, match="shape"):
        verify_golden(OnnxRuntime(), _with_golden(fewer, tmp_path / "a"))
    renamed = GoldenExamples(golden.inputs, {"scores": golden.outputs["logits"]})
    with pytest.raises(BundleInvalid, match="scores"):
        verify_golden(OnnxRuntime(), _with_golden(renamed, tmp_path / "b"))


def test_golden_examples_survive_their_bytes() -> None:
    golden = WATCH.golden()
    again = GoldenExamples.from_bytes(golden.to_bytes())
    assert again.to_bytes() == golden.to_bytes()
    assert np.array_equal(again.inputs["x"], golden.inputs["x"])


@pytest.mark.parametrize("data", [b"", b"junk", Weights({"p_a": np.zeros(1, np.float32)}).to_bytes()])
def test_bytes_that_are_no_golden_examples_are_malformed(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        GoldenExamples.from_bytes(data)


def test_a_graph_that_is_no_graph_is_a_failure_of_the_runtime_that_says_which(tmp_path: Path) -> None:
    files = {name: WATCH.paths[name].read_bytes() for name in FILES} | {"infer.onnx": b"not a graph"}
    bundle = write_bundle(tmp_path, replace(WATCH.manifest, files=file_refs(files)), files)
    with pytest.raises(RuntimeFailure, match="'infer' graph of 'smartwatch'"):
        verify_golden(OnnxRuntime(), bundle)
