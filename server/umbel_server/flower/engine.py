"""One step of an unmodified Flower strategy, as a pure function.

    spec --build--> strategy <--restore-- state
    configure_train(current)    the strategy learns what the cohort started from
    aggregate_train(replies)    one presummed reply, or a reply for each device
    (new weights, new state)

The strategy object lives for one call. What Flower would keep in it between rounds travels as bytes, which the
coordinator commits together with the version they belong to; so a candidate that is refused, or a process that is
killed, leaves the optimiser where it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Final, cast

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from umbel.errors import BadInput, MalformedMessage, OutOfBounds, WrongState
from umbel.update import Update
from umbel.weights import Weights, require_finite, require_shapes
from umbel_server.aggregation import Collected, Presummed
from umbel_server.flower.compat import AppExitException, LazyArray, quick_collections, reply_without_request
from umbel_server.flower.spec import CATALOGUE, StrategySpec, least_reports, needed_metrics, require_strategy

# isort: split
import flwr.serverapp.strategy as flower_strategies
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

_NO_GRID: Final = cast("Grid", None)
"""With sampling switched off, `configure_train` only notes the weights and asks no grid for devices."""

_SPEC: Final = "spec"
"""Key, in the state's own metadata, of the strategy that wrote it."""


def apply(
    spec: StrategySpec, state: bytes, current: Weights, collected: Collected, round_number: int
) -> tuple[Weights, bytes]:
    """Turn a cohort's reports into new weights.

    Args:
        spec: the strategy and its arguments.
        state: what the last accepted step returned; empty before the first.
        current: the shared weights that the cohort started from.
        collected: the reports: their sum for mean-based strategies, single ones for robust ones.
        round_number: counts from 1; Adam's bias correction uses it.

    Returns:
        The new weights (float32) and the strategy's new state; equal inputs give equal bytes.

    Raises:
        BadInput, OutOfBounds: the strategy can't be run so, or has too few reports.
        WeightsMismatch: the reports are of another model.
        MalformedMessage: a state that isn't this strategy's.
        NotFinite: the result holds NaN or infinity.
    """
    require_strategy(spec, updates_private=isinstance(collected, Presummed))
    fewest = least_reports(spec)
    if collected.count < fewest:
        raise OutOfBounds(f"{spec.name} needs {fewest} reports, this round has {collected.count}; raise its minimum")
    strategy = build(spec)
    _restore(strategy, spec, state, current)
    strategy.configure_train(round_number, to_record(current), ConfigRecord(), _NO_GRID)
    try:
        with quick_collections():
            arrays, _ = strategy.aggregate_train(round_number, list(_replies(spec, current, collected)))
    except AppExitException as error:
        raise OutOfBounds(f"{spec.name} couldn't aggregate round {round_number}: {error}") from error
    if arrays is None:
        raise WrongState(f"{spec.name} gave no model for round {round_number}; the last version stands")
    new = from_record(arrays)
    require_shapes(new.shapes, current.shapes)
    require_finite(new)
    return new, _snapshot(strategy, spec)


def build(spec: StrategySpec) -> FedAvg:
    """A fresh strategy object. Selection is the coordinator's, so Flower's own sampling is switched off."""
    kind: type[FedAvg] = getattr(flower_strategies, spec.name)
    entry = CATALOGUE[spec.name]
    # As the numbers that Flower's signature has: JSON may have turned 1.0 into 1, or 1 into 1.0.
    arguments = {
        name: int(value) if isinstance(entry.arguments[name].default, int) else float(value)
        for name, value in spec.arguments.items()
    }
    strategy = kind(**arguments)  # type: ignore[arg-type]
    strategy.fraction_train = 0.0
    return strategy


def to_record(weights: Weights) -> ArrayRecord:
    """As Flower's record, names in sorted order."""
    record = ArrayRecord()
    for name, array in weights.arrays.items():
        record[name] = LazyArray(array.shape, array.copy)
    return record


def from_record(record: ArrayRecord) -> Weights:
    """Undo `to_record`; some strategies compute in float64, a model is float32."""
    return Weights({name: array.numpy() for name, array in record.items()})


def _replies(spec: StrategySpec, current: Weights, collected: Collected) -> Iterable[Message]:
    if isinstance(collected, Presummed):
        aggregate = collected.aggregate
        yield _reply(current, Update(aggregate.mean(), aggregate.weight, aggregate.metrics), 0)
        return
    for node_id, update in enumerate(collected):
        missing = needed_metrics(spec) - set(update.metrics)
        if missing:
            raise BadInput(f"{spec.name} needs {', '.join(sorted(missing))} of each device; refuse reports without")
        yield _reply(current, update, node_id, wants_loss=bool(needed_metrics(spec)))


def _reply(current: Weights, update: Update, node_id: int, wants_loss: bool = False) -> Message:
    require_shapes(update.delta.shapes, current.shapes)
    record = ArrayRecord()
    for name, array in current.arrays.items():
        record[name] = _moved(array, update.delta[name])
    # Metrics are summed elsewhere; a strategy gets only those it reckons with, so that no device can break a round by
    # one more or one less.
    metrics = MetricRecord({"num-examples": update.weight})
    if wants_loss:
        metrics["train_loss"] = update.metrics["train_loss"] / update.metrics["train_examples"]
    return reply_without_request(RecordDict({"arrays": record, "metrics": metrics}), node_id)


def _moved(base: NDArray[np.float32], delta: NDArray[np.float32]) -> LazyArray:
    # asarray: the sum of two arrays without dimensions is a scalar.
    return LazyArray(base.shape, lambda: np.asarray(base + delta))


# State: the attributes that the catalogue names, as one safetensors file.


def _snapshot(strategy: FedAvg, spec: StrategySpec) -> bytes:
    arrays: dict[str, NDArray[np.generic]] = {}
    for attribute in CATALOGUE[spec.name].state:
        value = getattr(strategy, attribute)
        if value is None:
            continue
        # Flower keeps some by name and some as a list in the order of the arrays.
        named = value.items() if isinstance(value, dict) else enumerate(value)
        arrays |= {f"{attribute}/{key}": np.asarray(array, order="C") for key, array in named}
    return safetensors.numpy.save(arrays, {_SPEC: spec.name}) if arrays else b""


def _restore(strategy: FedAvg, spec: StrategySpec, state: bytes, current: Weights) -> None:
    if not state:
        return
    try:
        arrays = safetensors.numpy.load(state)
        header = json.loads(state[8 : 8 + int.from_bytes(state[:8], "little")])
        owner = header.get("__metadata__", {}).get(_SPEC)
    except (safetensors.SafetensorError, ValueError) as error:
        raise MalformedMessage(f"not the state of a strategy: {error}") from error
    if owner != spec.name:
        raise MalformedMessage(f"the state is {owner!r}'s, not {spec.name}'s; start {spec.name} with an empty one")
    for attribute in CATALOGUE[spec.name].state:
        found = {key.partition("/")[2]: array for key, array in arrays.items() if key.startswith(f"{attribute}/")}
        if found:
            setattr(strategy, attribute, _aligned(attribute, found, current))


def _aligned(attribute: str, found: dict[str, NDArray[np.generic]], current: Weights) -> object:
    names = list(current)
    if set(found) == set(names):
        ordered = {name: found[name] for name in names}
        value: object = ordered
    elif set(found) == {str(index) for index in range(len(names))}:
        ordered = {name: found[str(index)] for index, name in enumerate(names)}
        value = list(ordered.values())
    else:
        raise MalformedMessage(f"the strategy's {attribute} is of another model; start with an empty state")
    for name, array in ordered.items():
        if array.shape != current[name].shape:
            raise MalformedMessage(f"{attribute} of {name!r} has shape {array.shape}; start with an empty state")
    return value
