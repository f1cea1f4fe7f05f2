"""`report.html` of one run, and the page that puts several side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Final

from umbel_simulations import markup
from umbel_simulations.charts import Series, line_chart
from umbel_simulations.judgement import is_go, judge
from umbel_simulations.outcome import Cost, Outcome, RolloutOutcome, RoundOutcome
from umbel_simulations.report.figures import check_rows, figures, number, percent

_TEMPLATE: Final = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
_SHAPES_SHOWN: Final = 20
_ROUNDS_SHOWN: Final = 200
_LETTERS: Final = (
    "One letter an event: - checked in, v fetched, [ ] training started and finished, + report started, ^ accepted, "
    "# refused, ! interrupted, * failed."
)
Runs = Mapping[str, Outcome]
"""Outcomes by the name they go under."""


def render(outcome: Outcome, cost: Cost | None = None) -> str:
    """The page of one run."""
    name = str(outcome.scenario.get("name", "run"))
    found = {label: text for label, text in figures(outcome, cost).items() if label != "verdict"}
    body = _verdict(outcome) + markup.figures(found)
    body += _charts({name: outcome}) + _fleet_charts(outcome)
    body += _tables(outcome) + _settings(outcome)
    told = str(outcome.scenario.get("description", "")).rstrip(".")
    lead = f"{told}{'. ' if told else ''}Engine {outcome.engine}, seed {outcome.seed}."
    return _TEMPLATE.substitute(
        style=markup.STYLE, title=escape(name), lead=escape(lead), body=body, digest=outcome.digest()
    )


def render_comparison(runs: Runs) -> str:
    """The page of several runs side by side."""
    tables = {name: figures(outcome) for name, outcome in runs.items()}
    labels = list(next(iter(tables.values())))
    rows = [(label, *(table[label] for table in tables.values())) for label in labels]
    body = markup.table(("", *runs), rows) + _charts(runs)
    digests = ", ".join(str(outcome.digest())[:12] for outcome in runs.values())
    title = " and ".join(runs) if len(runs) < 4 else f"{len(runs)} runs"
    return _TEMPLATE.substitute(
        style=markup.STYLE, title=escape(title), lead="Side by side.", body=body, digest=digests
    )


# Parts.


def _verdict(outcome: Outcome) -> str:
    checks = judge(outcome)
    if not checks:
        return '<p class="note">The scenario names no thresholds, so there is nothing to judge.</p>'
    word, kind = ("Go", "go") if is_go(checks) else ("No-go", "no-go")
    table = markup.table(("threshold", "wanted", "found", ""), check_rows(checks))
    return f'<h2 class="{kind}">{word}</h2>{table}'


def _charts(runs: Runs) -> str:
    """What is drawn of every run: learning, over rounds and over time; bytes; time; privacy."""

    def series(point: str, over: str, scale: float = 1.0) -> list[Series]:
        return [Series(name, _points(outcome.rounds, over, point, scale)) for name, outcome in runs.items()]

    charts = [
        markup.figure("Accuracy over rounds", line_chart(
            series("accuracy", "number"), x_label="round", y_label="accuracy", y_range=(0, 1))),
        markup.figure("Accuracy over virtual time", line_chart(
            series("accuracy", "closed_hour"), x_label="virtual hours", y_label="accuracy", y_range=(0, 1))),
        markup.figure("Loss over rounds", line_chart(series("loss", "number"), x_label="round", y_label="loss")),
        markup.figure("Sent by devices", line_chart(series("bytes_up", "number", 1e-6), x_label="round", y_label="MB")),
        markup.figure("Reports counted", line_chart(series("reported", "number"), x_label="round", y_label="reports")),
    ]  # fmt: skip
    if any(outcome.epsilon for outcome in runs.values()):
        epsilon = line_chart(series("epsilon", "number"), x_label="round", y_label="epsilon")
        charts.append(markup.figure("Privacy spent", epsilon))
    return f'<div class="charts">{"".join(charts)}</div>'


def _points(rounds: Sequence[RoundOutcome], over: str, point: str, scale: float) -> list[tuple[float, float]]:
    found = [(getattr(one, over), getattr(one, point)) for one in rounds]
    return [(float(x), float(y) * scale) for x, y in found if y is not None]


def _fleet_charts(outcome: Outcome) -> str:
    if not outcome.hourly:
        return ""
    names = ("available", "check_ins", "sessions", "reports")
    lines = [
        Series(name.replace("_", "-"), [(float(hour.hour), float(getattr(hour, name))) for hour in outcome.hourly])
        for name in names
    ]
    days = markup.figure("Devices that were free", line_chart(lines[:1], x_label="virtual hours", y_label="devices"))
    visits = markup.figure("What they did, by hour", line_chart(lines[1:], x_label="virtual hours", y_label="an hour"))
    return f'<h2>The fleet</h2><div class="charts">{days}{visits}</div>'


def _tables(outcome: Outcome) -> str:
    parts = [_rollouts(outcome), _alarms(outcome), _spreads(outcome), _rounds(outcome), _counts(outcome)]
    if outcome.invariants:
        items = "".join(f"<li>{escape(one)}</li>" for one in outcome.invariants)
        parts.append(f"<h2>What was checked, and held</h2><ul>{items}</ul>")
    return "".join(parts)


def _rollouts(outcome: Outcome) -> str:
    if not outcome.rollouts:
        return ""
    rows = [
        (f"{one.release} ({one.content})", one.ending, number(one.started_hour), number(one.ended_hour),
         str(one.devices_reached), str(one.devices_left), number(one.cleared_hour))
        for one in outcome.rollouts
    ]  # fmt: skip
    head = ("release", "ending", "began (h)", "ended (h)", "devices reached", "have it at the end", "cleared (h)")
    events = [row for one in outcome.rollouts for row in _events(one)]
    told = markup.table(("release", "hour", "what happened"), events, kind="told") if events else ""
    return f"<h2>Rollouts</h2>{markup.table(head, rows)}{told}"


def _alarms(outcome: Outcome) -> str:
    if not outcome.drift.alarms:
        return ""
    rows = [(one.what, str(one.round), number(one.hour), number(one.p_value)) for one in outcome.drift.alarms]
    return f"<h2>Told as drift</h2>{markup.table(('what', 'after round', 'hour', 'p-value'), rows)}"


def _events(rollout: RolloutOutcome) -> Iterator[tuple[str, str, str]]:
    """What happened to a rollout; a gate's reasons stand in its later events again, and are shown once."""
    shown: set[str] = set()
    for event in rollout.events:
        stage, *reasons = event.what.splitlines() or [""]
        fresh = [line.strip() for line in reasons if line not in shown]
        shown.update(reasons)
        yield str(rollout.release), number(event.hour), "\n".join([stage, *fresh])


def _spreads(outcome: Outcome) -> str:
    if not outcome.per_device:
        return ""
    rows = [
        (name.replace("_", " "), str(one.count), *map(number, (one.mean, one.least, one.p05, one.median, one.p95)),
         number(one.most))
        for name, one in sorted(outcome.per_device.items())
    ]  # fmt: skip
    head = ("a device", "devices", "mean", "least", "5 %", "median", "95 %", "most")
    return f"<h2>Across devices</h2>{markup.table(head, rows)}"


def _rounds(outcome: Outcome) -> str:
    rows = [
        (str(one.number), one.verdict, number(one.opened_hour), number(one.closed_hour), str(one.invited),
         str(one.reported), percent(one.accuracy), number(one.loss), one.reason)
        for one in outcome.rounds[:_ROUNDS_SHOWN]
    ]  # fmt: skip
    head = ("round", "verdict", "opened (h)", "closed (h)", "invited", "reported", "accuracy", "loss", "why")
    title = "Rounds" if len(rows) == len(outcome.rounds) else f"The first {len(rows)} of {len(outcome.rounds):,} rounds"
    return f"<details><summary>{title}</summary>{markup.table(head, rows)}</details>"


def _counts(outcome: Outcome) -> str:
    found = ""
    shapes = dict(sorted(outcome.shapes.items(), key=lambda entry: (-entry[1], entry[0]))[:_SHAPES_SHOWN])
    few = "" if len(shapes) == len(outcome.shapes) else f": the {len(shapes)} commonest of {len(outcome.shapes)}"
    for title, note, counts in (
        (f"Session shapes{few}", _LETTERS, shapes),
        ("Faults that were made", "", outcome.faults),
        ("What the product refused", "", outcome.refusals),
    ):
        if counts:
            rows = [(name, f"{count:,}") for name, count in counts.items()]
            found += f'<h2>{title}</h2><p class="note">{escape(note)}</p>{markup.table(("", "count"), rows)}'
    return found


def _settings(outcome: Outcome) -> str:
    text = escape(json.dumps(outcome.scenario, indent=2, ensure_ascii=False))
    return f"<details><summary>The scenario</summary><pre>{text}</pre></details>"
