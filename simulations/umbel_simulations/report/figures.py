"""The figures of a run by name, written for people: what tables in the terminal and pages show alike."""

from __future__ import annotations

from umbel_simulations.judgement import Check, accepted_rounds, is_go, judge, megabytes
from umbel_simulations.outcome import Cost, Outcome

NONE = "–"


def figures(outcome: Outcome, cost: Cost | None = None) -> dict[str, str]:
    """The main figures of a run, in order."""
    spread = outcome.per_device.get
    accuracy, personal = spread("accuracy"), spread("personal_accuracy")
    seconds, joules = spread("seconds"), spread("joules")
    found = {
        "verdict": "go" if is_go(judge(outcome)) else "no-go",
        "accuracy": percent(outcome.accuracy),
        "worst twentieth": percent(accuracy.p05 if accuracy else None),
        "personal": percent(personal.mean if personal else None),
        "accepted rounds": f"{accepted_rounds(outcome)} of {len(outcome.rounds)}",
        "virtual hours": f"{outcome.hours:.2f}",
        "sessions": f"{outcome.sessions:,}",
        "wasted": percent(outcome.wasted_share),
        "dropped": percent(outcome.dropped / outcome.sessions if outcome.sessions else None),
        "MB a device (95 %)": number(megabytes(outcome)),
        "seconds a device (95 %)": number(seconds.p95 if seconds else None),
        "joules a device (mean)": number(joules.mean if joules else None),
        "epsilon": number(outcome.epsilon or None),
    }
    if cost:
        found |= {"real seconds": f"{cost.seconds:.1f}", "peak memory": f"{cost.peak_megabytes:.0f} MB"}
    return found


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
    """A number for people: three figures, no exponents."""
    if value is None:
        return NONE
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}"
