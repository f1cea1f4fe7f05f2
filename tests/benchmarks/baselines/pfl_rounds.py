"""pfl-research's federated averaging on its simulated backend, torch on one thread."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import nn
from turns import BATCH, COHORT, RATE, Turns, cohort, load

torch.set_num_threads(1)
torch.manual_seed(0)
x, y, held_x, held_y = map(torch.from_numpy, load())


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(784, 64), nn.Linear(64, 10)

    def forward(self, inputs):  # type: ignore[no-untyped-def]
        return self.head(F.relu(self.hidden(inputs)))

    def loss(self, inputs, targets, eval=False):  # type: ignore[no-untyped-def]
        self.eval() if eval else self.train()
        return F.cross_entropy(self(inputs), targets)

    def metrics(self, inputs, targets, eval=False):  # type: ignore[no-untyped-def]
        return {"loss": Weighted(float(self.loss(inputs, targets, eval)) * len(targets), len(targets))}


class Told(TrainingProcessCallback):
    def __init__(self, turns: Turns) -> None:
        self._turns = turns

    def on_train_begin(self, *, model):  # type: ignore[no-untyped-def]
        self._turns.ready()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):  # type: ignore[no-untyped-def]
        def accuracy() -> float:
            with torch.no_grad():
                return float((model.pytorch_model(held_x).argmax(1) == held_y).float().mean())

        self._turns.round_done(accuracy)
        return False, Metrics()


def members():  # type: ignore[no-untyped-def]
    number = 0
    while True:
        number += 1
        yield from (int(user) for user in cohort(number, len(x)))


drawn = members()
users = FederatedDataset(lambda user: PyTorchTensorDataset([x[user], y[user]], user_id=str(user)), lambda: next(drawn))
module = Dense()
model = PyTorchModel(
    module,
    local_optimizer_create=torch.optim.SGD,
    central_optimizer=torch.optim.SGD(module.parameters(), 1.0),
)
FederatedAveraging().run(
    algorithm_params=NNAlgorithmParams(
        central_num_iterations=1_000_000, evaluation_frequency=2_000_000, train_cohort_size=COHORT, val_cohort_size=0
    ),
    backend=SimulatedBackend(training_data=users, val_data=users),
    model=model,
    model_train_params=NNTrainHyperParams(local_num_epochs=1, local_learning_rate=RATE, local_batch_size=BATCH),
    model_eval_params=NNEvalHyperParams(local_batch_size=None),
    callbacks=[Told(Turns())],
)
