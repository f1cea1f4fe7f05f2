"""Flower's simulation runtime, on Ray, as a way to get work done on many cores, machines or GPUs.

    ask([request, …]) --messages--> ServerApp's Grid --> ClientApp in Ray's actors --> work(request) --> [answer, …]

Any node can do any request: a request says itself whose examples it is about, so which actor gets it changes nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from threading import Event
from typing import Final, cast

import numpy as np

from umbel.errors import NotFound, RuntimeFailure
from umbel.update import Metrics, Update
from umbel.weights import Weights
from umbel_server.flower.compat import identify_task

# isort: split
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.app.typing import ConfigRecordValues
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

Value = str | int | float
_ARRAYS, _CONFIG, _METRICS, _WEIGHT = "arrays", "config", "metrics", "weight"
_CLUSTER_SECONDS: Final = 10.0
_NODES_SECONDS: Final = 180.0
"""How long the nodes may take to appear."""
_POLL_SECONDS: Final = 0.1


@dataclass(frozen=True, slots=True)
class Request:
    """One client's share of a round."""

    config: Mapping[str, Value]
    weights: Weights


Work = Callable[[Request], Update | None]
"""What answers a request, in an actor; None for a client that reports nothing."""
Ask = Callable[[Sequence[Request]], list[Update | None]]
"""Gets requests answered, in their order; raises `RuntimeFailure` when an actor fails."""


def on_ray(main: Callable[[Ask], None], work: str, nodes: int, workers: int) -> None:
    """Run `main` as a `ServerApp` whose requests are answered by `work`, as a `ClientApp`, in Ray's actors.

    Args:
        main: is given the means to ask.
        work: a `Work`, as `module:function`; imported in each actor.
        nodes: how many requests may be on their way at a time.
        workers: actors on this machine, a core each; where `RAY_ADDRESS` names a cluster, it says how many.

    Raises:
        NotFound: Ray isn't installed.
        RuntimeFailure: Ray's processes didn't start, or died.
        UmbelError: whatever `main` raises.
    """
    if find_spec("ray") is None:
        raise NotFound("the engine 'ray' needs Ray: pip install 'umbel[simulate-ray]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray tells its maker about machines and runs
    # Else a thread of Flower's that asks Ray for something after the run's end begins a second one, and waits for that.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    from flwr.simulation import run_simulation

    server, failures, over = ServerApp(), list[BaseException](), Event()

    @server.main()
    def run(grid: Grid, _context: Context) -> None:
        try:
            main(_asking(grid, nodes, over))
        except BaseException as error:  # noqa: BLE001 - carried over to the caller's thread
            failures.append(error)

    try:
        run_simulation(
            server,
            client_app(work),
            num_supernodes=nodes,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
                "init_args": ray_of(workers, os.environ.get("RAY_ADDRESS", "")),
            },
        )
    except RuntimeError as error:
        if not failures:
            raise RuntimeFailure(f"Flower's simulation runtime gave up, its log tells more: {error}") from error
    finally:
        over.set()
    if failures:
        raise failures[0]


def ray_of(workers: int, address: str) -> dict[str, ConfigRecordValues]:
    """What Ray is begun with: so many processors of this machine, or those of the cluster that runs at an address.

    Raises:
        RuntimeFailure: nobody listens at the address; Ray would wait for ever there, and not even end when told to.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), _CLUSTER_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise RuntimeFailure(f"no cluster of Ray answers at {address}, as RAY_ADDRESS says: {error}") from error
    begun: dict[str, ConfigRecordValues] = {"log_to_driver": False}
    return begun if address else begun | {"num_cpus": workers, "include_dashboard": False}


def client_app(work: str) -> ClientApp:
    """A Flower client that answers requests; it travels to the actors by the name of what it does."""
    app = ClientApp()

    @app.train()
    def train(message: Message, _context: Context) -> Message:
        module, _, name = work.partition(":")
        return _answer(message, cast(Work, getattr(import_module(module), name)))

    return app


def _answer(message: Message, work: Work) -> Message:
    arrays = cast(ArrayRecord, message.content[_ARRAYS])
    config = cast(ConfigRecord, message.content[_CONFIG])
    weights = Weights({name: np.asarray(array.numpy(), np.float32) for name, array in arrays.items()})
    update = work(Request(cast("Mapping[str, Value]", dict(config)), weights))
    content = RecordDict()
    if update is not None:
        content = RecordDict(
            {
                _ARRAYS: _record(update.delta),
                _METRICS: MetricRecord({**update.metrics, _WEIGHT: update.weight}),
            }
        )
    return Message(content, reply_to=message)


def _asking(grid: Grid, nodes: int, over: Event) -> Ask:
    ids: list[int] = []
    for _ in range(round(_NODES_SECONDS / _POLL_SECONDS)):
        ids = sorted(grid.get_node_ids())
        if len(ids) >= nodes:
            break
        _go_on_soon(over)
    else:
        raise RuntimeFailure(f"{len(ids)} of {nodes} nodes appeared within {_NODES_SECONDS:.0f} seconds")

    def ask(requests: Sequence[Request]) -> list[Update | None]:
        found: list[Update | None] = []
        for at in range(0, len(requests), len(ids)):
            found += _ask_some(grid, ids, requests[at : at + len(ids)], over)
        return found

    return ask


def _ask_some(grid: Grid, ids: Sequence[int], requests: Sequence[Request], over: Event) -> list[Update | None]:
    identify_task()
    places = {node: place for place, node in enumerate(ids[: len(requests)])}
    messages = [
        Message(
            RecordDict({_ARRAYS: _record(request.weights), _CONFIG: ConfigRecord(dict(request.config))}),
            dst_node_id=node,
            message_type="train",
        )
        for node, request in zip(ids, requests, strict=False)
    ]
    found: dict[int, Update | None] = {}
    for reply in _replies(grid, messages, over):
        if reply.has_error():
            reason = " ".join(str(reply.error.reason).split())[:300]
            raise RuntimeFailure(f"an actor failed: {reason}; the same again goes on from the last checkpoint")
        found[places[reply.metadata.src_node_id]] = _update(reply.content)
    return [found[place] for place in range(len(requests))]


def _replies(grid: Grid, messages: Sequence[Message], over: Event) -> Iterator[Message]:
    """As `grid.send_and_receive`, which goes on waiting where the runtime was interrupted, and keeps its process."""
    waiting = set(grid.push_messages(messages))
    while True:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
            yield reply
        if not waiting:
            return
        _go_on_soon(over)


def _go_on_soon(over: Event) -> None:
    if over.wait(_POLL_SECONDS):
        raise RuntimeFailure("Flower's simulation runtime has ended")


def _update(content: RecordDict) -> Update | None:
    if _ARRAYS not in content:
        return None
    arrays, metrics = cast(ArrayRecord, content[_ARRAYS]), cast(MetricRecord, content[_METRICS])
    sums: Metrics = {name: float(cast(float, value)) for name, value in metrics.items() if name != _WEIGHT}
    delta = Weights({name: np.asarray(array.numpy(), np.float32) for name, array in arrays.items()})
    return Update(delta, float(cast(float, metrics[_WEIGHT])), sums)


def _record(weights: Weights) -> ArrayRecord:
    record = ArrayRecord()
    for name, array in weights.arrays.items():
        record[name] = Array(np.asarray(array))
    return record
