"""The condition between two waves: what the devices' answers allow to conclude, at any moment, however often one looks.

Order: enough data; hard ceilings (exact, immediate, several distinct devices); always-valid tests against the devices
that weren't offered the release; and, for a pass, evidence that the failures are not above the margin.

The tests are e-processes: wealth that a fair game can't be expected to grow. By Ville's inequality the chance that it
ever reaches 1/alpha, if nothing is wrong, is at most alpha, so a controller may look after every answer without paying
for it (Ramdas et al., "Game-theoretic statistics and safe anytime-valid inference", 2023; for deployments Lindon et
al., "Rapid regression detection in software deployments through sequential testing", 2022). One device, one vote.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from umbel.errors import OutOfBounds
from umbel_server.evidence import above_evidence, below_evidence, mean_evidence, share_evidence

TESTS: Final = 4
"""Failures, accuracy, latency and memory can each stop a rollout; together they may err as often as one."""
RATIO_BOUNDS: Final = (-1.0, 3.0)
"""Ratios count as powers of two between half and eight times, so that one odd device can't speak for all."""
_DROP_BOUNDS: Final = (-0.25, 1.0)
"""A device's gain of accuracy counts up to this much: what is bounded closely can be tested with few devices."""


class Decision(Enum):
    """What a gate says."""

    PASS = "pass"  # noqa: S105
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    CONTINUE = "continue"


class Arm(Enum):
    """On which side of a comparison a device stands."""

    CANARY = "canary"
    CONTROL = "control"


@dataclass(frozen=True, slots=True)
class Drift:
    """How a device in use differs from what it was when the rollout started, whichever release it has now."""

    accuracy: float | None = None
    """On its held-back examples, now minus then."""
    latency_ratio: float | None = None
    memory_ratio: float | None = None
    """Now over then."""


@dataclass(frozen=True, slots=True)
class Exposure:
    """What one device has shown during a wave; a device appears once."""

    arm: Arm
    answered: bool = False
    failed: bool = False
    """It could not fetch, verify, load or run the release, or went back to an older one."""
    kept_own: bool = False
    """Its own model serves it better: a rejection, which isn't a failure."""
    accuracy_change: float | None = None
    """Share of right answers on its own held-back examples, new minus old, as tested in turns: -1 to 1."""
    latency_ratio: float | None = None
    """95th percentile of the time of an answer, new over old, as tested in turns."""
    troubled: bool = False
    """A session of its failed since the rollout started, by what the model or the device does."""
    drift: Drift | None = None
    """In use; counts beside control devices over the same time only."""


@dataclass(frozen=True, slots=True)
class GatePolicy:
    """What has to be shown before a rollout goes on."""

    least_answers: int = 20
    """Devices that must have answered before a gate passes (all of a wave, where it takes fewer)."""
    least_answer_share: float = 0.6
    """Share of the offers that must be answered after the soak time; else the gate is inconclusive."""
    alpha: float = 0.01
    """How often a rollout without fault may be stopped, at most, all tests together."""
    expected_failure_share: float = 0.01
    """What failures are compared with while no control devices are there."""
    ceiling_devices: int = 3
    """A hard ceiling needs at least so many distinct devices, so that one that lies can't stop a rollout."""
    ceiling_share: float = 0.2
    """Failures above this share of the wave's offers stop it at once."""
    most_kept_own_share: float = 0.8
    """More rejections than this, and the release isn't wanted."""
    margin: float = 0.05
    """For a pass, failures must be shown to lie less than this above the control's; 0 asks for no such evidence."""
    most_accuracy_drop: float = 0.02
    """Mean change of accuracy that is still taken."""
    most_latency_ratio: float = 1.5
    most_memory_ratio: float = 2.0

    def __post_init__(self) -> None:
        shares = (
            "least_answer_share",
            "expected_failure_share",
            "ceiling_share",
            "most_kept_own_share",
            "margin",
            "most_accuracy_drop",
        )
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise OutOfBounds(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if not 0 < self.alpha < 0.5 or not 0 < self.expected_failure_share < 0.5:
            raise OutOfBounds("alpha and expected_failure_share must lie between 0 and 0.5, without the ends")
        if self.least_answers < 1 or self.ceiling_devices < 1:
            raise OutOfBounds("least_answers and ceiling_devices must be at least 1")
        if not all(
            0 <= math.log2(ratio) < RATIO_BOUNDS[1] for ratio in (self.most_latency_ratio, self.most_memory_ratio)
        ):
            raise OutOfBounds(
                f"most_latency_ratio and most_memory_ratio must lie between 1 and {2 ** RATIO_BOUNDS[1]:g}"
            )


@dataclass(frozen=True, slots=True)
class Look:
    """When a gate is asked."""

    soaked: bool
    """Has the soak time passed?"""
    last: bool
    """Is this its deadline?"""
    members: int
    """How many enrolled devices the wave takes, whether they have been offered the release yet or not."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one guard found, in words."""

    guard: str
    decision: Decision
    words: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """A gate's answer, with all that it rests on."""

    decision: Decision
    findings: tuple[Finding, ...]

    def explain(self) -> str:
        """Why, for a person."""
        lines = [f"{self.decision.value}:"]
        lines += [f"  {finding.guard}: {finding.words} -> {finding.decision.value}" for finding in self.findings]
        return "\n".join(lines)


def judge(exposures: Sequence[Exposure], policy: GatePolicy, look: Look) -> Judgement:
    """What the answers so far allow to conclude.

    Args:
        exposures: in the order of their answers (an unanswered one at its end); each device once.
        policy: what has to be shown.
        look: whether the soak time is over, and whether the gate's deadline has come.
    """
    canaries = _canaries(exposures)
    alpha = policy.alpha / TESTS
    findings = (
        _ceiling(canaries, policy),
        _rejections(canaries, policy, look),
        _failures(exposures, policy, alpha),
        _accuracy(exposures, policy, alpha, look),
        _latency(exposures, policy, alpha, look),
        _memory(exposures, policy, alpha, look),
        _enough(canaries, policy, look),
        _no_worse(exposures, policy, look),
    )
    decisions = {finding.decision for finding in findings}
    if Decision.FAIL in decisions:
        return Judgement(Decision.FAIL, findings)
    if look.soaked and decisions == {Decision.PASS}:
        return Judgement(Decision.PASS, findings)
    return Judgement(Decision.INCONCLUSIVE if look.last else Decision.CONTINUE, findings)


def _ceiling(canaries: Sequence[Exposure], policy: GatePolicy) -> Finding:
    failed, offered = sum(exposure.failed for exposure in canaries), len(canaries)
    above = failed >= policy.ceiling_devices and failed > policy.ceiling_share * offered
    words = (
        f"{failed} of {offered} devices failed; the ceiling is above {policy.ceiling_share:.0%} "
        f"and at least {policy.ceiling_devices} devices"
    )
    return Finding("ceiling", Decision.FAIL if above else Decision.PASS, words)


def _rejections(canaries: Sequence[Exposure], policy: GatePolicy, look: Look) -> Finding:
    answered = [exposure for exposure in canaries if exposure.answered and not exposure.failed]
    kept = sum(exposure.kept_own for exposure in answered)
    words = f"{kept} of {len(answered)} devices kept their own model; at most {policy.most_kept_own_share:.0%} may"
    if kept <= policy.most_kept_own_share * len(answered) or kept < policy.ceiling_devices:
        return Finding("rejections", Decision.PASS, words)
    enough = look.soaked and len(answered) >= min(policy.least_answers, look.members)
    return Finding("rejections", Decision.FAIL if enough else Decision.CONTINUE, words)


def _failures(exposures: Sequence[Exposure], policy: GatePolicy, alpha: float) -> Finding:
    control = _control(exposures)
    failed = sum(e.failed or (e.troubled and bool(control)) for e in _canaries(exposures))
    wealth = failure_evidence(exposures, policy.expected_failure_share)
    against = f"{len(control)} control devices" if control else f"{policy.expected_failure_share:.1%} of devices"
    words = f"evidence that it fails more often than {against} {wealth:.3g} (stops at {1 / alpha:.4g})"
    return Finding("failures", _stop(wealth, alpha, failed >= min(policy.ceiling_devices, 2)), words)


def _accuracy(exposures: Sequence[Exposure], policy: GatePolicy, alpha: float, look: Look) -> Finding:
    changes = [e.accuracy_change for e in _canaries(exposures) if e.accuracy_change is not None]
    tested = mean_evidence([-change for change in changes], policy.most_accuracy_drop, *_DROP_BOUNDS)
    pairs = _pairs(exposures, lambda drift: None if drift.accuracy is None else -drift.accuracy, look)
    wealth = _both(tested, pairs, policy.most_accuracy_drop, _DROP_BOUNDS)
    mean = math.fsum(changes) / len(changes) if changes else 0.0
    words = (
        f"accuracy changed by {mean:+.1%} on average over {len(changes)} devices{_in_words(pairs)}, "
        f"evidence of a drop beyond {policy.most_accuracy_drop:.1%} is {wealth:.3g} (stops at {1 / alpha:.4g})"
    )
    return Finding("accuracy", _stop(wealth, alpha, len(changes) + len(pairs) >= policy.ceiling_devices), words)


def _latency(exposures: Sequence[Exposure], policy: GatePolicy, alpha: float, look: Look) -> Finding:
    logs = [log for e in _canaries(exposures) if (log := _log(e.latency_ratio)) is not None]
    limit = math.log2(policy.most_latency_ratio)
    pairs = _pairs(exposures, lambda drift: _log(drift.latency_ratio), look)
    wealth = _both(mean_evidence(logs, limit, *RATIO_BOUNDS), pairs, limit, RATIO_BOUNDS)
    return _ratio("latency", logs, pairs, policy.most_latency_ratio, wealth, alpha)


def _memory(exposures: Sequence[Exposure], policy: GatePolicy, alpha: float, look: Look) -> Finding:
    """Only known in use: beside control devices where there are enough, else beside the same devices before."""
    drifts = [e.drift for e in _canaries(exposures) if e.drift is not None and look.soaked]
    logs = [log for drift in drifts if (log := _log(drift.memory_ratio)) is not None]
    limit = math.log2(policy.most_memory_ratio)
    pairs = _pairs(exposures, lambda drift: _log(drift.memory_ratio), look)
    wealth = mean_evidence(logs, limit, *RATIO_BOUNDS)
    if pairs:
        wealth = mean_evidence([ours - theirs for ours, theirs in pairs], limit, *RATIO_BOUNDS)
    return _ratio("memory", logs, pairs, policy.most_memory_ratio, wealth, alpha)


def _ratio(guard: str, logs: Sequence[float], pairs: _Pairs, most: float, wealth: float, alpha: float) -> Finding:
    mean = 2 ** (math.fsum(logs) / len(logs)) if logs else 1.0
    words = (
        f"{mean:.2f} times the old one over {len(logs)} devices{_in_words(pairs)}, at most {most:g} times; "
        f"evidence {wealth:.3g} (stops at {1 / alpha:.4g})"
    )
    return Finding(guard, _stop(wealth, alpha, max(len(logs), len(pairs)) >= 2), words)


def _log(ratio: float | None) -> float | None:
    """A ratio as a power of two, cut to `RATIO_BOUNDS`; None for one that isn't known, or can't be."""
    return None if ratio is None or ratio <= 0 else max(RATIO_BOUNDS[0], min(RATIO_BOUNDS[1], math.log2(ratio)))


def _in_words(pairs: _Pairs) -> str:
    return f" (and in use, beside {len(pairs)} control devices)" if pairs else ""


def _both(tested: float, pairs: _Pairs, limit: float, bounds: tuple[float, float]) -> float:
    """What the devices' own tests say, and what use says beside the control: half of the stake on each."""
    if not pairs:
        return tested
    return (tested + mean_evidence([ours - theirs for ours, theirs in pairs], limit, *bounds)) / 2


# The control: devices of the same population and time that haven't been offered the release.

_Pairs = Sequence[tuple[float, float]]
LEAST_CONTROL: Final = 1 / 3
"""Of the canaries: with fewer control devices than this share there is nothing to compare with."""


def _canaries(exposures: Sequence[Exposure]) -> list[Exposure]:
    return [exposure for exposure in exposures if exposure.arm is Arm.CANARY]


def _control(exposures: Sequence[Exposure]) -> list[Exposure]:
    """The control devices, if there are enough."""
    control = [exposure for exposure in exposures if exposure.arm is Arm.CONTROL]
    return control if len(control) >= LEAST_CONTROL * (len(exposures) - len(control)) else []


def _pairs(exposures: Sequence[Exposure], pick: Callable[[Drift], float | None], look: Look) -> _Pairs:
    """A canary and a control device each, by what they show in use; none before the soak time is over.

    A device's drift goes on changing, so unlike answers it can't be looked at as often as one likes.
    """
    ours, theirs = (
        [value for e in side if e.drift is not None and (value := pick(e.drift)) is not None]
        for side in (_canaries(exposures), _control(exposures))
    )
    enough = look.soaked and len(theirs) >= LEAST_CONTROL * len(ours)
    return list(zip(ours, theirs, strict=False)) if enough else []


def _stop(wealth: float, alpha: float, several: bool) -> Decision:
    return Decision.FAIL if wealth >= 1 / alpha and several else Decision.PASS


def _enough(canaries: Sequence[Exposure], policy: GatePolicy, look: Look) -> Finding:
    answered, offered = sum(exposure.answered for exposure in canaries), len(canaries)
    needed = max(min(policy.least_answers, look.members), math.ceil(policy.least_answer_share * offered))
    words = f"{answered} of {offered} devices answered, {needed} are needed; the wave takes {look.members}"
    if not look.soaked:
        words += "; the soak time isn't over"
    enough = look.soaked and answered >= needed
    return Finding("enough data", Decision.PASS if enough else Decision.CONTINUE, words)


def _no_worse(exposures: Sequence[Exposure], policy: GatePolicy, look: Look) -> Finding:
    if policy.margin == 0 or look.members == 0:
        return Finding("margin", Decision.PASS, "no evidence against a margin is asked for")
    usual = max(policy.expected_failure_share, _share_failed(_control(exposures)))
    answers = [e.failed for e in exposures if e.arm is Arm.CANARY and e.answered]
    limit = min(0.95, usual + policy.margin)
    wealth = below_evidence(sum(answers), len(answers), limit)
    words = f"evidence that failures stay below {limit:.1%} is {wealth:.3g} (passes at 20)"
    return Finding("margin", Decision.PASS if wealth >= 20 else Decision.CONTINUE, words)


def _share_failed(exposures: Sequence[Exposure]) -> float:
    return sum(e.failed or e.troubled for e in exposures) / len(exposures) if exposures else 0.0


# Evidence. Each of these is a mean of wealths, and so a wealth.


def failure_evidence(exposures: Sequence[Exposure], expected: float) -> float:
    """How strongly the canaries' failures speak for being more frequent than the control's (an e-value).

    Given that a device failed, it is a canary with chance c / (c + t) if both fail alike, and with r c / (r c + t) if
    canaries fail r times as often. All offers count as exposed from the start, since failures are told sooner than
    successes. Trouble in use counts on both sides. Canaries also fail by taking the release over, which control devices
    don't do at all: so failures must be more frequent than the control's *and* than the share `expected` (the smaller
    of two e-values is one for "no more than the larger of both"). Without enough control devices `expected` stands
    alone; without canaries there is no evidence yet.
    """
    canaries, control = _canaries(exposures), _control(exposures)
    if not canaries:
        return 1.0
    if not control:
        return above_evidence(sum(e.failed for e in canaries), len(canaries), expected)
    ours = sum(e.failed or e.troubled for e in canaries)
    theirs = sum(e.failed or e.troubled for e in control)
    beside = share_evidence(ours, theirs, len(canaries) / len(control))
    return min(beside, above_evidence(ours, len(canaries), expected))
