"""What an operator sees: tables for people, JSON for programs, from the same messages."""

from __future__ import annotations

import base64
import datetime
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from umbel.histograms import without_bins
from umbel.program import writes_all
from umbel.v1 import admin_pb2 as pb

PIPE_WIDTH: Final = 300
_CONTROL: Final = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
Column = tuple[str, Callable[[Any], str]]
"""A heading, and a message's text under it."""


def to_tree(message: Message) -> dict[str, Any]:
    """A message as plain JSON: every field by its name in the proto, numbers as numbers, bytes in base64.

    As in protobuf's own JSON, a number without bounds is a text ("Infinity"): JSON has no word for it.
    """
    return {field.name: _field(field, message) for field in message.DESCRIPTOR.fields}


def _field(field: Any, message: Message) -> Any:
    value = getattr(message, field.name)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        inner = field.message_type.fields_by_name["value"]
        return {key: _one(inner, value[key]) for key in sorted(value)}
    if field.is_repeated:
        return [_one(field, entry) for entry in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _one(field, value)


def _one(field: Any, value: Any) -> Any:
    if isinstance(value, pb.Argument):
        return plain(value)
    if field.message_type is not None:
        return to_tree(value)
    if field.enum_type is not None:
        return _word(field.enum_type, value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _word(kind: Any, number: int) -> str:
    """A value of an enum as everybody says it (`KIND_TRAIN` is "train"); of a newer coordinator's, its number."""
    known = kind.values_by_number.get(number)
    return known.name.removeprefix(f"{kind.name.upper()}_").lower() if known else str(number)


def plain(argument: pb.Argument) -> float | int | bool | str | None:
    """The one value that an argument holds."""
    which = argument.WhichOneof("value")
    return getattr(argument, which) if which else None


def print_json(value: Any) -> None:
    """One JSON document, alone on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=not writes_all(sys.stdout)) + "\n")
    sys.stdout.flush()


def print_json_line(value: Any) -> None:
    """One JSON document of several, on a line of its own."""
    sys.stdout.write(json.dumps(value, ensure_ascii=not writes_all(sys.stdout)) + "\n")
    sys.stdout.flush()


def announce(value: Any, words: str, as_json: bool) -> None:
    """Say that a server listens, to whoever reads; it serves all the same where nobody does, or the disk is full."""
    try:
        if as_json:
            print_json_line(value)
        else:
            sys.stdout.write(words + "\n")
            sys.stdout.flush()
    except OSError:
        # What wasn't taken would be tried again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Console(Console):
    """One whose lines nobody's words can rewrite: control characters are blanks, and only line ends stay."""

    def print(self, *objects: Any, **how: Any) -> None:
        """As rich does."""
        super().print(*(_clean(one) if isinstance(one, str) else one for one in objects), **how)


def _clean(words: str) -> str:
    return _CONTROL.sub(" ", words)


def console() -> Console:
    """Standard output, for people."""
    # What stands in brackets or between colons was written by people and devices, and is shown as it is.
    # Into a pipe or a file a row stays one line, however long.
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return _Console(highlight=False, markup=False, emoji=False, width=width)


def table(title: str, columns: Sequence[Column], rows: Iterable[Any]) -> Table:
    """Rows under headings."""
    found = Table(
        title=title or None,
        title_justify="left",
        header_style="bold",
        show_header=any(heading for heading, _ in columns),
        box=None,
        pad_edge=False,
    )
    for heading, _ in columns:
        found.add_column(heading, overflow="fold")
    for row in rows:
        found.add_row(*(_clean(text(row)) for _, text in columns))
    return found


def instant(milliseconds: int) -> str:
    """An instant as a person reads it, in UTC; a dash for none."""
    if not milliseconds:
        return "–"
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def size(count: int) -> str:
    """A number of bytes as a person reads it."""
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def share(message: Any, field: str = "accuracy") -> str:
    """A share as a percentage; a dash if it isn't known."""
    return f"{getattr(message, field):.1%}" if message.HasField(field) else "–"


def number(value: int) -> str:
    """A number; a dash for the 0 that stands for none."""
    return str(value) if value else "–"


def metrics(values: Any) -> str:
    """Metric sums, by name; the bins of histograms are for `umbel tasks drift`."""
    return settings(dict(sorted(without_bins(values).items())))


def plan(values: Mapping[str, Any]) -> str:
    """What a device runs, by the names of a task's file; a 0 means no limit, and is left out."""
    flat = {name: value for name, value in values.items() if name != "hyperparameters"}
    flat |= values.get("hyperparameters", {})
    return settings({name: value for name, value in flat.items() if value})


def settings(values: Mapping[str, Any]) -> str:
    """Names with their values, on one line."""
    return "  ".join(f"{name}={_short(value)}" for name, value in values.items()) or "–"


def _short(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
