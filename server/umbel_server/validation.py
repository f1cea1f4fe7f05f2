"""What may be counted, and what may become a version.

Twice in a round: each opened report before it is added (`require_report` raises), and each candidate before it is
published (`judge_candidate` gives a `Verdict`). Both are pure; who gathers the facts about a candidate stands in
`umbel_server.examination`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from umbel.errors import BadInput, NotFinite, OutOfBounds
from umbel.manifest import Manifest
from umbel.plan import Kind, Plan
from umbel.update import Metrics, Update, is_count
from umbel.weights import Shapes, require_finite, require_shapes
from umbel_server.json_text import like

TRAINING_METRICS: Final = ("train_loss", "train_examples")
"""What a TRAIN report says of the training itself, beside the metrics of its base version."""

_MOST_EXAMPLES: Final = 1_000_000
"""No device counts more in one report; its weight has a bound of its own, which a plan may set as low as 1."""

_MOST: Final = 1e15
"""The largest sum or weight that any report may tell: added up over every device there is, it stays a number."""

_CLIP_SLACK: Final = 1.001
"""A device clips in float32, and its norm is taken again here."""


@dataclass(frozen=True, slots=True)
class ValidationPolicy:
    """How a task's reports and candidates are judged. Zero switches a bound off where it says so."""

    max_report_ratio: float = 10.0
    """Where a plan doesn't clip: largest norm of one delta, as a multiple of the base version's norm (at least 1)."""
    max_step_ratio: float = 5.0
    """Largest norm of a candidate's step, as a multiple of the median of the last accepted steps; 0: no such bound."""
    max_step_norm: float = 0.0
    """Largest norm of any candidate's step, the first included; 0: no such bound."""
    history: int = 5
    """How many accepted steps that median is taken of."""
    max_accuracy_drop: float = 0.05
    """How far the share of right answers may fall below the parent's, on devices and on held-out data; 1: any."""
    max_loss_ratio: float = 0.0
    """Largest loss of a candidate as a multiple of its parent's, for models without right answers; 0: no bound."""
    least_examples: int = 30
    """Metrics over fewer examples than this say nothing, neither for nor against."""
    holdout: str = ""
    """Digest of a blob of held-out examples on the server (safetensors, by the manifest's names); empty: none."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, str) and (not math.isfinite(value) or value < 0):
                raise OutOfBounds(f"{name} is {value}; it must be a number that isn't negative")
        if self.history < 1 or self.max_report_ratio <= 0:
            raise OutOfBounds("history and max_report_ratio must be above 0")

    def to_tree(self) -> dict[str, float | int | str]:
        """As a JSON object."""
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: Mapping[str, object]) -> ValidationPolicy:
        """Read `to_tree`; fields that are absent keep their defaults.

        Raises:
            MalformedMessage: an unknown field, or a value of another type.
            OutOfBounds: a value beyond its bounds.
        """
        return cls(**like(cls, tree, "a validation policy"))


@dataclass(frozen=True, slots=True)
class Accepted:
    """The candidate may become a version."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The candidate may not; the last version stands."""

    reason: str


Verdict = Accepted | Refused


# Reports.


@dataclass(frozen=True, slots=True)
class ReportRules:
    """What every report of a round has to keep to."""

    shapes: Shapes
    """Of the delta; none for an evaluation."""
    metrics: frozenset[str]
    max_weight: float
    max_norm: float
    required: frozenset[str] = frozenset()
    """Metrics that may not be missing, because the strategy reckons with them; none of them may be negative."""


def report_rules(
    plan: Plan,
    manifest: Manifest,
    base_norm: float,
    policy: ValidationPolicy,
    required: frozenset[str] = frozenset(),
) -> ReportRules:
    """The rules of a round.

    Args:
        plan: what its devices run.
        manifest: of the version that they start from.
        base_norm: the norm of that version's shared weights.
        policy: the task's.
        required: metrics that the strategy can't do without (`umbel_server.flower.needed_metrics`).
    """
    metrics = frozenset(manifest.metrics)
    if plan.kind is Kind.EVALUATE:
        return ReportRules({}, metrics, plan.max_weight, 0.0)
    bound = plan.clip_norm * _CLIP_SLACK if plan.clip_norm else policy.max_report_ratio * max(1.0, base_norm)
    return ReportRules(manifest.shared_shapes, metrics | set(TRAINING_METRICS), plan.max_weight, bound, required)


def require_report(update: Update, rules: ReportRules) -> None:
    """Raise unless this update may be counted.

    Raises:
        WeightsMismatch: its arrays are of another model.
        NotFinite: NaN or infinity in the delta, the weight or a metric.
        OutOfBounds: a norm, weight or count beyond the round's bounds.
        BadInput: a metric that the model doesn't have.
    """
    require_shapes(update.delta.shapes, rules.shapes)
    norm = update.delta.norm()
    if not math.isfinite(norm):
        require_finite(update.delta)
    if norm > rules.max_norm:
        raise OutOfBounds(f"a delta of norm {norm:.6g}; this round takes {rules.max_norm:.6g} at most")
    if not math.isfinite(update.weight):
        raise NotFinite(f"a report with weight {update.weight}")
    most = min(rules.max_weight, _MOST)
    if not 0 < update.weight <= most:
        raise OutOfBounds(f"a report with weight {update.weight}; it must be above 0 and at most {most}")
    _require_metrics(update.metrics, rules)


def _require_metrics(metrics: Metrics, rules: ReportRules) -> None:
    for name, value in metrics.items():
        if name not in rules.metrics:
            known = ", ".join(sorted(rules.metrics))
            raise BadInput(f"metric {name!r} isn't one of this model's; it reports {known}")
        if not math.isfinite(value):
            raise NotFinite(f"metric {name!r} is {value}")
        if abs(value) > _MOST:
            raise OutOfBounds(f"metric {name!r} is {value}; at most {_MOST:g} is summed")
        if is_count(name) and not 0 <= value <= _MOST_EXAMPLES:
            raise OutOfBounds(f"metric {name!r} is {value}; a count lies between 0 and {_MOST_EXAMPLES}")
    for name in rules.required:
        if not metrics.get(name, -1.0) >= 0 or (name == "train_examples" and not metrics[name]):
            raise OutOfBounds(f"metric {name!r} is {metrics.get(name)}; this round can't do without it")
    if metrics.get("correct", 0.0) > metrics.get("examples", 0.0):
        raise OutOfBounds(f"{metrics['correct']} right answers to {metrics.get('examples', 0.0)} examples")


# Candidates.


@dataclass(frozen=True, slots=True)
class Comparison:
    """Metric sums of a candidate and of its parent, over examples that neither was trained on."""

    candidate: Metrics
    parent: Metrics


@dataclass(frozen=True, slots=True)
class CandidateFacts:
    """All that is known of a candidate when it is judged."""

    finite: bool
    step_norm: float
    """Norm of candidate minus parent."""
    recent_norms: tuple[float, ...] = ()
    """Of the task's accepted steps, newest last."""
    golden_failure: str = ""
    """What went wrong when the golden examples were run; empty: each gave finite answers."""
    held_out: Comparison | None = None
    """On the server's own held-out data, if it has any."""
    federated: Comparison | None = None
    """Summed over devices, if the task asks for that."""


def judge_candidate(facts: CandidateFacts, policy: ValidationPolicy) -> Verdict:
    """Accept a candidate, or say which fact stands against it."""
    if not facts.finite or not math.isfinite(facts.step_norm):
        return Refused("the candidate holds NaN or infinity")
    reason = (
        _too_far(facts, policy)
        or (f"golden examples: {facts.golden_failure}" if facts.golden_failure else "")
        or _worse("held-out data", facts.held_out, policy)
        or _worse("the devices' data", facts.federated, policy)
    )
    return Refused(reason) if reason else Accepted()


def _too_far(facts: CandidateFacts, policy: ValidationPolicy) -> str:
    if policy.max_step_norm and facts.step_norm > policy.max_step_norm:
        return f"a step of norm {facts.step_norm:.4g}; at most {policy.max_step_norm:.4g} is allowed"
    recent = facts.recent_norms[-policy.history :]
    if not policy.max_step_ratio or not recent:
        return ""
    bound = policy.max_step_ratio * statistics.median(recent)
    if facts.step_norm > bound:
        return (
            f"a step of norm {facts.step_norm:.4g}; at most {bound:.4g}, "
            f"{policy.max_step_ratio:g} times the median of the last {len(recent)} accepted steps, is allowed"
        )
    return ""


def _worse(where: str, found: Comparison | None, policy: ValidationPolicy) -> str:
    if found is None:
        return ""
    examples = min(found.candidate.get("examples", 0.0), found.parent.get("examples", 0.0))
    if examples < policy.least_examples or examples <= 0:
        return ""
    if "correct" in found.candidate and "correct" in found.parent:
        new, old = _mean(found.candidate, "correct"), _mean(found.parent, "correct")
        if new < old - policy.max_accuracy_drop:
            return f"on {where} {new:.1%} of the answers are right, the parent has {old:.1%}"
    if policy.max_loss_ratio and "loss" in found.candidate and "loss" in found.parent:
        new, old = _mean(found.candidate, "loss"), _mean(found.parent, "loss")
        if not new <= policy.max_loss_ratio * old:
            return f"on {where} the loss is {new:.4g}, the parent's is {old:.4g}"
    return ""


def _mean(metrics: Metrics, name: str) -> float:
    return metrics[name] / metrics["examples"]
