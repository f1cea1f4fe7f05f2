"""`report.html`: one self-contained page about a run of the demo."""

from __future__ import annotations

from html import escape
from importlib.resources import files
from string import Template
from typing import Final

from umbel_simulations import markup
from umbel_simulations.charts import Series, line_chart
from umbel_simulations.demo.results import DeviceResult, Results

_TEMPLATE: Final = Template(files(__package__).joinpath("page.html").read_text("utf-8"))


def render(results: Results) -> str:
    """The page, as text."""
    return _TEMPLATE.substitute(
        style=markup.STYLE,
        device_count=len(results.devices),
        round_count=len(results.rounds),
        trust_mode=escape(results.trust_mode),
        figures=_figures(results),
        charts=_accuracy(results) + _time(results) + _traffic(results),
        devices=_devices(results),
        shapes=_shapes(results),
    )


def _figures(results: Results) -> str:
    figures = {
        "global model": f"{results.global_accuracy:.1%}",
        "personal models": f"{results.personal_accuracy:.1%}",
        "sent by devices": megabytes(results.bytes_up),
        "a report": f"{results.rounds[-1].bytes_per_weight:.2f} bytes a weight" if results.rounds else "–",
        "fetched by devices": megabytes(results.bytes_down),
        "whole run": f"{results.seconds:.0f} s",
    }
    return markup.figures(figures)


def _accuracy(results: Results) -> str:
    points = [(entry.round, entry.accuracy) for entry in results.rounds]
    chart = line_chart([Series("global", points)], x_label="round", y_label="accuracy", y_range=(0, 1))
    return markup.figure("Accuracy of each version on held-back windows", chart)


def _time(results: Results) -> str:
    points = [(entry.round, entry.seconds) for entry in results.rounds]
    return markup.figure(
        "Seconds a round took", line_chart([Series("round", points)], x_label="round", y_label="seconds")
    )


def _traffic(results: Results) -> str:
    points = [(entry.round, entry.bytes_up / 1e3) for entry in results.rounds]
    return markup.figure("Sealed updates received", line_chart([Series("up", points)], x_label="round", y_label="kB"))


def _devices(results: Results) -> str:
    head = ("device", "examples", "held back", "global", "personal", "runtime", "peak memory")
    return markup.table(head, [device_row(device) for device in results.devices])


def device_row(device: DeviceResult) -> tuple[str, ...]:
    """What a table tells of a device: its name, its examples, its two accuracies, how it runs."""
    return (
        device.name,
        str(device.examples),
        str(device.held_back),
        f"{device.global_accuracy:.1%}",
        f"{device.personal_accuracy:.1%}",
        device.runtime,
        f"{device.peak_memory_mb:.0f} MB",
    )


def _shapes(results: Results) -> str:
    ordered = sorted(results.shapes.items(), key=lambda entry: -entry[1])
    return markup.table(("shape", "sessions"), [(shape, str(count)) for shape, count in ordered])


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:.1f} MB"
