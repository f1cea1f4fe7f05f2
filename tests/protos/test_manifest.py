"""A manifest says the same after a journey, and one that contradicts itself is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.protos.strategies import digests
from umbel.bundle import Bundle
from umbel.errors import BundleInvalid, MalformedMessage
from umbel.histograms import Histogram
from umbel.manifest import DTYPES, GOLDEN_FILE, MAX_MANIFEST_BYTES, WEIGHTS_FILE, FileRef, Manifest, TensorSpec
from umbel_models.zoo import bundle_path

WATCH = Bundle.open(bundle_path("smartwatch")).manifest

_texts = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"), max_size=20)
_sizes = st.lists(st.integers(0, 2**31), max_size=3).map(tuple)
_numbers = st.floats(allow_nan=False, allow_infinity=False)


def _specs(prefix: str, batched: bool) -> st.SearchStrategy[tuple[TensorSpec, ...]]:
    dtypes = st.sampled_from(DTYPES) if batched else st.just("float32")
    shapes = _sizes.map(lambda sizes: (None, *sizes)) if batched else _sizes
    one = st.builds(TensorSpec, _texts.map(lambda text: prefix + text), dtypes, shapes)
    return st.lists(one, max_size=3, unique_by=lambda spec: spec.name).map(tuple)


_refs = st.builds(FileRef, digests, st.integers(0, 2**53))
_edges = st.lists(_numbers, min_size=1, max_size=3, unique=True).map(lambda edges: tuple(sorted(edges)))
_histograms = st.builds(Histogram, st.from_regex(r"[a-z][a-z0-9_.-]{0,9}", fullmatch=True), _edges, st.booleans())
_graphs = st.fixed_dictionaries({"onnx": st.fixed_dictionaries({"infer": st.just("infer.onnx")})})

manifests = st.builds(
    Manifest,
    model=_texts,
    inputs=_specs("x", True),
    targets=_specs("y", True),
    outputs=_specs("z", True),
    trainable=_specs("p_", False),
    buffers=_specs("b_", False),
    frozen=_specs("f_", False),
    slots=_specs("s_0", False),
    hyperparameters=st.dictionaries(_texts, _numbers, max_size=3),
    metrics=st.lists(_texts, max_size=3).map(lambda names: ("loss", *names, "examples")),
    graphs=_graphs,
    files=st.fixed_dictionaries(dict.fromkeys((WEIGHTS_FILE, GOLDEN_FILE, "infer.onnx"), _refs)),
    labels=st.lists(_texts, max_size=3).map(tuple),
    golden_tolerance=st.floats(0, 1),
    description=_texts,
)


@given(manifests, st.lists(_histograms, max_size=2, unique_by=lambda one: one.name).map(tuple))
def test_the_edges_of_histograms_travel_with_a_manifest(manifest: Manifest, histograms: tuple[Histogram, ...]) -> None:
    bins = (name for histogram in histograms for name in histogram.bins)
    counting = replace(manifest, metrics=(*manifest.metrics, *bins), histograms=histograms)
    assert Manifest.from_bytes(counting.to_bytes()) == counting
    assert histograms or counting.to_bytes() == manifest.to_bytes()  # bundles without any keep their names


@given(manifests)
def test_a_manifest_survives_its_bytes(manifest: Manifest) -> None:
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again == manifest
    assert again.digest == manifest.digest
    assert again.to_bytes() == manifest.to_bytes()


@given(
    st.recursive(st.none() | st.booleans() | _numbers | _texts, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
)
def test_any_other_value_in_any_field_is_refused_or_means_what_it_says(value: Any) -> None:
    tree = json.loads(WATCH.to_bytes())
    for name in tree:
        data = json.dumps(tree | {name: value}).encode()
        try:
            manifest = Manifest.from_bytes(data)
        except (BundleInvalid, MalformedMessage):
            continue
        assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@pytest.mark.parametrize("missing", sorted(json.loads(WATCH.to_bytes())))
def test_a_manifest_without_one_of_its_fields_is_malformed(missing: str) -> None:
    tree = json.loads(WATCH.to_bytes())
    del tree[missing]
    with pytest.raises(MalformedMessage):
        Manifest.from_bytes(json.dumps(tree).encode())


def _spec(name: str, shape: tuple[int | None, ...] = (2,), dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name, dtype, shape)


REF = FileRef(WATCH.digest, 1)
CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "two tensors of one name": ({"frozen": (_spec("f_a"), _spec("f_a"))}, "unique"),
    "an input named as a weight": ({"inputs": (_spec("p_head.bias", (None, 7)),)}, "unique"),
    "an unknown dtype": ({"inputs": (_spec("x", (None, 2), "complex64"),)}, "complex64"),
    "a weight without its prefix": ({"frozen": (_spec("head"),)}, "must start with 'f_'"),
    "a weight that depends on the batch": ({"frozen": (_spec("f_a", (None, 2)),)}, "batch"),
    "a weight of integers": ({"frozen": (_spec("f_a", (2,), "int64"),)}, "float32"),
    "an input without a shape": ({"inputs": (_spec("x", ()),)}, "batch comes first"),
    "an input without a batch": ({"inputs": (_spec("x", (6, 100)),)}, "batch comes first"),
    "an input open twice": ({"inputs": (_spec("x", (None, None)),)}, "batch comes first"),
    "an anchor of nothing": ({"slots": (_spec("s_anchor_nothing"),)}, "anchors"),
    "an anchor of another shape": ({"slots": (_spec("s_anchor_head.bias", (9,)),)}, "another shape"),
    "a hyper-parameter that isn't finite": ({"hyperparameters": {"lr": float("inf")}}, "finite"),
    "a negative tolerance": ({"golden_tolerance": -1.0}, "golden_tolerance"),
    "a tolerance that is no number": ({"golden_tolerance": float("nan")}, "golden_tolerance"),
    "no count of examples": ({"metrics": ("loss",)}, "examples"),
    "no weights file": ({"files": {GOLDEN_FILE: REF}}, WEIGHTS_FILE),
    "no golden file": ({"files": {WEIGHTS_FILE: REF}}, GOLDEN_FILE),
    "a file that climbs out": ({"files": {**WATCH.files, "../passwd": REF}}, "plain file name"),
    "a file that climbs out elsewhere": ({"files": {**WATCH.files, "..\\passwd": REF}}, "plain file name"),
    "a hidden file": ({"files": {**WATCH.files, ".profile": REF}}, "plain file name"),
    "a file with an escape sequence": ({"files": {**WATCH.files, "a\x1b[2J": REF}}, "plain file name"),
    "a file that no disk takes": ({"files": {**WATCH.files, "a" * 5000: REF}}, "plain file name"),
    "two files to some machines, one to others": ({"files": {**WATCH.files, "Infer.ONNX": REF}}, "upper and lower"),
    "a histogram whose bins nobody counts": ({"histograms": (Histogram("age", (1.0,)),)}, r"age\[0\]"),
    "two histograms of one name": (
        {"metrics": (*WATCH.metrics, "a[0]", "a[1]"), "histograms": (Histogram("a", (1.0,)), Histogram("a", (2.0,)))},
        "different names",
    ),
    "a graph that isn't listed": ({"graphs": {"onnx": {"infer": "other.onnx"}}}, "doesn't list"),
    "an unknown signature": ({"graphs": {"onnx": {"guess": "infer.onnx"}}}, "guess"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused(what: str) -> None:
    changes, match = CONTRADICTIONS[what]
    with pytest.raises(BundleInvalid, match=match):
        replace(WATCH, **changes)


@pytest.mark.parametrize("edges", [[], [2.0, 1.0], [1.0, 1.0], [float("nan")], [1.0, float("inf")]])
def test_edges_that_bound_no_bins_are_refused(edges: list[float]) -> None:
    tree = json.loads(WATCH.to_bytes())
    tree["metrics"] += [f"age[{place}]" for place in range(len(edges) + 1)]
    with pytest.raises(BundleInvalid, match="'age'"):
        Manifest.from_bytes(json.dumps(tree | {"histograms": [["age", edges, False]]}).encode())


@pytest.mark.parametrize("size", [-1, 1.5, True, "1", None])
def test_a_file_of_no_size_is_malformed(size: Any) -> None:
    """Less than nothing would make room on a device's shelf."""
    tree = json.loads(WATCH.to_bytes())
    tree["files"][WEIGHTS_FILE][1] = size
    with pytest.raises(MalformedMessage, match="expected a size"):
        Manifest.from_bytes(json.dumps(tree).encode())


def test_a_newer_format_asks_for_an_update() -> None:
    tree = json.loads(WATCH.to_bytes()) | {"format": 2}
    with pytest.raises(BundleInvalid, match="update umbel"):
        Manifest.from_bytes(json.dumps(tree).encode())


def test_an_endless_manifest_is_not_parsed() -> None:
    with pytest.raises(MalformedMessage, match="limit"):
        Manifest.from_bytes(b" " * (MAX_MANIFEST_BYTES + 1))


@pytest.mark.parametrize("field", ["model", "description", "labels", "metrics"])
@pytest.mark.parametrize("text", ["\x1b[2Jall is well", "\x9b2J", "a\rb", "a\x00b", "\x7f"])
def test_no_text_of_a_manifest_can_rewrite_a_terminal(field: str, text: str) -> None:
    tree = json.loads(WATCH.to_bytes())
    tree[field] = [*tree[field], text] if isinstance(tree[field], list) else text
    with pytest.raises(MalformedMessage, match="control characters"):
        Manifest.from_bytes(json.dumps(tree).encode())


def test_as_many_tensors_as_fit_into_a_manifest_are_checked_in_time() -> None:
    """Each with each other would take minutes."""
    tree = json.loads(WATCH.to_bytes())
    many = [[f"f_{number:x}", "float32", []] for number in range(150_000)]
    data = json.dumps(tree | {"frozen": many}, separators=(",", ":")).encode()
    assert MAX_MANIFEST_BYTES * 0.8 < len(data) <= MAX_MANIFEST_BYTES
    assert len(Manifest.from_bytes(data).frozen) == len(many)


def test_what_is_shared_leaves_out_what_is_frozen() -> None:
    manifest = replace(WATCH, frozen=(_spec("f_a", (3, 4)),))
    assert "f_a" not in manifest.shared_shapes
    assert manifest.weight_shapes == dict(sorted({**manifest.shared_shapes, "f_a": (3, 4)}.items()))
