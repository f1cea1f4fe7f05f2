"""The cache of graphs: what hasn't changed isn't translated again, and what has never comes out of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.power_cut import no_room
from umbel.errors import ParityFailed
from umbel_models.cache import KEEP, GraphCache
from umbel_models.compile import compile_model
from umbel_models.optimizers import SGD, Reference, Tensors
from umbel_models.spec import ModelSpec


class Small(nn.Module):
    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.layer, self.slope = nn.Linear(3, 2), slope

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * self.slope
        return torch.tanh(y) if self.training else y


def cross(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, target)


def spec(slope: float = 1.0) -> ModelSpec:
    return ModelSpec("small", Small(slope), cross, {"x": torch.randn(4, 3)}, {"y": torch.arange(4) % 2})


def test_new_weights_of_the_same_model_find_its_graphs(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "cache")
    first = compile_model(spec(), tmp_path / "a", cache=cache)
    again = compile_model(spec(), tmp_path / "b", cache=cache)
    assert (first.from_cache, again.from_cache) == ((), ("onnx",))
    assert first.bundle.weights() != again.bundle.weights()
    for name in ("infer", "evaluate", "train"):
        assert first.bundle.graph_path("onnx", name).read_bytes() == again.bundle.graph_path("onnx", name).read_bytes()


class Slower(SGD):
    """Half as fast, by what gradients are multiplied by alone."""

    def factor(self, hyper: Tensors) -> Tensor | None:
        return 0.5 * hyper["lr"]

    def torch_optimizer(self, weights: list[Tensor]) -> Reference:
        return SGD(0.5 * self.lr).torch_optimizer(weights)


CHANGES: dict[str, Callable[[ModelSpec], ModelSpec]] = {
    "a number inside the module": lambda model: replace(model, module=Small(2.0)),
    "the loss": lambda model: replace(model, loss=lambda output, y: 2 * cross(output, y)),
    "a metric": lambda model: replace(model, metrics={}),
    "the optimiser": lambda model: replace(model, optimizer=SGD(momentum=0.9)),
    "what the optimiser multiplies gradients by": lambda model: replace(model, optimizer=Slower(0.05)),
    "what is trained": lambda model: replace(model, trainable=lambda name: "bias" in name),
    "the name of an input": lambda model: replace(model, inputs={"z": model.inputs["x"]}),
    "the name of an output": lambda model: replace(model, outputs=("scores",)),
}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> GraphCache:
    folder = tmp_path_factory.mktemp("filled")
    compile_model(spec(), folder / "bundle", cache=GraphCache(folder / "cache"))
    return GraphCache(folder / "cache")


RARER = (
    "a number inside the module",
    "what the optimiser multiplies gradients by",
    "the name of an input",
    "the name of an output",
    "a metric",
)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, id=name, marks=[pytest.mark.slow] if name in RARER else [])
        for name, change in CHANGES.items()
    ],
)
def test_a_model_that_changed_in_anything_gets_graphs_of_its_own(
    change: Callable[[ModelSpec], ModelSpec], filled: GraphCache, tmp_path: Path
) -> None:
    assert compile_model(change(spec()), tmp_path, cache=filled).from_cache == ()


def test_a_torn_entry_is_made_again(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path)
    cache.graphs("key", lambda: {"a": b"12345"})
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:-2])
    assert cache.graphs("key", lambda: {"a": b"67890"}) == ({"a": b"67890"}, False)
    assert cache.graphs("key", dict) == ({"a": b"67890"}, True)


def test_graphs_that_answer_otherwise_do_not_pass_the_gate_out_of_the_cache_either(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path / "cache")
    compile_model(spec(), tmp_path / "a", cache=cache)
    other = compile_model(spec(2.0), tmp_path / "b").bundle
    (entry,) = (tmp_path / "cache").iterdir()
    names = {f"{name}.onnx": other.graph_path("onnx", name).read_bytes() for name in ("infer", "evaluate", "train")}
    GraphCache(tmp_path / "forged").graphs(entry.stem, lambda: names)
    with pytest.raises(ParityFailed):
        compile_model(spec(), tmp_path / "c", cache=GraphCache(tmp_path / "forged"))
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_many_may_write_at_once_and_the_oldest_make_room(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: cache.graphs(f"key{number % 300}", lambda: {"a": b"same"}), range(600)))
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert len(kept) <= KEEP
    assert all(name.endswith(".safetensors") for name in kept)


def test_a_cache_that_cannot_be_written_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert GraphCache(tmp_path / "file").graphs("key", lambda: {"a": b"1"}) == ({"a": b"1"}, False)


def test_graphs_that_a_lost_power_left_as_zeros_are_made_again(tmp_path: Path) -> None:
    """The file system may keep a file's length and lose what was in its middle."""
    cache = GraphCache(tmp_path)
    cache.graphs("key", lambda: {"infer": bytes(range(256)) * 64})
    (stored,) = tmp_path.iterdir()
    content = stored.read_bytes()
    for spoilt in (content[:8_000] + bytes(len(content) - 8_000), content[:-1], b""):
        stored.write_bytes(spoilt)
        found, was_there = cache.graphs("key", lambda: {"infer": b"anew"})
        assert (found, was_there) == ({"infer": b"anew"}, False)
        stored.write_bytes(content)
    assert cache.graphs("key", lambda: {"infer": b"anew"}) == ({"infer": bytes(range(256)) * 64}, True)


def test_what_a_killed_compiler_left_half_written_goes_and_what_another_writes_stays(tmp_path: Path) -> None:
    cache, left, being_written = GraphCache(tmp_path), tmp_path / "tmpleft.part", tmp_path / "tmpnow.part"
    for part in (left, being_written):
        part.write_bytes(b"half")
    hours_ago = being_written.stat().st_mtime - 7200.0
    os.utime(left, (hours_ago, hours_ago))
    cache.graphs("key", lambda: {"infer": b"graph"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["key.safetensors", "tmpnow.part"]


def test_a_cache_without_room_is_as_good_as_none_and_keeps_no_scraps(tmp_path: Path) -> None:
    cache = GraphCache(tmp_path)
    with no_room():
        assert cache.graphs("key", lambda: {"infer": b"graph"}) == ({"infer": b"graph"}, False)
    assert not list(tmp_path.iterdir())


def test_a_user_without_a_home_compiles_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/.cache")
    assert GraphCache.default() is None
