"""The `Runtime` seam: whatever can run a bundle's graphs.

Device, coordinator and compiler run the same graphs through it, so it stands on the ground floor
(`docs/decisions/0002-runtime-on-the-ground-floor.md`). A session belongs to one thread at a time, but one that
answers, which any thread may ask; a runtime may be shared. Weights given to a session are the shared ones (trainable
and buffers), with or without the frozen ones, which always come from the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from umbel.update import Metrics
from umbel.weights import Weights

if TYPE_CHECKING:
    from umbel.bundle import Bundle

Arrays = Mapping[str, NDArray[Any]]
"""Named arrays whose first dimension is the batch: a model's inputs, targets or outputs."""


class InferSession(Protocol):
    """One model with its weights bound, ready to answer."""

    def __call__(self, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """The model's outputs for a batch.

        Raises:
            InputMismatch: `inputs` are not what the manifest says.
            RuntimeFailure: the runtime gave up.
        """


class EvaluateSession(Protocol):
    """One model with its weights bound, ready to be judged."""

    def __call__(self, inputs: Arrays, targets: Arrays) -> Metrics:
        """Metrics as sums over the batch, so that they add over batches and devices.

        Raises:
            InputMismatch: `inputs` or `targets` are not what the manifest says.
            RuntimeFailure: the runtime gave up.
        """


class TrainSession(Protocol):
    """Weights that move: they stay on the runtime's side between steps."""

    def step(self, inputs: Arrays, targets: Arrays) -> float:
        """Take one optimiser step on a batch and return its loss before the step.

        Raises:
            InputMismatch: `inputs` or `targets` are not what the manifest says.
            NotFinite: the loss is NaN or infinite; the weights stay as they were.
            RuntimeFailure: the runtime gave up; the weights stay as they were.
        """

    def weights(self) -> Weights:
        """The shared weights (trainable and buffers) as they are now; later steps don't change what was given."""

    def slots(self) -> Weights:
        """The optimiser's slots as they are now, likewise; with `weights` enough to go on bit-equal elsewhere."""


class Runtime(Protocol):
    """Runs the graphs of bundles."""

    @property
    def name(self) -> str:
        """The key of this runtime's graphs in a manifest."""

    def infer(self, bundle: Bundle, weights: Weights) -> InferSession:
        """Bind weights for answering; worth its cost once per version."""

    def evaluate(self, bundle: Bundle, weights: Weights) -> EvaluateSession:
        """Bind weights for judging."""

    def train(
        self,
        bundle: Bundle,
        weights: Weights,
        hyperparameters: Mapping[str, float] | None = None,
        slots: Weights | None = None,
    ) -> TrainSession:
        """Start to train from these weights.

        Args:
            bundle: has a `train` graph.
            weights: where to start.
            hyperparameters: override the manifest's values by name.
            slots: what `TrainSession.slots` gave, to go on; None starts afresh.

        Raises:
            OutOfBounds: a hyper-parameter that this model doesn't have.
            WeightsMismatch: weights or slots of another model.
        """
