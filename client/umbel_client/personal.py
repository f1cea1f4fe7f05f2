"""The device's own model, and the accept test of a new release.

A release is fine-tuned here, on examples that never leave. Then, on held-back examples, three are compared: the
release as it came, the release fine-tuned, and whatever answers now. The new one is taken over unless it is worse by
a margin, and the better of its two forms answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from umbel.bundle import Bundle
from umbel.clock import DAY, Clock
from umbel.plan import Plan
from umbel.runtime import Runtime
from umbel.update import Metrics
from umbel.weights import Weights, require_finite
from umbel_client.examples import Examples, Split
from umbel_client.latency import latency_ratio
from umbel_client.trainer import GoOn, Job, always, evaluate, train

TASK = "personal"


@dataclass(frozen=True, slots=True)
class PersonalSettings:
    """How a device makes a release its own."""

    epochs: int = 5
    """0 keeps releases as they come."""
    batch_size: int = 16
    hyperparameters: Mapping[str, float] = field(default_factory=dict)
    """By name (`lr`, ...); others keep the manifest's values."""
    margin: float = 0.05
    """How much worse (in accuracy, 0 to 1) a new release may be on held-back examples and still be taken over."""
    seed: int = 0
    trial_seconds: float = DAY
    """How long an offered release answers on trial before it is committed."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the accept test measured: higher is better; None where there was nothing to measure."""

    release: float | None
    tuned: float | None
    present: float | None
    examples: int
    tuned_weights: Weights | None
    latency_ratio: float | None = None
    """95th percentile of the time of one answer, release over present; None where time can't be measured."""

    @property
    def accuracy_change(self) -> float | None:
        """Release (its better form) minus present, where both are shares of right answers."""
        if self.best is None or self.present is None or not (0 <= self.best <= 1 and 0 <= self.present <= 1):
            return None
        return self.best - self.present

    @property
    def best(self) -> float | None:
        """The better of the release's two forms."""
        scores = [score for score in (self.release, self.tuned) if score is not None]
        return max(scores, default=None)

    @property
    def personal_wins(self) -> bool:
        """Whether the fine-tuned form answers better than the release as it came."""
        return self.tuned is not None and self.release is not None and self.tuned > self.release

    def worse_than_present(self, margin: float) -> bool:
        """Whether taking the release over would cost more than `margin`; without a measurement it costs nothing."""
        return self.best is not None and self.present is not None and self.best < self.present - margin


def judge_release(
    bundle: Bundle,
    present: tuple[Bundle, Weights] | None,
    split: Split,
    settings: PersonalSettings,
    runtime: Runtime,
    clock: Clock,
    device: str,
    go_on: GoOn = always,
) -> Comparison:
    """Fine-tune a release here and measure it against what answers now.

    Args:
        bundle: the release.
        present: what answers now; None on a new device.
        split: this device's examples.
        settings: how to fine-tune.
        runtime: runs the graphs.
        clock: for limits of time.
        device: whose chance this is.
        go_on: asked before each step.

    Raises:
        Stopped: a condition fell away; the release is tested again at a later visit.
        InputMismatch: the examples here don't fit the release's signature.
        NotFinite: the release doesn't answer with numbers, or can't be fine-tuned with these settings.
    """
    # First, as it holds two models beside the one that answers, and training needs the memory of several.
    ratio = None if present is None else latency_ratio(bundle, present[0], split.held_back, runtime, clock)
    tuned = _tuned(bundle, split.training, settings, runtime, clock, device, go_on) if split.held_back.count else None
    shared = bundle.shared_weights()
    return Comparison(
        release=score(evaluate(bundle, shared, split.held_back, runtime)),
        tuned=None if tuned is None else score(evaluate(bundle, tuned, split.held_back, runtime)),
        present=None if present is None else score(evaluate(*present, split.held_back, runtime)),
        examples=split.held_back.count,
        tuned_weights=tuned,
        latency_ratio=ratio,
    )


def score(metrics: Metrics) -> float | None:
    """Accuracy where the model counts `correct` answers, or else the negative mean loss; higher is better."""
    count = metrics.get("examples", 0.0)
    if not count:
        return None
    if "correct" in metrics:
        return metrics["correct"] / count
    return -metrics["loss"] / count if "loss" in metrics else None


def _tuned(
    bundle: Bundle,
    examples: Examples,
    settings: PersonalSettings,
    runtime: Runtime,
    clock: Clock,
    device: str,
    go_on: GoOn,
) -> Weights | None:
    if not settings.epochs or not examples.count:
        return None
    plan = Plan(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        hyperparameters=settings.hyperparameters,
        seed=settings.seed,
    )
    done = train(Job(plan, TASK, 0, device), bundle, bundle.shared_weights(), examples, runtime, clock, go_on)
    require_finite(done.weights)
    return done.weights
