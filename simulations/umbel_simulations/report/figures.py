"""The figures of a run by name, written for people: what tables in the terminal and pages show alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from umbel_simulations.judgement import Check, accepted_rounds, is_go, judge, megabytes
from umbel_simulations.outcome import Cost, Outcome

NONE = "–"
Measure = float | str | None


def measures(outcome: Outcome, cost: Cost | None = None) -> dict[str, Measure]:
    """The main figures of a run as numbers, in order; None for what wasn't measured. Shares lie between 0 and 1."""
    spread = outcome.per_device.get
    accuracy, personal = spread("accuracy"), spread("personal_accuracy")
    seconds, joules = spread("seconds"), spread("joules")
    found: dict[str, Measure] = {
        "verdict": _verdict(judge(outcome)),
        "accuracy": outcome.accuracy,
        "loss": outcome.loss,
        "worst twentieth": accuracy.p05 if accuracy else None,
        "personal": personal.mean if personal else None,
        "accepted rounds": accepted_rounds(outcome),
        "rounds": len(outcome.rounds),
        "virtual hours": outcome.hours,
        "sessions": outcome.sessions,
        "wasted": outcome.wasted_share,
        "dropped": outcome.dropped_share,
        "MB a device (95 %)": megabytes(outcome),
        "seconds a device (95 %)": seconds.p95 if seconds else None,
        "joules a device (mean)": joules.mean if joules else None,
        "epsilon": outcome.epsilon or None,
    }
    return found | ({"real seconds": cost.seconds, "peak memory": cost.peak_megabytes} if cost else {})


def _verdict(checks: tuple[Check, ...]) -> str | None:
    """None where the scenario names no thresholds: nothing was judged, which `go-no-go` takes for a no-go."""
    return ("go" if is_go(checks) else "no-go") if checks else None


def figures(outcome: Outcome, cost: Cost | None = None) -> dict[str, str]:
    """`measures` in words."""
    found = measures(outcome, cost)
    rounds = found.pop("rounds")
    words = {label: _SHOWN.get(label, number)(value) for label, value in found.items()}
    return words | {"accepted rounds": f"{found['accepted rounds']} of {rounds}"}


def check_rows(checks: tuple[Check, ...]) -> list[tuple[str, str, str, str]]:
    """Each threshold as (name, what was wanted, what was found, the answer)."""
    return [_check_row(check) for check in checks]


def _check_row(check: Check) -> tuple[str, str, str, str]:
    sign = "≥" if check.at_least else "≤"
    found = "not measured" if check.found is None else number(check.found)
    return (check.name.replace("_", " "), f"{sign} {check.wanted:g}", found, "holds" if check.passes else "fails")


def percent(share: float | None) -> str:
    """A share for people."""
    return NONE if share is None else f"{share:.1%}"


def number(value: float | None) -> str:
    """A number for people: whole ones and large ones without a fraction, others in three figures or more."""
    if value is None:
        return NONE
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}"


_SHOWN: Final[dict[str, Callable[[Any], str]]] = {
    "verdict": lambda verdict: verdict or NONE,
    "accuracy": percent,
    "worst twentieth": percent,
    "personal": percent,
    "virtual hours": "{:.2f}".format,
    "sessions": "{:,}".format,
    "wasted": percent,
    "dropped": percent,
    "real seconds": "{:.1f}".format,
    "peak memory": "{:.0f} MB".format,
}
"""How a figure is written; all others as `number` does."""
