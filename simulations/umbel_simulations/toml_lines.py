"""On which line of a TOML text each key stands: what tomllib doesn't tell, for messages that point at a mistake."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from typing import Any

Path = tuple[str | int, ...]
"""A key from the top, such as ("adversaries", 0, "share")."""


def lines_of(text: str) -> dict[Path, int]:
    """The line, from 1, of each key and table.

    Args:
        text: valid TOML.
    """
    found: dict[Path, int] = {}
    counts: dict[Path, int] = {}
    table: Path = ()
    for number, statement in _statements(text):
        tree = tomllib.loads(statement)
        if statement.lstrip().startswith("["):
            table = _table(tree, statement.lstrip().startswith("[["), counts)
            found.setdefault(table, number)
            continue
        for path in _paths(tree):
            found.setdefault(table + path, number)
    return found


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Each header and each key with its value, which may go over several lines."""
    gathered: list[str] = []
    first = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not gathered and (not line.strip() or line.lstrip().startswith("#")):
            continue
        first = first if gathered else number
        gathered.append(line)
        statement = "\n".join(gathered)
        try:
            tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # it goes on in the next line
        yield first, statement
        gathered = []


def _table(tree: dict[str, Any], is_array: bool, counts: dict[Path, int]) -> Path:
    """The path of a header; a list of tables counts, and names inside one belong to its last."""
    path: Path = ()
    value: Any = tree
    while isinstance(value, dict) and value:
        key, value = next(iter(value.items()))
        path += (key,)
        if isinstance(value, list):
            break
        if value and path in counts:
            path += (counts[path] - 1,)
    if is_array:
        counts[path] = counts.get(path, 0) + 1
        path += (counts[path] - 1,)
    return path


def _paths(tree: Any, above: Path = ()) -> Iterator[Path]:
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*above, key)
        yield from _paths(value, (*above, key))
