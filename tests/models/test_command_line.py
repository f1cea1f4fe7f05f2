"""`umbel-compile` builds, tells and checks; a refusal is one line and exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from umbel_models.cli import app
from umbel_models.zoo import bundle_path

runner = CliRunner()
MLP = "umbel_models.zoo.digits:mlp"


def test_build_then_inspect_then_check(tmp_path: Path) -> None:
    built = runner.invoke(app, ["build", MLP, "-o", str(tmp_path), "--json"])
    assert built.exit_code == 0, built.output
    told = json.loads(runner.invoke(app, ["inspect", str(tmp_path), "--json"]).stdout)
    assert json.loads(built.stdout)["digest"] == told["digest"]
    assert told["inputs"] == ["x: float32 [batch, 64]"]
    checked = runner.invoke(app, ["check", str(tmp_path), "--against", MLP, "--json"])
    assert checked.exit_code == 0, checked.output
    result = json.loads(checked.stdout)
    assert result["golden_difference"] <= result["golden_tolerance"]
    assert set(result["parity"]) == {"infer", "evaluate", "train_short", "train_long"}


def test_tables_show_shapes_with_their_brackets() -> None:
    result = runner.invoke(app, ["inspect", str(bundle_path("smartwatch"))])
    assert result.exit_code == 0
    assert "[batch, 6, 100]" in result.stdout
    assert "pendulum" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "no-colon", "-o", "unused"], "package.module:spec"),
        (["build", "no.such.module:spec", "-o", "unused"], "can't load"),
        (["build", "umbel_models.zoo.digits:nothing", "-o", "unused"], "can't load"),
        (["build", "umbel_models.zoo.digits:LABELS", "-o", "unused"], "must be a ModelSpec"),
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
