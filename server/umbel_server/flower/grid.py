"""A Flower `Grid` over Umbel's devices: `strategy.start(grid, ...)` and a `ServerApp` run on it as they are.

    strategy --messages--> DeviceGrid --CohortOrder--> CohortPort --> devices
    strategy <--replies--- DeviceGrid <--Update------- CohortPort <-- devices

Messages with the same content become one order, since one cohort runs one plan. What comes back is checked before a
strategy sees it, and a report that fails is left out: an error reply would make some strategies skip the round.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Final, Protocol, cast

from umbel.digests import digest_of
from umbel.errors import BadInput, OutOfBounds, UmbelError
from umbel.histograms import without_bins
from umbel.identity import DeviceId
from umbel.plan import Kind, Plan
from umbel.update import Metrics, Update
from umbel.weights import Shapes, Weights, require_finite, require_shapes
from umbel_server.cohort import CohortOrder
from umbel_server.flower.compat import Run, identify_task, set_message_id
from umbel_server.flower.engine import from_record, to_record
from umbel_server.validation import TRAINING_METRICS, ReportRules, require_report

# isort: split
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

_log = logging.getLogger(__name__)

_ROUND: Final = "server-round"
_PROXIMAL: Final = "proximal-mu"
_PLAN_NUMBERS: Final = {one.name for one in fields(Plan)} - {"kind", "hyperparameters"}


class CohortPort(Protocol):
    """Where a grid finds devices; the coordinator behind it decides how many to invite and when to stop waiting."""

    def shapes(self) -> Shapes:
        """Names and shapes of the model's shared weights."""

    def rules(self, order: CohortOrder) -> ReportRules:
        """What the reports of this order have to keep to."""

    def device_ids(self) -> Sequence[DeviceId]:
        """Devices that may be asked now."""

    def run(self, order: CohortOrder, timeout: float | None) -> Sequence[tuple[DeviceId, Update]]:
        """Run one cohort and wait: for its goal, or for `timeout` seconds. Devices that fail are left out."""


class DeviceGrid(Grid):
    """Flower's view of a population whose task openly says that its updates aren't private.

    Args:
        port: reaches the devices.
        plan: what a device runs unless a message's config says otherwise. In that config, names of a plan's fields
            (`epochs`, `batch_size`, ...) replace them, `proximal-mu` becomes the hyper-parameter `mu`, and any other
            number becomes a hyper-parameter of its own name.
    """

    def __init__(self, port: CohortPort, plan: Plan | None = None) -> None:
        self._port = port
        self._plan = plan or Plan()
        self._run = Run.create_empty(1)
        self._pending: dict[str, Future[list[Message]]] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="umbel-grid")
        identify_task()

    # What Flower's interface asks for.

    def set_run(self, run: Run) -> None:
        """Keep Flower's description of the run; nothing here depends on it."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to one device."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Flower's numbers of the devices that may be asked now."""
        return list(self._devices())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the cohorts in the background; `pull_messages` gives their replies."""
        listed = list(messages)
        identifiers = [set_message_id(message) for message in listed]
        future = self._worker.submit(self._exchange, listed, _longest(listed))
        self._pending |= dict.fromkeys(identifiers, future)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there by now, each once."""
        wanted = set(message_ids)
        replies = []
        for identifier in wanted & set(self._pending):
            if self._pending[identifier].done():
                found = self._pending.pop(identifier).result()
                replies += [reply for reply in found if reply.metadata.reply_to_message_id == identifier]
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run the cohorts and wait for them; `timeout` counts for each cohort.

        Raises:
            BadInput: a message that no device can act upon.
            OutOfBounds: a config that makes no plan.
            WeightsMismatch, NotFinite: weights that aren't the model's.
        """
        listed = list(messages)
        for message in listed:
            set_message_id(message)
        return self._exchange(listed, timeout)

    def close(self) -> None:
        """Give the background thread back."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    # Messages -> orders -> updates -> replies.

    def _devices(self) -> dict[int, DeviceId]:
        return {_number(device): device for device in self._port.device_ids()}

    def _exchange(self, messages: list[Message], timeout: float | None) -> list[Message]:
        devices = self._devices()
        replies: list[Message] = []
        for group in _by_content(messages):
            asked = {devices[node]: message for node, message in group.items() if node in devices}
            if asked:
                replies += self._run_cohort(asked, timeout)
        return replies

    def _run_cohort(self, asked: Mapping[DeviceId, Message], timeout: float | None) -> list[Message]:
        order, names = self._order(asked)
        rules = self._port.rules(order)
        require_finite(order.weights)
        updates: dict[DeviceId, Update] = {}
        for device, update in self._port.run(order, timeout):
            try:
                require_report(update, rules)
            except UmbelError as error:
                _log.warning("left out a report of round %d: %s", order.round_number, error)
                continue
            if device in asked:
                updates[device] = update
        return _replies(order, asked, updates, names)

    def _order(self, asked: Mapping[DeviceId, Message]) -> tuple[CohortOrder, dict[str, str]]:
        """What the messages ask for, and the program's name for each of the model's weights."""
        message = next(iter(asked.values()))
        records = list(message.content.array_records.values())
        if len(records) != 1:
            raise BadInput(f"a message holds {len(records)} records of arrays; send one, the model")
        config: dict[str, object] = {}
        for record in message.content.config_records.values():
            config |= record
        kind = _kind(message.metadata.message_type)
        plan = _planned(replace(self._plan, kind=kind), config)
        # Sorted, because Flower's sample comes in an order that nobody could repeat.
        shapes = self._port.shapes()
        names = _names(records[0], shapes)
        given = from_record(ArrayRecord({name: records[0][name] for name in names.values()}))
        require_shapes({name: given[names[name]].shape for name in names}, shapes)
        weights = Weights({name: given[names[name]] for name in names})
        round_number = int(cast("int", config.get(_ROUND, 1)))
        return CohortOrder(plan, weights, tuple(sorted(asked)), round_number), names


def _names(given: ArrayRecord, shapes: Shapes) -> dict[str, str]:
    """A bundle says `p_conv.weight` where torch says `conv.weight`; a program may use either, for all alike.

    A torch module's `state_dict` may hold more than devices train: frozen weights, counters of batch norm.
    """
    plain = {name: name.partition("_")[2] for name in shapes}
    if set(plain.values()) <= set(given) and len(set(plain.values())) == len(plain):
        return plain
    return {name: name for name in given}


def _number(device: DeviceId) -> int:
    """Flower counts its nodes with 64 bits; 60 bits of a digest serve."""
    return int(digest_of(device.encode())[:15], 16)


def _kind(message_type: str) -> Kind:
    if message_type == MessageType.TRAIN:
        return Kind.TRAIN
    if message_type == MessageType.EVALUATE:
        return Kind.EVALUATE
    raise BadInput(f"devices run plans of two kinds, train and evaluate; they can't answer {message_type!r}")


def _planned(plan: Plan, config: Mapping[str, object]) -> Plan:
    changed: dict[str, float] = {}
    hyperparameters = dict(plan.hyperparameters)
    for key, value in config.items():
        if key == _ROUND:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise OutOfBounds(f"config {key!r} is {value!r:.80}; devices take numbers only")
        if key in _PLAN_NUMBERS:
            changed[key] = value
        else:
            hyperparameters["mu" if key == _PROXIMAL else key] = float(value)
    return replace(plan, hyperparameters=hyperparameters, **changed)  # type: ignore[arg-type]


def _by_content(messages: list[Message]) -> list[dict[int, Message]]:
    """Flower's strategies let all messages of a round share one content object."""
    groups: dict[tuple[int, str], dict[int, Message]] = {}
    for message in messages:
        key = (id(message.content), message.metadata.message_type)
        groups.setdefault(key, {})[message.metadata.dst_node_id] = message
    return list(groups.values())


def _longest(messages: list[Message]) -> float | None:
    return max((message.metadata.ttl for message in messages), default=None)


def _replies(
    order: CohortOrder,
    asked: Mapping[DeviceId, Message],
    updates: Mapping[DeviceId, Update],
    names: Mapping[str, str],
) -> list[Message]:
    means = {device: _means(update.metrics) for device, update in updates.items()}
    # Flower refuses a round whose replies don't name the same metrics.
    common = set.intersection(*(set(found) for found in means.values())) if means else set()
    replies = []
    for device, update in updates.items():
        metrics = MetricRecord({"num-examples": update.weight})
        for name in sorted(common):
            metrics[name] = means[device][name]
        content = RecordDict({"metrics": metrics, "config": ConfigRecord()})
        if order.plan.kind is Kind.TRAIN:
            trained = order.weights + update.delta
            # What devices don't train goes back as it came.
            arrays = ArrayRecord(dict(next(iter(asked[device].content.array_records.values()))))
            arrays.update(to_record(Weights({names[name]: array for name, array in trained.arrays.items()})))
            content["arrays"] = arrays
        replies.append(Message(content, reply_to=asked[device]))
    return replies


def _means(metrics: Metrics) -> dict[str, float]:
    """Devices send sums; Flower weighs means by the number of examples, and writes all of them into its log."""
    means: dict[str, float] = {}
    for name, value in without_bins(metrics).items():
        examples = metrics.get("train_examples" if name in TRAINING_METRICS else "examples", 0.0)
        if examples and name not in ("examples", "train_examples"):
            means[name] = value / examples
    return means
