"""`umbel releases` as an operator types it: what a release is encoded as, what it weighs, and the deltas to it."""

from __future__ import annotations

from pathlib import Path

from tests.server.live import MODEL, Live
from tests.server.test_cli import BUNDLE, Umbel, done
from tests.server.test_cli import live as live
from tests.server.test_cli import run as run
from tests.server.test_cli import umbel as umbel
from umbel.bundle import Bundle, write_bundle
from umbel.randomness import generator
from umbel.runtime.onnx import OnnxRuntime
from umbel.successor import successor
from umbel.weights import Weights
from umbel_models.zoo import bundle_path


def next_bundle(folder: Path) -> str:
    """A bundle a small step away from the packaged one."""
    parent, chance = Bundle.open(bundle_path(MODEL)), generator("next")
    arrays = parent.shared_weights().arrays
    moved = Weights({name: array + 1e-4 * chance.normal(0, 1, array.shape) for name, array in arrays.items()})
    manifest, changed = successor(parent, moved, OnnxRuntime())
    files = {name: path.read_bytes() for name, path in parent.paths.items()} | changed
    write_bundle(folder, manifest, files)
    return str(folder)


def test_the_way_of_a_quantised_release(umbel: Umbel, live: Live, tmp_path: Path) -> None:
    done(umbel("models", "add", BUNDLE, "--name", MODEL))
    done(umbel("models", "add", next_bundle(tmp_path / "next"), "--name", MODEL, "--parent", "1"))
    nothing = umbel("releases", "prepare", MODEL, "2", "--encoding", "int8-delta")
    assert nothing.code == 1 and "nobody has a release" in nothing.err

    published = done(umbel("releases", "publish", MODEL, "1", "--json"))
    first = published.json
    assert "note" not in published.err, "the first of all"
    assert (first["encoding"], first["standing"], first["deltas"]) == ("full", "head", [])
    small = done(umbel("releases", "prepare", MODEL, "2", "--encoding", "int8-delta", "--json")).json
    assert small["release"]["encoding"] == "int8-delta"
    assert small["release"]["version"] == 3, "the quantised neighbour of version 2"
    (delta,) = small["release"]["deltas"]
    assert delta["from_release"] == first["number"] and delta["size"] < 0.45 * delta["stands_for"]

    shown = done(umbel("releases", "show", MODEL, str(small["number"]), "--json")).json
    assert shown == small["release"]
    assert shown["size_by_runtime"]["onnx"] < shown["size"] and shown["standing"] == "listed"
    words = done(umbel("releases", "show", MODEL, str(small["number"]))).out
    for word in ("int8-delta", f"delta from {first['number']}", "whole, onnx", "listed"):
        assert word in words
    listed = done(umbel("releases", "list", MODEL)).out
    assert "int8-delta" in listed and f"from {first['number']}" in listed

    exact = done(umbel("releases", "prepare", MODEL, "2", "--json")).json
    unknown = done(umbel("releases", "prepare", MODEL, "2", "--channel", "bta", "--population", "wrsts", "--json"))
    assert unknown.json["revert"] == 0
    assert "no other recent release is on channel 'bta'; they are on stable\n" in unknown.err
    assert "no device of population 'wrsts' is enrolled yet" in unknown.err
    assert "on channel 'bta'" not in done(umbel("releases", "publish", MODEL, "2", "--channel", "bta")).err
    assert "on channel 'gamma'; they are on bta, stable" in (
        done(umbel("releases", "publish", MODEL, "2", "--channel", "gamma")).err
    )
    assert (exact["release"]["encoding"], exact["release"]["version"]) == ("full", 2)
    version = done(umbel("versions", "show", MODEL, "3", "--json")).json
    assert (version["state"], version["parent"]) == ("quantised", 2)
    assert umbel("releases", "prepare", MODEL, "2", "--encoding", "int4").code == 1
    assert umbel("releases", "show", MODEL, "99").code == 1
    done(umbel("releases", "hold", MODEL, "--reason", "test"))
    done(umbel("releases", "lift", MODEL))
    done(umbel("releases", "listing"))
    assert done(umbel("audit", "verify", "--json")).json["intact"]
