"""A task as an operator writes it down: TOML, with the defaults of `Task` for whatever is left out.

name = "shoulder"
population = "watches"
model = "smartwatch"
rounds = 20
goal = 16
minimum = 8

[plan]
epochs = 3
batch_size = 16
hyperparameters = { lr = 0.05 }

[strategy]
name = "FedAdam"
arguments = { eta = 0.01 }

[validation]
max_accuracy_drop = 0.1
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from umbel.errors import MalformedMessage
from umbel.plan import Kind, Plan
from umbel.v1 import admin_pb2 as pb
from umbel_server.files import read_toml
from umbel_server.json_text import like

_PARTS = ("plan", "strategy", "validation", "privacy")


def read_task(
    file: Path | None,
    chosen: Mapping[str, Any],
    plan: Mapping[str, Any],
    strategy: str | None,
    privacy: Mapping[str, Any] | None = None,
) -> pb.TaskSpec:
    """A task from a file and from options; options go first, `None` among them means not chosen.

    Args:
        file: TOML, or nothing.
        chosen: fields of a task.
        plan: fields of its plan, and `lr` for the hyper-parameter of that name.
        strategy: the strategy's name.
        privacy: fields of its `[privacy]`.

    Raises:
        typer.BadParameter: a name, a population or a model is missing.
        NotFound: no such file.
        MalformedMessage: not TOML, or a field that a task doesn't have.
        BadInput: a task that doesn't make sense.
    """
    from umbel_server.admin_messages import task_to_message
    from umbel_server.flower.spec import StrategySpec
    from umbel_server.privacy_settings import PrivacySettings
    from umbel_server.task import Task
    from umbel_server.validation import ValidationPolicy

    tree = read_toml(file) if file else {}
    parts = {part: tree.pop(part, {}) for part in _PARTS}
    fields = tree | _given(chosen)
    for required in ("name", "population", "model"):
        if required not in fields:
            raise typer.BadParameter(f"a task needs a {required}: give --{required}, or {required} = … in --file")
    if "state" in fields:
        raise MalformedMessage("a task's state isn't written down; it begins to run, and `umbel tasks pause` stops it")
    try:
        if strategy is not None:
            parts["strategy"] = {"name": strategy}
        task = Task(
            **like(Task, fields, "a task"),
            plan=_plan(parts["plan"], _given(plan)),
            strategy=StrategySpec(**parts["strategy"]),
            validation=ValidationPolicy.from_tree(parts["validation"]),
            privacy=PrivacySettings.from_tree(parts["privacy"] | dict(privacy or {})),
        )
        return task_to_message(task)
    except (TypeError, ValueError, AttributeError) as error:
        raise MalformedMessage(f"not a task: {error}") from error


def settings_of(assignments: Sequence[str]) -> dict[str, int | float]:
    """Numbers given as KEY=VALUE on the command line; raises `MalformedMessage`."""
    found: dict[str, int | float] = {}
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        try:
            found[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            raise MalformedMessage(f"{assignment!r} isn't KEY=VALUE with a number as its value") from None
    return found


def _plan(tree: Mapping[str, Any], chosen: dict[str, Any]) -> Plan:
    values = {**tree}
    hyperparameters = {**values.pop("hyperparameters", {})}
    if "lr" in chosen:
        hyperparameters["lr"] = chosen.pop("lr")
    kind = Kind(values.pop("kind", Kind.TRAIN.value))
    fields = {**values, **chosen, "kind": kind, "hyperparameters": hyperparameters}
    return Plan(**like(Plan, fields, "a plan"))


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
