"""Devices, and what they tell of their sessions. What a device makes up becomes no label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

import sqlalchemy as sa
from prometheus_client.core import Metric

from umbel.errors import BY_CODE
from umbel.visit import Event
from umbel_server.fleet import was_lately
from umbel_server.monitoring.families import Labels, counter, gauge
from umbel_server.tables import DEVICES, SHAPES

_OTHER: Final = "other"
_EVENTS: Final = {event.value: event.name.lower().replace("_", "-") for event in Event}
_ENDS: Final = {Event.REPORT_ACCEPTED, Event.REPORT_REFUSED, Event.INTERRUPTED, Event.FAILED}
_ENDINGS: Final = {event.value for event in _ENDS}
_REVOKED: Final = DEVICES.c.revoked_at.is_not(None)


def devices(connection: sa.Connection, now: float) -> Iterator[Metric]:
    """How many there are, and how many call."""
    enrolled, revoked = _count(connection), _count(connection, _REVOKED)
    # Those of a population that are all silent, or all welcome, are 0, not absent.
    lately = dict.fromkeys(enrolled, 0.0) | _count(connection, was_lately(now), ~_REVOKED)
    refused = dict.fromkeys(enrolled, 0.0) | revoked
    welcome = {population: count - refused[population] for population, count in enrolled.items()}
    labels = ("population",)
    yield gauge("umbel_devices", "Devices that are enrolled and not revoked.", labels, welcome)
    yield gauge("umbel_devices_revoked", "Devices that were revoked.", labels, refused)
    yield gauge(
        "umbel_devices_seen_lately",
        "Of the devices that aren't revoked, those that called within a day.",
        labels,
        lately,
    )


def _count(connection: sa.Connection, *which: sa.ColumnElement[bool]) -> dict[Labels, float]:
    query = sa.select(DEVICES.c.population, sa.func.count()).where(*which).group_by(DEVICES.c.population)
    return {(population,): float(count) for population, count in connection.execute(query)}


def sessions(connection: sa.Connection) -> Iterator[Metric]:
    """How far devices came, by their own word."""
    shapes, errors = Counter[Labels](), Counter[Labels]()
    query = sa.select(SHAPES.c.task, SHAPES.c.shape, SHAPES.c.error, SHAPES.c.count)
    for task, shape, error, count in connection.execute(query):
        shapes[task, *reached_and_ended(shape)] += count
        if error:
            code = error.partition(":")[0]
            errors[task, code if code in BY_CODE else _OTHER] += count
    words = "Sessions as devices tell them: the last step that they reached, and how they ended then."
    yield counter("umbel_device_sessions", words, ("task", "reached", "ending"), shapes)
    words = "Sessions that failed, were refused or interrupted as devices tell them, by Umbel's code of the reason."
    yield counter("umbel_device_session_errors", words, ("task", "error"), errors)


def reached_and_ended(shape: str) -> tuple[str, str]:
    """The last step of a session's shape, and its ending; "" for what isn't there."""
    ending = shape[-1:] if shape[-1:] in _ENDINGS else ""
    return _EVENTS.get(shape.removesuffix(ending)[-1:], ""), _EVENTS.get(ending, "")
