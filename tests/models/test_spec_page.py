"""docs/reference/model-spec.md has every field and choice of a spec with its default, and its example compiles."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from umbel.bundle import Bundle
from umbel_models import histograms, losses
from umbel_models.accumulation import Accumulated
from umbel_models.compile import Compiled, compile_model
from umbel_models.losses import correct
from umbel_models.optimizers import SGD, Adam, Proximal
from umbel_models.quantising import Quantise
from umbel_models.spec import ModelSpec
from umbel_models.trainable import Head, LoRA, Named, every_weight

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "model-spec.md").read_text("utf-8")


def rows(section: str) -> dict[str, list[str]]:
    """First cell -> all cells, for each row of a section's table."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    found = [[cell.strip() for cell in row.split("|")[1:-1]] for row in re.findall(r"^\| .*\|$", text, re.MULTILINE)]
    return {cells[0]: cells for cells in found[1:]}


def called(call: Callable[..., Any]) -> str:
    """As the page writes a call: names and defaults."""
    given = inspect.signature(call).parameters.values()
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in given]
    return f"{call.__name__}{inspect.Signature(bare)}".replace("'", '"')


def default_of(field: Field[Any]) -> object:
    return field.default if field.default_factory is MISSING else field.default_factory()


def public(module: ModuleType) -> list[Callable[..., Any]]:
    return [
        one
        for name, one in vars(module).items()
        if inspect.isfunction(one) and one.__module__ == module.__name__ and not name.startswith("_")
    ]


def test_every_field_of_a_spec_is_there_with_its_default() -> None:
    known = {"SGD()": SGD(), "every_weight": every_weight, '{"correct": correct}': {"correct": correct}}
    told = {name.strip("`"): cells[1].strip("`") for name, cells in rows("`ModelSpec`").items()}
    assert [*told] == [field.name for field in fields(ModelSpec)]
    for field in fields(ModelSpec):
        default, text = default_of(field), told[field.name]
        assert (
            default == known[text]
            if text in known
            else text == ("" if default is MISSING else repr(default).replace("'", '"'))
        )


@pytest.mark.parametrize("made", [SGD(momentum=0.9), Adam(), Proximal(Adam()), Accumulated(Adam())], ids=repr)
def test_every_optimiser_is_there_with_what_a_plan_may_set(made: Any) -> None:
    told = rows("Optimisers")[f"`{called(type(made))}`"][2]
    own = {*made.hyperparameters} - {*getattr(getattr(made, "inner", None), "hyperparameters", {})}
    assert {*re.findall(r"`(\w+)`", told)} == own


def test_every_choice_of_weights_is_there() -> None:
    told = " ".join(rows("Which weights are trained"))
    assert all(f"`{words}`" in told for words in ("every_weight", called(Head), called(Named), called(LoRA)))


@pytest.mark.parametrize("module", [losses, histograms], ids=lambda module: module.__name__)
def test_every_loss_metric_and_histogram_is_there(module: ModuleType) -> None:
    inner = ("histogram_of", "bins_of")  # the compiler's own
    assert not [called(one) for one in public(module) if one.__name__ not in inner and f"`{called(one)}`" not in PAGE]
    assert f"`{called(histograms.Counting)}`" in PAGE


def test_compiling_from_python_takes_and_gives_what_the_page_says() -> None:
    flowing = " ".join(PAGE.split())
    assert f"`{called(Quantise)}`" in flowing
    assert re.sub(r"progress=<.*?>(?=, )", "progress=…", called(compile_model)) in flowing
    section = PAGE.partition("## From Python")[2]
    assert not [field.name for field in fields(Compiled) if f"`{field.name}`" not in section]


def test_the_example_compiles(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    compile_model(names["spec"], tmp_path)
    manifest = Bundle.open(tmp_path).manifest
    assert [weight.name for weight in manifest.trainable] == ["p_2.bias", "p_2.weight"]
    assert {*manifest.hyperparameters} == {"lr", "mu"}
