"""Unmodified Flower programs run over our devices: strategies' own `start`, and whole ServerApps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

# First, because it loads flwr quietly.
from umbel_server.flower.grid import DeviceGrid

# isort: split
import flwr.serverapp.strategy as flower
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from tests.server.cohorts import TRUE, ZERO, InProcessPort, Learner, learners
from umbel.errors import BadInput, OutOfBounds, WeightsMismatch
from umbel.plan import Kind, Plan
from umbel.weights import Weights
from umbel_server.flower.spec import CATALOGUE

ARGUMENTS: dict[str, dict[str, float]] = {
    "FedAvgM": {"server_momentum": 0.5},
    "FedAdam": {"eta": 0.5},
    "FedAdagrad": {"eta": 1.0},
    "FedYogi": {"eta": 0.5},
    "FedProx": {"proximal_mu": 0.1},
    "Krum": {"num_malicious_nodes": 1},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 3},
    "Bulyan": {"num_malicious_nodes": 1},
    "QFedAvg": {"client_learning_rate": 1.0},
}


@pytest.fixture
def port() -> InProcessPort:
    return InProcessPort(learners(8))


@pytest.fixture
def grid(port: InProcessPort) -> Iterator[DeviceGrid]:
    made = DeviceGrid(port)
    yield made
    made.close()


def model() -> ArrayRecord:
    return ArrayRecord({name: Array(np.array(array)) for name, array in ZERO.arrays.items()})


def losses(result: flower.Result) -> list[float]:
    return [float(metrics["loss"]) for metrics in result.evaluate_metrics_clientapp.values()]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_strategy_learns_through_its_own_start(name: str, grid: DeviceGrid) -> None:
    strategy = getattr(flower, name)(min_available_nodes=8, **ARGUMENTS.get(name, {}))
    found = losses(strategy.start(grid, model(), num_rounds=4))
    assert found[-1] < found[0]


def test_an_unmodified_server_app_runs_and_learns_the_line(grid: DeviceGrid) -> None:
    app = ServerApp()
    results: list[flower.Result] = []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        rounds = int(context.run_config["num-server-rounds"])
        results.append(flower.FedAvg(min_available_nodes=8).start(grid, model(), num_rounds=rounds))

    app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"num-server-rounds": 6}))
    np.testing.assert_allclose(results[0].arrays["p_slope"].numpy(), TRUE, atol=0.05)


def test_a_whole_state_of_a_torch_module_is_taken_and_what_no_device_trains_comes_back(grid: DeviceGrid) -> None:
    """A `state_dict` under torch's names counts the batches of its norms in integers, and holds frozen weights too."""
    named = {name.partition("_")[2]: array for name, array in model().items()}
    others = {"norm.num_batches_tracked": Array(np.array(3)), "frozen.weight": Array(np.ones(2, np.float32))}
    state = ArrayRecord(named | others)
    result = flower.FedAvg(min_available_nodes=8).start(grid, state, num_rounds=2)
    assert set(result.arrays) == set(state)
    assert result.arrays["norm.num_batches_tracked"].numpy() == pytest.approx(3), "as Flower averages it"
    assert abs(result.arrays["slope"].numpy() - TRUE).max() < abs(TRUE).max(), "the rest has learned"


def test_metrics_are_means_weighed_by_examples(port: InProcessPort, grid: DeviceGrid) -> None:
    result = flower.FedAvg(min_available_nodes=8, fraction_evaluate=1.0).start(grid, model(), num_rounds=1)
    order = port.orders[-1]
    assert order.plan.kind is Kind.EVALUATE
    updates = [device.train(order.weights, order.plan, order.round_number) for device in learners(8)]
    expected = sum(one.metrics["loss"] for one in updates) / sum(one.weight for one in updates)
    assert losses(result)[0] == pytest.approx(expected, rel=1e-5)
    assert "error[0]" in updates[0].metrics
    assert set(result.evaluate_metrics_clientapp[1]) == {"loss"}, "Flower logs these: bins would fill the screen"


def test_a_config_becomes_the_devices_plan(port: InProcessPort) -> None:
    grid = DeviceGrid(port, Plan(epochs=2, batch_size=8, hyperparameters={"lr": 0.1}))
    strategy = flower.FedProx(min_available_nodes=8, proximal_mu=0.3)
    strategy.start(grid, model(), num_rounds=2, train_config=ConfigRecord({"epochs": 3, "lr": 0.01}))
    order = port.orders[2]
    assert (order.round_number, order.plan.epochs, order.plan.batch_size) == (2, 3, 8)
    assert order.plan.hyperparameters == {"lr": 0.01, "mu": 0.3}
    assert len(order.devices) == 8


@pytest.mark.parametrize("value", ["fast", True, float("inf"), [1, 2]])
def test_a_config_that_is_no_number_is_refused(grid: DeviceGrid, value: object) -> None:
    config = ConfigRecord({"speed": value})  # type: ignore[dict-item]
    with pytest.raises(OutOfBounds):
        flower.FedAvg(min_available_nodes=8).start(grid, model(), num_rounds=1, train_config=config)


def test_a_model_of_other_shapes_is_refused_before_any_device_is_asked(port: InProcessPort, grid: DeviceGrid) -> None:
    with pytest.raises(WeightsMismatch):
        flower.FedAvg(min_available_nodes=8).start(grid, ArrayRecord({"w": Array(np.zeros(3))}), num_rounds=1)
    assert port.orders == []


def test_a_question_that_is_neither_training_nor_evaluation_is_refused(grid: DeviceGrid) -> None:
    node = next(iter(grid.get_node_ids()))
    content = RecordDict({"arrays": model()})
    with pytest.raises(BadInput):
        grid.send_and_receive([grid.create_message(content, "query", node, "1")])
    with pytest.raises(BadInput):
        grid.send_and_receive([grid.create_message(RecordDict(), "train", node, "1")])


@pytest.mark.parametrize("strategy", ["FedAvg", "Krum"])
def test_a_device_that_lies_is_left_out_and_the_run_ends_as_without_it(strategy: str) -> None:
    liar = Learner("liar")
    honest = learners(6)
    update = liar.train(ZERO, Plan())
    nan = Weights({name: np.full_like(array, np.nan) for name, array in update.delta.arrays.items()})
    attacks = [
        replace(update, delta=nan),
        replace(update, weight=-600.0),
        replace(update, weight=1e12),
        replace(update, delta=update.delta.scaled(1e30)),
        replace(update, delta=Weights({"p_slope": np.zeros(9)})),
        replace(update, metrics={**update.metrics, "x": 1.0}),
    ]
    kind = getattr(flower, strategy)

    def run(port: InProcessPort) -> bytes:
        # fraction_evaluate=0 warns; the flwr logger is quiet here.
        result = kind(min_available_nodes=6, fraction_evaluate=0.0).start(DeviceGrid(port), model(), num_rounds=1)
        return Weights({name: array.numpy() for name, array in result.arrays.items()}).to_bytes()

    clean = run(InProcessPort(honest))
    for attack in attacks:
        assert run(InProcessPort([*honest, liar], {"liar": attack})) == clean


def test_pushed_messages_are_answered_when_pulled(grid: DeviceGrid) -> None:
    content = RecordDict({"arrays": model(), "config": ConfigRecord({"server-round": 1})})
    messages = [Message(content, node, "train") for node in grid.get_node_ids()]
    left = set(grid.push_messages(messages))
    assert len(left) == 8
    replies: list[Message] = []
    grid.close()  # waits for what was pushed
    replies += grid.pull_messages(left)
    assert {reply.metadata.reply_to_message_id for reply in replies} == left
    assert {reply.metadata.src_node_id for reply in replies} == set(grid.get_node_ids())
    assert list(grid.pull_messages(left)) == []


def test_a_message_to_a_device_that_is_gone_is_not_answered(port: InProcessPort, grid: DeviceGrid) -> None:
    content = RecordDict({"arrays": model()})
    assert list(grid.send_and_receive([Message(content, 12345, "train")])) == []
    assert port.orders == []


def test_different_contents_make_different_cohorts(port: InProcessPort, grid: DeviceGrid) -> None:
    messages = []
    for epochs, node in enumerate(grid.get_node_ids(), 1):
        content = RecordDict({"arrays": model(), "config": ConfigRecord({"epochs": epochs})})
        messages.append(Message(content, node, "train"))
    replies = list(grid.send_and_receive(messages))
    assert len(replies) == 8
    assert sorted(order.plan.epochs for order in port.orders) == list(range(1, 9))
