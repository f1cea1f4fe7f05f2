"""`umbel-compile` builds, tells and checks; a refusal is one line and exit code 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import Result
from torch import Tensor
from typer.testing import CliRunner

from umbel.bundle import Bundle
from umbel.errors import CannotCompile, OutOfBounds
from umbel.runtime.onnx import OnnxRuntime
from umbel_models.accumulation import Accumulated
from umbel_models.choices import parse_optimizer, parse_trainable
from umbel_models.cli import app
from umbel_models.measure import Speed, _examples, _runtime_works, measure, ratios, torch_works
from umbel_models.optimizers import SGD, Adam, Proximal
from umbel_models.trainable import Head, LoRA, Named, every_weight
from umbel_models.zoo import bundle_path, digits

runner = CliRunner()
MLP = "umbel_models.zoo.digits:mlp"


def test_build_then_inspect_then_check(tmp_path: Path) -> None:
    built = runner.invoke(app, ["build", MLP, "-o", str(tmp_path), "--runtime", "onnx,litert", "--json"])
    assert built.exit_code == 0, built.output
    told = json.loads(runner.invoke(app, ["inspect", str(tmp_path), "--json"]).stdout)
    assert json.loads(built.stdout)["digest"] == told["digest"]
    assert told["inputs"] == ["x: float32 [batch, 64]"]
    checked = runner.invoke(app, ["check", str(tmp_path), "--against", MLP, "--json"])
    assert checked.exit_code == 0, checked.output
    result = json.loads(checked.stdout)
    assert set(result["golden_difference"]) == set(result["parity"]) == {"onnx", "litert"}
    assert max(result["golden_difference"].values()) <= result["golden_tolerance"]
    assert set(result["parity"]["litert"]) == {"infer", "evaluate", "train_short", "train_long"}


@pytest.mark.slow
def test_what_is_trained_and_how_may_be_chosen_on_the_command_line(tmp_path: Path) -> None:
    chosen = ["--trainable", "lora:2:hidden:4", "--optimizer", "adamw:lr=0.002,mu=0.1,accumulate=3"]
    chosen += ["--clip-examples", "0.5"]
    built = runner.invoke(app, ["build", MLP, "-o", str(tmp_path), *chosen, "--json"])
    assert built.exit_code == 0, built.output
    told = json.loads(built.stdout)
    assert told["weights"] == {"trainable": 2 * (64 + 32), "buffers": 0, "frozen": 2410}
    assert told["hyperparameters"] == {"lr": 0.002, "mu": 0.1, "accumulate": 3.0, "example_clip": 0.5}
    checked = runner.invoke(app, ["check", str(tmp_path), "--against", MLP, *chosen])
    assert checked.exit_code == 0, checked.output
    other = runner.invoke(app, ["check", str(tmp_path), "--against", MLP])
    assert other.exit_code == 2
    assert "other weights" in other.stderr


def test_choices_are_read_as_the_python_api_writes_them() -> None:
    assert parse_trainable("all") is every_weight
    assert parse_trainable("head") == Head()
    assert parse_trainable("lora:8:q,v") == LoRA(8, ("q", "v"))
    assert parse_trainable("lora:8:layers.*.q:16") == LoRA(8, ("layers.*.q",), 16.0)
    assert parse_trainable("head.*, norm") == Named(("head.*", "norm"))
    assert parse_optimizer("sgd") == SGD()
    assert parse_optimizer("sgd:lr=0.1,momentum=0.9") == SGD(0.1, 0.9)
    assert parse_optimizer("adam:beta1=0.8") == Adam(beta1=0.8)
    assert parse_optimizer("adamw:lr=1e-4") == Adam(1e-4, weight_decay=0.01)
    assert parse_optimizer("adamw:weight_decay=0.2") == Adam(weight_decay=0.2)
    assert parse_optimizer("sgd:mu=0.1,accumulate=2") == Accumulated(Proximal(SGD(), 0.1), 2)


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (parse_trainable, "", "doesn't say what is trained"),
        (parse_trainable, " , ", "doesn't say what is trained"),
        (parse_trainable, "lore:8:q", "doesn't say what is trained"),
        (parse_trainable, "lora", "isn't lora:RANK:LAYERS"),
        (parse_trainable, "lora:8:q:16:3", "isn't lora:RANK:LAYERS"),
        (parse_trainable, "lora:0:q", "rank of 1 or more"),
        (parse_trainable, "lora:8:,", "rank of 1 or more and a target"),
        (parse_trainable, "lora:8:q:-1", "alpha of -1.0"),
        (parse_trainable, "lora:8:q:inf", "alpha of inf"),
        (parse_optimizer, "adam:momentum=0.9", "adam takes lr, beta1"),
        (parse_optimizer, "sgd:lr", "sgd takes lr, momentum, mu, accumulate, each once"),
        (parse_optimizer, "sgd:lr=0.1,lr=0.2", "each once"),
        (parse_optimizer, "sgd:lr=fast", "'fast' in 'sgd:lr=fast' is no number"),
        (parse_optimizer, "sgd:lr=-1", "lr is -1.0"),
        (parse_optimizer, "sgd:mu=inf", "mu is inf"),
        (parse_optimizer, "sgd:accumulate=2.5", "whole number of batches"),
        (parse_optimizer, "sgd:momentum=1", "momentum is 1.0"),
        (parse_optimizer, "adam:beta1=1", "beta1 is 1.0"),
        (parse_optimizer, "adam:lr=nan", "lr is nan"),
        (parse_optimizer, "adam:epsilon=0", "epsilon is 0.0"),
        (parse_optimizer, "adamw:weight_decay=inf", "weight_decay is inf"),
    ],
)
def test_a_choice_that_makes_no_sense_is_refused(parse: Callable[[str], object], text: str, message: str) -> None:
    with pytest.raises(CannotCompile, match=message):
        parse(text)


def test_tables_show_shapes_with_their_brackets() -> None:
    result = runner.invoke(app, ["inspect", str(bundle_path("smartwatch"))])
    assert result.exit_code == 0
    assert "[batch, 6, 100]" in result.stdout
    assert "pendulum" in result.stdout


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_bench_compares_with_torch_where_it_is_given_and_measures_alone_where_not(tmp_path: Path) -> None:
    folder = str(bundle_path("digits"))
    against = runner.invoke(app, ["bench", folder, "--against", MLP, "--batches", "1,3", "--turns", "1", "--json"])
    assert against.exit_code == 0, against.output
    told = json.loads(against.stdout)
    assert set(told) == {"bundle", *(f"{way} batch {size}" for way in ("onnx", "litert", "torch") for size in (1, 3))}
    assert told["onnx batch 3"]["train_times_torch"] > 0
    alone = runner.invoke(app, ["bench", folder, "--batches", "9", "--turns", "1"])
    assert alone.exit_code == 0, alone.output
    assert "torch" not in alone.stdout
    assert "litert batch 9" in alone.stdout, "more than there are golden examples"


def test_what_is_measured_of_a_runtime_moves_nothing_and_is_told_in_times_of_torch() -> None:
    bundle = Bundle.open(bundle_path("digits"))
    (train, _) = _runtime_works(bundle, OnnxRuntime(), *_examples(bundle, None, 9)).values()
    assert len({train() for _ in range(3)}) == 1, "the loss stays as it is"
    speeds = [Speed("torch", 1, 6.0, 2.0), Speed("onnx", 1, 3.0, 0.5), Speed("onnx", 2, 1.0, 1.0)]
    assert ratios(speeds) == {("onnx", 1): (2.0, 4.0)}
    nothing: list[dict[str, Any]] = [{"batches": ()}, {"batches": (1, 0)}, {"turns": 0}, {"runtimes": ()}]
    for wrong in nothing:
        with pytest.raises(OutOfBounds, match="at least one of each"):
            measure(bundle, **({"runtimes": [OnnxRuntime()]} | wrong))


def test_what_is_measured_of_torch_are_whole_batches_and_moves_nothing() -> None:
    works = torch_works(digits.mlp(), 7)
    step, answer = works["torch", "train"], works["torch", "infer"]
    assert len({step() for _ in range(3)}) == 1, "the loss stays as it is"
    assert cast(Tensor, answer()).shape == (7, 10)


def test_a_second_build_takes_its_graphs_from_the_cache_unless_told_not_to(tmp_path: Path) -> None:
    def build(*more: str) -> list[str]:
        result = runner.invoke(app, ["build", MLP, "-o", str(tmp_path), "--json", *more])
        assert result.exit_code == 0, result.output
        found: list[str] = json.loads(result.stdout)["graphs_from_cache"]
        return found

    assert [build(), build(), build("--no-cache")] == [[], ["onnx"], []]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", str(bundle_path("digits")), "--batches", "many"], "are no batches"),
        (["bench", str(bundle_path("digits")), "--batches", "0"], "at least one"),
        (["bench", "no-such-folder"], "no bundle"),
        (["bench", str(bundle_path("digits")), "--against", MLP, "--trainable", "head"], "trains others"),
        (["bench", str(bundle_path("digits")), "--against", "umbel_models.zoo.digits:cnn"], "has other weights"),
        (["build", "no-colon", "-o", "unused"], "package.module:spec"),
        (["build", "no.such.module:spec", "-o", "unused"], "can't load"),
        (["build", "umbel_models.zoo.digits:nothing", "-o", "unused"], "can't load"),
        (["build", "umbel_models.zoo.digits:LABELS", "-o", "unused"], "must be a ModelSpec"),
        (["build", MLP, "-o", "unused", "--runtime", "abacus"], "no runtime goes by 'abacus'"),
        (["build", MLP, "-o", "unused", "--trainable", "lora:hidden"], "isn't lora:RANK:LAYERS"),
        (["build", MLP, "-o", "unused", "--trainable", "lora:4:tail"], "dense layers are hidden, head"),
        (["build", MLP, "-o", "unused", "--trainable", "tail"], "no weight goes by 'tail'"),
        (["build", MLP, "-o", "unused", "--clip-examples", "0"], "must be a number above zero"),
        (["build", MLP, "-o", "unused", "--optimizer", "rmsprop"], "choose sgd, adam, adamw"),
        (["build", MLP, "-o", "unused", "--runtime", ""], "name one or more"),
        (["build", MLP, "-o", "unused", "--quantise", "int8", "--largest-drop", "nan"], "largest drop is nan"),
        (["build", ":spec", "-o", "unused"], "can't load"),
        (["build", "..above:spec", "-o", "unused"], "can't load"),
        (["build", MLP, "-o", "/dev/null"], "File exists"),
        (["build", MLP, "-o", "/dev/null/below"], "Not a directory"),
        (["inspect", "no-such-folder"], "no bundle"),
        (["check", "no-such-folder"], "no bundle"),
    ],
)
def test_a_refusal_is_told_on_standard_error_with_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_was_tampered_with_is_not_checked_any_further(tmp_path: Path) -> None:
    for file in bundle_path("smartwatch").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    graph = tmp_path / "train.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"\0")
    result = runner.invoke(app, ["check", str(tmp_path)])
    assert result.exit_code == 2
    assert "digest-mismatch" in result.stderr


def test_a_spec_of_ones_own_is_found_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_model_of_a_test.py").write_text(
        "from umbel_models.zoo.digits import mlp\nspec = mlp(seed=3)\n", encoding="utf-8"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = runner.invoke(app, ["build", "own_model_of_a_test:spec", "-o", "out"])
    assert result.exit_code == 0, result.output


AUTHOR = """
import sys
from umbel_models.zoo.digits import mlp


def odd():
    raise KeyError("boom [red]")


def leaves():
    sys.exit(7)


def wants(more):
    return mlp()


def chatty():
    print("chatter")
    return mlp()
"""


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        (AUTHOR, "odd", "KeyError: 'boom [red]' ("),
        (AUTHOR, "leaves", "SystemExit: 7"),
        (AUTHOR, "wants", "TypeError: wants() missing"),
        ("def (", "spec", "SyntaxError"),
        ("raise RuntimeError('at import')", "spec", "RuntimeError: at import ("),
    ],
)
def test_what_an_author_s_own_code_raises_is_told_with_its_line(
    source: str, name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = build_from(source, name, tmp_path, monkeypatch)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not result.stdout


def test_what_an_author_s_own_code_prints_stays_out_of_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = build_from(AUTHOR, "chatty", tmp_path, monkeypatch)
    assert json.loads(result.stdout)["model"] == "digits-mlp"
    assert "chatter" in result.stderr


def build_from(source: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    (folder / "an_author_s_module.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "an_author_s_module", raising=False)
    return runner.invoke(app, ["build", f"an_author_s_module:{name}", "-o", "out", "--no-cache", "--json"])
