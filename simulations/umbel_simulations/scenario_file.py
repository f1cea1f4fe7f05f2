"""Scenarios as people write them: one TOML file each, read strictly; every mistake is named with its line and key."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from umbel.bundle import MANIFEST_FILE
from umbel.errors import BadInput, MalformedMessage, NotFound, UmbelError
from umbel_simulations import toml_lines
from umbel_simulations.scenario import SCENARIOS, Scenario, to_tree
from umbel_simulations.schema import keys_at
from umbel_simulations.world import Crash, Outage, RolloutPlan

LIBRARY: Final = Path(__file__).parent / "scenarios"

_SEVERAL: Final[Mapping[tuple[str, ...], TypeAdapter[Any]]] = {
    ("rollouts",): TypeAdapter(RolloutPlan),
    ("faults", "crashes"): TypeAdapter(Crash),
    ("faults", "outages"): TypeAdapter(Outage),
}
"""Tables of which there may be several, and that refuse things by themselves."""
_NO_LINES: Final[Mapping[toml_lines.Path, int]] = {}


def library() -> tuple[str, ...]:
    """Names of the scenarios that come with the package."""
    return tuple(sorted(path.stem for path in LIBRARY.glob("*.toml")))


def find(name: str) -> Scenario:
    """A scenario of the library by its name, or one in a file.

    Raises:
        NotFound: neither is there.
        BadInput: it isn't a scenario; see `load`.
    """
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        return load(path)
    if name not in library():
        near = get_close_matches(name, library(), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(library())}, or name a .toml file"
        raise NotFound(f"no scenario is called {name!r}; {hint}")
    return load(LIBRARY / f"{name}.toml")


def load(path: Path) -> Scenario:
    """Read a scenario; paths in it start from its own folder.

    Raises:
        NotFound: no such file.
        MalformedMessage: not TOML, unknown keys, or values of a wrong kind: all of them, each with line and key.
        BadInput: values that contradict each other, or that the product refuses.
    """
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except OSError as error:
        raise NotFound(f"can't read {path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, not UTF-8, or a number beyond all bounds
        raise MalformedMessage(f"{path.name} isn't TOML: {error}") from error
    return _from_folder(_parse(tree, path.name, toml_lines.lines_of(text)), path.parent)


def changed(scenario: Scenario, values: Mapping[str, Any]) -> Scenario:
    """The scenario with other values at some keys.

    Args:
        scenario: what to start from.
        values: by dotted key, such as {"task.plan.lr": 0.1, "adversaries.0.share": 0.2}.

    Raises:
        BadInput: no such key, or a value that it can't have.
    """
    tree = to_tree(scenario)
    for key, value in values.items():
        _set(tree, key, value)
    return _parse(tree, f"{scenario.name} with {', '.join(values)}", _NO_LINES)


def _set(tree: Any, key: str, value: Any) -> None:
    *above, last = key.split(".")
    for part in above:
        tree = _inside(tree, part, key)
    if isinstance(tree, list):
        _inside(tree, last, key)
        tree[int(last)] = value
    elif isinstance(tree, dict):
        tree[last] = value
    else:
        raise MalformedMessage(f"there is nothing at {key!r}")


def _inside(tree: Any, part: str, key: str) -> Any:
    if isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
        return tree[int(part)]
    if isinstance(tree, dict) and part in tree:
        return tree[part]
    known = list(tree) if isinstance(tree, dict) else [str(index) for index in range(len(tree or ()))]
    raise MalformedMessage(f"there is no {part!r} on the way to {key!r}; there are {', '.join(known) or 'no keys'}")


def _from_folder(scenario: Scenario, folder: Path) -> Scenario:
    """Names of files, made to hold from anywhere."""
    if "/" in scenario.model or (folder / scenario.model / MANIFEST_FILE).is_file():
        scenario = replace(scenario, model=str((folder / scenario.model).resolve()))
    if trace := scenario.population.trace:
        population = replace(scenario.population, trace=str((folder / trace).resolve()))
        scenario = replace(scenario, population=population)
    if own := scenario.data.folder:
        scenario = replace(scenario, data=replace(scenario.data, folder=str((folder / own).resolve())))
    return scenario


def _parse(tree: dict[str, Any], source: str, lines: Mapping[toml_lines.Path, int]) -> Scenario:
    try:
        return SCENARIOS.validate_json(json.dumps(tree))
    except ValidationError as error:
        told = [_told(one, tree, lines) for one in error.errors(include_url=False)]
        raise MalformedMessage("\n".join(f"{source}, {one}" for one in told)) from error
    except UmbelError as error:
        place = _place_of(str(error), tree, lines)
        raise (type(error) if isinstance(error, BadInput) else BadInput)(f"{source}{place}: {error}") from error
    except TypeError as error:
        raise MalformedMessage(f"{source}: {error}; write dates and times as numbers of hours or seconds") from error


def _told(error: Mapping[str, Any], tree: dict[str, Any], lines: Mapping[toml_lines.Path, int]) -> str:
    """One mistake: where it is, what it is, what to do."""
    path = _known_part(tuple(error["loc"]), tree)
    key = ".".join(map(str, error["loc"] if error["type"].startswith("missing") else path))
    line = next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), 0)
    where = f"line {line}, {key}" if line else key
    match error["type"]:
        case "unexpected_keyword_argument":
            known = keys_at(path[:-1])
            near = get_close_matches(str(path[-1]), known, 1)
            return f"{where}: there is no such key; " + (f"did you mean {near[0]!r}?" if near else f"known: {known}")
        case "missing" | "missing_argument":
            return f"{where}: it is missing, and has no default"
        case _:
            return f"{where} is {error['input']!r}: {error['msg'].replace('Input', 'it')}"


def _known_part(path: toml_lines.Path, tree: Any) -> toml_lines.Path:
    """As much of a path as stands in the tree; what follows names alternatives of a type."""
    for depth, part in enumerate(path):
        try:
            tree = tree[part]
        except (KeyError, IndexError, TypeError):
            return path[:depth]
    return path


def _place_of(message: str, tree: dict[str, Any], lines: Mapping[toml_lines.Path, int]) -> str:
    """The line of the first key that a message of a part names, or of the part itself: "task: minimum 5 …"."""
    part, _, rest = message.partition(": ")
    above = list(map(str, _entry_that_tells(message, tree))) or part.split(".")
    inside = {path: line for path, line in lines.items() if [*map(str, path[: len(above)])] == above}
    for word in re.findall(r"[a-z_]+", rest):
        for path, line in inside.items():
            if path[-1] == word:
                return f", line {line}"
    return f", line {min(inside.values())}" if inside else ""


def _entry_that_tells(message: str, tree: dict[str, Any]) -> toml_lines.Path:
    """The first of several tables of a kind that by itself is refused with the same words; () where none is."""
    for path, kind in _SEVERAL.items():
        entries: Any = tree
        for key in path:
            entries = entries.get(key) if isinstance(entries, dict) else None
        for place, entry in enumerate(entries if isinstance(entries, list) else ()):
            try:
                kind.validate_json(json.dumps(entry))
            except (UmbelError, ValidationError) as error:
                if str(error) == message:
                    return (*path, place)
    return ()
