"""A step of a Flower strategy is a pure function, and means what Flower means by it."""

from __future__ import annotations

import inspect
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# First, because it loads flwr quietly.
from umbel_server.flower.compat import reply_without_request

# isort: split
import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from tests.server.cohorts import ZERO, cohort
from umbel.errors import BadInput, MalformedMessage, NotFinite, OutOfBounds, WeightsMismatch
from umbel.plan import Kind, Plan
from umbel.update import Aggregate, Update
from umbel.weights import Weights
from umbel_server.aggregation import Collected, Presummed, Singles
from umbel_server.flower import (
    CATALOGUE,
    StrategySpec,
    apply,
    device_hyperparameters,
    least_reports,
    needed_metrics,
    require_strategy,
)
from umbel_server.task import Task

ARGUMENTS: dict[str, dict[str, float]] = {
    "FedAvgM": {"server_momentum": 0.9, "server_learning_rate": 0.7},
    "FedProx": {"proximal_mu": 0.1},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
    "QFedAvg": {"client_learning_rate": 0.1},
}
SPECS = [StrategySpec(name, ARGUMENTS.get(name, {})) for name in CATALOGUE]
PLUMBING = {"weighted_by_key", "arrayrecord_key", "configrecord_key", "train_loss_key", "selection_rule"}
named = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def collect(spec: StrategySpec, updates: list[Update], base: Weights = ZERO) -> Collected:
    if CATALOGUE[spec.name].robust:
        return Singles.of(updates)
    total = Aggregate.zero(base.shapes)
    for update in updates:
        total.accumulate(update)
    return Presummed(total)


def flower_record(weights: Weights) -> ArrayRecord:
    return ArrayRecord({name: Array(np.array(array)) for name, array in weights.arrays.items()})


def flower_replies(base: Weights, collected: Collected) -> list[Message]:
    """Replies as a plain Flower user would make them."""
    updates = list(collected) if isinstance(collected, Singles) else None
    if isinstance(collected, Presummed):
        updates = [Update(collected.aggregate.mean(), collected.weight, {"train_loss": 0.0, "train_examples": 1.0})]
    replies = []
    for node_id, update in enumerate(updates or []):
        loss = update.metrics["train_loss"] / update.metrics["train_examples"]
        metrics = MetricRecord({"num-examples": update.weight, "train_loss": loss})
        content = RecordDict({"arrays": flower_record(base + update.delta), "metrics": metrics})
        replies.append(reply_without_request(content, node_id))
    return replies


class OneNode:
    def get_node_ids(self) -> list[int]:
        return [1]


def long_lived(spec: StrategySpec) -> Any:
    return getattr(flower, spec.name)(min_train_nodes=1, min_available_nodes=1, fraction_train=0.0, **spec.arguments)


@named
def test_rounds_through_bytes_are_bit_equal_to_one_long_lived_strategy(spec: StrategySpec) -> None:
    strategy = long_lived(spec)
    ours, theirs, state = ZERO, ZERO, b""
    for number in range(1, 7):
        collected = collect(spec, cohort(7, ours, number))
        strategy.configure_train(number, flower_record(theirs), ConfigRecord(), OneNode())
        arrays, _ = strategy.aggregate_train(number, flower_replies(theirs, collected))
        theirs = Weights({name: array.numpy() for name, array in arrays.items()})
        ours, state = apply(spec, state, ours, collected, number)
        assert ours.to_bytes() == theirs.to_bytes(), f"round {number}"
    assert not CATALOGUE[spec.name].state or state


@named
def test_no_state_but_the_catalogued_outlives_a_round(spec: StrategySpec) -> None:
    strategy = long_lived(spec)
    before = dict(vars(strategy))
    collected = collect(spec, cohort(7))
    strategy.configure_train(1, flower_record(ZERO), ConfigRecord(), OneNode())
    strategy.aggregate_train(1, flower_replies(ZERO, collected))
    changed = {name for name, value in vars(strategy).items() if value is not before[name]}
    # current_arrays is what configure_train is given, each round anew.
    assert changed - {"current_arrays"} == set(CATALOGUE[spec.name].state)


@named
def test_a_step_repeats_and_leaves_its_inputs_alone(spec: StrategySpec) -> None:
    collected = collect(spec, cohort(7))
    base = cohort(1)[0].delta
    held = base.to_bytes()
    chance = random.getstate()
    first = apply(spec, b"", base, collected, 1)
    again = apply(spec, b"", base, collected, 1)
    assert (first[0].to_bytes(), first[1]) == (again[0].to_bytes(), again[1])
    assert base.to_bytes() == held
    assert random.getstate() == chance
    assert all(array.dtype == np.float32 for array in first[0].arrays.values())


@pytest.mark.parametrize("name", [name for name, entry in CATALOGUE.items() if not entry.robust])
def test_one_presummed_reply_gives_what_all_single_replies_give(name: str) -> None:
    spec = StrategySpec(name, ARGUMENTS.get(name, {}))
    updates = cohort(9)
    strategy = long_lived(spec)
    strategy.configure_train(1, flower_record(ZERO), ConfigRecord(), OneNode())
    arrays, _ = strategy.aggregate_train(1, flower_replies(ZERO, Singles.of(updates)))
    found, _ = apply(spec, b"", ZERO, collect(spec, updates), 1)
    for key, array in arrays.items():
        np.testing.assert_allclose(found[key], array.numpy(), rtol=2e-5, atol=1e-6)


def test_a_mean_is_the_weighted_mean_of_the_devices_models() -> None:
    updates = cohort(4)
    found, _ = apply(StrategySpec(), b"", ZERO, collect(StrategySpec(), updates), 1)
    weights = [update.weight for update in updates]
    expected = np.average([update.delta["p_slope"] for update in updates], axis=0, weights=weights)
    np.testing.assert_allclose(found["p_slope"], expected, rtol=1e-6)


@named
def test_the_catalogue_names_what_the_installed_flower_takes(spec: StrategySpec) -> None:
    parameters = inspect.signature(getattr(flower, spec.name)).parameters
    theirs = {
        name: None if one.default is inspect.Parameter.empty else one.default
        for name, one in parameters.items()
        if name not in PLUMBING and not name.startswith(("fraction_", "min_")) and not name.endswith("_fn")
    }
    ours = {name: argument.default for name, argument in CATALOGUE[spec.name].arguments.items()}
    assert ours == theirs
    assert {name: type(value) for name, value in ours.items()} == {name: type(value) for name, value in theirs.items()}


def refused(spec: StrategySpec, private: bool = False) -> str:
    with pytest.raises(BadInput) as caught:
        require_strategy(spec, private)
    return str(caught.value)


def test_an_unknown_strategy_is_answered_with_the_known_ones_and_their_arguments() -> None:
    answer = refused(StrategySpec("FedMagic"))
    for name, entry in CATALOGUE.items():
        assert name in answer
        assert all(argument in answer for argument in entry.arguments)


def test_an_unknown_argument_is_answered_with_the_known_ones() -> None:
    assert "server_momentum" in refused(StrategySpec("FedAvgM", {"momentum": 0.9}))
    assert "no arguments" in refused(StrategySpec("FedAvg", {"eta": 0.9}))


@pytest.mark.parametrize(
    "spec",
    [
        StrategySpec("FedAdam", {"eta": 0.0}),
        StrategySpec("FedAdam", {"eta": float("nan")}),
        StrategySpec("FedAdam", {"beta_1": 1.0}),
        StrategySpec("FedAdam", {"tau": "small"}),
        StrategySpec("FedTrimmedAvg", {"beta": 0.5}),
        StrategySpec("Krum", {"num_malicious_nodes": 1.5}),
        StrategySpec("Krum", {"num_malicious_nodes": True}),
        StrategySpec("Krum", {"num_malicious_nodes": -1}),
        StrategySpec("MultiKrum", {"num_nodes_to_select": 0}),
        StrategySpec("QFedAvg"),
    ],
    ids=str,
)
def test_an_argument_beyond_its_bounds_is_refused(spec: StrategySpec) -> None:
    with pytest.raises(OutOfBounds):
        require_strategy(spec, updates_private=False)


@named
def test_strategies_that_look_at_single_updates_are_refused_where_updates_are_private(spec: StrategySpec) -> None:
    require_strategy(spec, updates_private=False)
    if CATALOGUE[spec.name].robust:
        assert "private" in refused(spec, private=True)
    else:
        require_strategy(spec, updates_private=True)


def test_a_robust_strategy_is_not_applied_to_a_sum() -> None:
    with pytest.raises(BadInput):
        apply(StrategySpec("FedMedian"), b"", ZERO, collect(StrategySpec(), cohort(3)), 1)


@pytest.mark.parametrize(("name", "fewest"), [("Krum", 5), ("MultiKrum", 5), ("Bulyan", 7), ("FedMedian", 1)])
def test_fewer_reports_than_a_strategy_can_promise_for_are_refused(name: str, fewest: int) -> None:
    spec = StrategySpec(name, ARGUMENTS.get(name, {}))
    assert least_reports(spec) == fewest
    apply(spec, b"", ZERO, Singles.of(cohort(fewest)), 1)
    if fewest > 1:
        with pytest.raises(OutOfBounds):
            apply(spec, b"", ZERO, Singles.of(cohort(fewest - 1)), 1)


def test_a_mean_over_nobody_is_refused() -> None:
    with pytest.raises(OutOfBounds):
        apply(StrategySpec(), b"", ZERO, Presummed(Aggregate.zero(ZERO.shapes)), 1)


def adam_state() -> bytes:
    spec = StrategySpec("FedAdam")
    return apply(spec, b"", ZERO, collect(spec, cohort(3)), 1)[1]


OTHER = Weights({"p_other": np.zeros(3, np.float32)})
RESHAPED = Weights({"p_bias": np.zeros((1,)), "p_slope": np.zeros((4, 2))})


@pytest.mark.parametrize(
    ("name", "state", "base"),
    [
        ("FedAdam", lambda: b"nonsense", ZERO),
        ("FedAdam", lambda: adam_state()[:-5], ZERO),
        ("FedYogi", adam_state, ZERO),
        ("FedAvgM", adam_state, ZERO),
        ("FedAdam", adam_state, OTHER),
        ("FedAdam", adam_state, RESHAPED),
    ],
)
def test_a_state_that_is_not_this_strategys_is_refused(name: str, state: Callable[[], bytes], base: Weights) -> None:
    update = Update(base, 1.0, {})
    with pytest.raises(MalformedMessage):
        apply(StrategySpec(name), state(), base, collect(StrategySpec(name), [update], base), 2)


def test_reports_of_another_model_are_refused() -> None:
    with pytest.raises(WeightsMismatch):
        apply(StrategySpec(), b"", OTHER, collect(StrategySpec(), cohort(2)), 1)


def test_a_step_that_ends_beyond_float32_is_refused() -> None:
    total = Aggregate.zero(ZERO.shapes)
    total.accumulate(Update(cohort(1)[0].delta.scaled(1e37), 1.0, {}))
    with pytest.raises(NotFinite), np.errstate(over="ignore"):
        apply(StrategySpec("FedAvgM", {"server_learning_rate": 1e6}), b"", ZERO, Presummed(total), 1)


def test_what_a_strategy_asks_of_devices_goes_into_their_plan() -> None:
    assert device_hyperparameters(StrategySpec("FedProx", {"proximal_mu": 0.1})) == {"mu": 0.1}
    assert device_hyperparameters(StrategySpec("FedAvg")) == {}
    assert needed_metrics(StrategySpec("QFedAvg", {"client_learning_rate": 0.1})) == {"train_loss", "train_examples"}
    assert needed_metrics(StrategySpec("Krum")) == frozenset()


def test_a_plan_and_a_strategy_that_ask_devices_for_different_things_are_refused() -> None:
    """FedProx by its name alone has a weight of 0: it would undo the plan's without a word."""
    plan = Plan(hyperparameters={"mu": 0.1})
    with pytest.raises(BadInput, match=r"plan's mu is 0\.1, and FedProx asks devices for 0; leave it to one"):
        Task("prox", "people", "model", plan, strategy=StrategySpec("FedProx"))
    for agreed in (StrategySpec("FedAvg"), StrategySpec("FedProx", {"proximal_mu": 0.1})):
        assert Task("prox", "people", "model", plan, strategy=agreed).plan_for(Kind.TRAIN).hyperparameters == {
            "mu": 0.1
        }


def test_a_step_leaves_the_garbage_collector_as_it_was() -> None:
    """In a process of its own, as this one's objects are frozen."""
    program = """
import gc, sys
import numpy as np
from umbel.update import Aggregate
from umbel.weights import Weights
from umbel_server.aggregation import Presummed
from umbel_server.flower import StrategySpec, apply
if "frozen" in sys.argv:
    gc.freeze()
base = Weights({"w": np.zeros(3, np.float32)})
for number in (1, 2):
    cohort = Presummed(Aggregate({"w": (3,)}, np.ones(3, np.float32), 1.0, 1, {}))
    apply(StrategySpec("FedAvg", {}), b"", base, cohort, number)
    print(gc.get_freeze_count() > 1_000, gc.isenabled())
"""
    for arguments, frozen in (((), False), (("frozen",), True)):
        found = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        assert found.stdout.splitlines() == [f"{frozen} True"] * 2


def test_loading_flower_leaves_nothing_behind_and_writing_a_task_does_not_load_it() -> None:
    program = """
import logging, os, sys, threading
before = dict(os.environ)
import umbel_server.flower, umbel_server.aggregation, umbel_server.validation
assert "flwr" not in sys.modules
import umbel_server.flower.engine, umbel_server.flower.grid
assert "flwr" in sys.modules
assert dict(os.environ) == before
assert not logging.getLogger().handlers
assert not any(logging.getLogger(name).handlers for name in ("flwr", "flwr-telemetry"))
assert [thread.name for thread in threading.enumerate()] == ["MainThread"]
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@named
def test_the_reference_page_tells_each_strategy_and_argument(spec: StrategySpec) -> None:
    page = Path(__file__).parents[2].joinpath("docs/reference/strategies.md").read_text()
    section = page.partition(f"### {spec.name}\n")[2].partition("\n#")[0]
    entry = CATALOGUE[spec.name]
    assert ("single updates" in section) == entry.robust
    for name, argument in entry.arguments.items():
        default = "(must be given)" if argument.default is None else argument.default
        assert f"| `{name}` | {default} |" in section
        assert argument.meaning in section
