"""Experiments: two or more releases at once, each on its share of the devices (A/B).

Each arm is judged on its own against the same control; together they may err as often as one rollout. The arms must
have got the shares that they should have (sample-ratio check): else something other than chance chose the devices, and
nothing may be concluded. Which arm serves better is told, and left to a person.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from umbel_server.evidence import mean_evidence, ratio_evidence
from umbel_server.gates import Arm, Decision, Exposure, Finding, GatePolicy, Judgement, Look, judge
from umbel_server.rollout_spec import ExperimentArm

SRM_ALPHA: Final = 0.001
"""How often a fair split is taken for an unfair one, at most, over the whole experiment."""
_GAINS: Final = (-0.25, 1.0)
"""A device's change of accuracy counts between these, as gates count it."""


def judge_experiment(
    arms: Sequence[ExperimentArm],
    canaries: Mapping[int, Sequence[Exposure]],
    control: Sequence[Exposure],
    policy: GatePolicy,
    look: Callable[[int], Look],
) -> Judgement:
    """What the answers of all arms so far allow to conclude.

    Args:
        arms: of the experiment.
        canaries: release -> its devices, in the order of their answers.
        control: devices that got none of them.
        policy: what has to be shown for each arm.
        look: release -> when its gate is asked.
    """
    shared = replace(policy, alpha=policy.alpha / len(arms))
    judged = [judge([*canaries[arm.release], *control], shared, look(arm.release)) for arm in arms]
    split = _split(arms, canaries)
    findings = [
        replace(finding, guard=f"release {arm.release}, {finding.guard}")
        for arm, judgement in zip(arms, judged, strict=True)
        for finding in judgement.findings
    ]
    told = (*findings, split, *_between(arms, canaries))
    decisions = {judgement.decision for judgement in judged}
    if Decision.FAIL in decisions:
        return Judgement(Decision.FAIL, told)
    decisions.add(split.decision)
    worst = next(it for it in (Decision.INCONCLUSIVE, Decision.CONTINUE, Decision.PASS) if it in decisions)
    return Judgement(worst, told)


def _split(arms: Sequence[ExperimentArm], canaries: Mapping[int, Sequence[Exposure]]) -> Finding:
    counts, weights = [len(canaries[arm.release]) for arm in arms], [arm.weight for arm in arms]
    wealth = ratio_evidence(counts, weights)
    took = ", ".join(f"{count} devices got release {arm.release}" for arm, count in zip(arms, counts, strict=True))
    shares = ":".join(f"{weight:g}" for weight in weights)
    words = f"{took}; evidence that this isn't a split {shares} by chance {wealth:.3g} (stops at {1 / SRM_ALPHA:g})"
    return Finding("sample ratio", Decision.INCONCLUSIVE if wealth * SRM_ALPHA >= 1 else Decision.PASS, words)


def _between(arms: Sequence[ExperimentArm], canaries: Mapping[int, Sequence[Exposure]]) -> list[Finding]:
    """How each later arm compares with the first, for a person: pairs of devices in the order of their answers."""
    first, *others = [(arm.release, _gains(canaries[arm.release])) for arm in arms]
    return [_compared(first, other) for other in others]


def _compared(first: tuple[int, list[float]], other: tuple[int, list[float]]) -> Finding:
    (a, before), (b, after) = first, other
    differences = [y - x for x, y in zip(before, after, strict=False)]
    mean = sum(differences) / len(differences) if differences else 0.0
    reach = _GAINS[1] - _GAINS[0]
    better = mean_evidence(differences, 0.0, -reach, reach)
    worse = mean_evidence([-difference for difference in differences], 0.0, -reach, reach)
    words = (
        f"accuracy changed by {mean:+.1%} more than with release {a}, over {len(differences)} pairs of devices; "
        f"evidence that it is better {better:.3g}, that it is worse {worse:.3g}"
    )
    return Finding(f"release {b} beside {a}", Decision.PASS, words)


def _gains(exposures: Sequence[Exposure]) -> list[float]:
    low, high = _GAINS
    changes = [it.accuracy_change for it in exposures if it.arm is Arm.CANARY]
    return [max(low, min(high, change)) for change in changes if change is not None]
