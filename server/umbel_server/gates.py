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
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from umbel.errors import OutOfBounds

_TIMES_WORSE: Final = (1.5, 2.0, 3.0, 4.0, 6.0, 10.0)
"""The alternatives that a test bets on, in equal parts: failures so many times more frequent than they should be."""
_STAKES: Final = (0.05, 0.1, 0.2, 0.4, 0.7)
"""Shares of the largest safe bet, for measured values; in equal parts."""
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
class Exposure:
    """What one device has shown during a wave; a device appears once."""

    arm: Arm
    answered: bool = False
    failed: bool = False
    """It could not fetch, verify, load or run the release, or went back to an older one."""
    kept_own: bool = False
    """Its own model serves it better: a rejection, which isn't a failure."""
    accuracy_change: float | None = None
    """Share of right answers on its own held-back examples, new minus old: -1 to 1."""
    latency_ratio: float | None = None
    """95th percentile of the time of an answer, new over old."""
    memory_ratio: float | None = None
    """Peak memory, new over old."""


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
    canaries = [exposure for exposure in exposures if exposure.arm is Arm.CANARY]
    alpha = policy.alpha / TESTS
    findings = (
        _ceiling(canaries, policy),
        _rejections(canaries, policy, look),
        _failures(exposures, policy, alpha),
        _accuracy(canaries, policy, alpha),
        _ratio("latency", [e.latency_ratio for e in canaries], policy.most_latency_ratio, alpha),
        _ratio("memory", [e.memory_ratio for e in canaries], policy.most_memory_ratio, alpha),
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
    failed = sum(exposure.failed for exposure in exposures if exposure.arm is Arm.CANARY)
    wealth = failure_evidence(exposures, policy.expected_failure_share)
    words = f"evidence that it fails more often than the control {wealth:.3g} (stops at {1 / alpha:.4g})"
    return Finding("failures", _stop(wealth, alpha, failed >= min(policy.ceiling_devices, 2)), words)


def _accuracy(canaries: Sequence[Exposure], policy: GatePolicy, alpha: float) -> Finding:
    changes = [e.accuracy_change for e in canaries if e.accuracy_change is not None]
    wealth = mean_evidence([-change for change in changes], policy.most_accuracy_drop, *_DROP_BOUNDS)
    mean = math.fsum(changes) / len(changes) if changes else 0.0
    words = (
        f"accuracy changed by {mean:+.1%} on average over {len(changes)} devices, "
        f"evidence of a drop beyond {policy.most_accuracy_drop:.1%} is {wealth:.3g} (stops at {1 / alpha:.4g})"
    )
    return Finding("accuracy", _stop(wealth, alpha, len(changes) >= policy.ceiling_devices), words)


def _ratio(guard: str, ratios: Sequence[float | None], most: float, alpha: float) -> Finding:
    found = [ratio for ratio in ratios if ratio is not None and ratio > 0]
    logs = [max(RATIO_BOUNDS[0], min(RATIO_BOUNDS[1], math.log2(ratio))) for ratio in found]
    wealth = mean_evidence(logs, math.log2(most), *RATIO_BOUNDS)
    mean = 2 ** (math.fsum(logs) / len(logs)) if logs else 1.0
    words = (
        f"{mean:.2f} times the old one over {len(found)} devices, at most {most:g} times; evidence {wealth:.3g} "
        f"(stops at {1 / alpha:.4g})"
    )
    return Finding(guard, _stop(wealth, alpha, len(found) >= 2), words)


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
    control = [exposure for exposure in exposures if exposure.arm is Arm.CONTROL and exposure.answered]
    usual = max(policy.expected_failure_share, _share_failed(control))
    answers = [e.failed for e in exposures if e.arm is Arm.CANARY and e.answered]
    limit = min(0.95, usual + policy.margin)
    wealth = _below_evidence(sum(answers), len(answers), limit)
    words = f"evidence that failures stay below {limit:.1%} is {wealth:.3g} (passes at 20)"
    return Finding("margin", Decision.PASS if wealth >= 20 else Decision.CONTINUE, words)


def _share_failed(exposures: Sequence[Exposure]) -> float:
    return sum(exposure.failed for exposure in exposures) / len(exposures) if exposures else 0.0


# Evidence. Each of these is a mean of wealths, and so a wealth.


def failure_evidence(exposures: Sequence[Exposure], expected: float) -> float:
    """How strongly the canaries' failures speak for being more frequent than the control's (an e-value).

    Given that a device failed, it is a canary with chance c / (c + t) if both fail alike, and with r c / (r c + t) if
    canaries fail r times as often. All offers count as exposed from the start, since failures are told sooner than
    successes. Without control devices failures are compared with the share `expected`.
    """
    canaries = sum(exposure.arm is Arm.CANARY for exposure in exposures)
    controls = len(exposures) - canaries
    canary_failures = sum(e.failed for e in exposures if e.arm is Arm.CANARY)
    if not controls:
        return _above_evidence(canary_failures, canaries, expected)
    return share_evidence(canary_failures, sum(e.failed for e in exposures) - canary_failures, canaries / controls)


def share_evidence(canary_failures: int, control_failures: int, odds: float) -> float:
    """The e-value of `failure_evidence` by counts; `odds` is exposed canaries over exposed controls."""
    fair = odds / (1 + odds)
    wealth = 0.0
    for times in _TIMES_WORSE:
        biased = times * odds / (1 + times * odds)
        wealth += _likelihood_ratio(canary_failures, control_failures, biased, fair)
    return wealth / len(_TIMES_WORSE)


def mean_evidence(values: Sequence[float], limit: float, low: float, high: float) -> float:
    """How strongly values, cut to [low, high], speak for a mean above `limit` (an e-value by betting).

    Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2024: each value x multiplies
    the wealth by 1 + stake (x - limit), which is never negative and doesn't grow on average unless the mean is above.
    """
    largest = 1 / (limit - low)
    wealth = 0.0
    for share in _STAKES:
        stake = share * largest
        wealth += _exp(math.fsum(math.log1p(stake * (min(high, max(low, x)) - limit)) for x in values))
    return wealth / len(_STAKES)


def _above_evidence(failures: int, count: int, expected: float) -> float:
    worse = [min(times * expected, (1 + expected) / 2) for times in _TIMES_WORSE]
    return sum(_likelihood_ratio(failures, count - failures, share, expected) for share in worse) / len(worse)


def _below_evidence(failures: int, count: int, limit: float) -> float:
    better = [limit / times for times in _TIMES_WORSE]
    return sum(_likelihood_ratio(failures, count - failures, share, limit) for share in better) / len(better)


def _likelihood_ratio(hits: int, misses: int, share: float, null: float) -> float:
    return _exp(hits * math.log(share / null) + misses * math.log((1 - share) / (1 - null)))


def _exp(logarithm: float) -> float:
    return math.exp(min(logarithm, 700.0))


def arms_match(counts: Sequence[int], weights: Sequence[float]) -> bool:
    """Whether an experiment's arms got devices as they should (sample-ratio check).

    A chi-square statistic beyond what one split in a thousand shows means that something other than chance chose, and
    that nothing should be concluded from the experiment. The limit is Wilson and Hilferty's approximation (1931).
    """
    total, freedom = sum(counts), len(counts) - 1
    if total == 0 or freedom < 1:
        return True
    expected = [total * weight / sum(weights) for weight in weights]
    statistic = sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))
    spread = 2 / (9 * freedom)
    return statistic <= freedom * (1 - spread + 3.0902 * math.sqrt(spread)) ** 3
