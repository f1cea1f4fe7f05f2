"""The published form of scenarios: a JSON Schema for editors, and the table of keys of the reference page."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from umbel_simulations.scenario import SCENARIOS

Path = tuple[str | int, ...]


@lru_cache(maxsize=1)
def schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a scenario."""
    found = SCENARIOS.json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found, "title": "A scenario of umbel-simulate"}


def schema_text() -> str:
    """The schema as it is published."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


def keys_at(path: Path) -> list[str]:
    """The keys that a table of a scenario may have; none for a path that isn't a table of known keys."""
    node = schema()
    for part in path:
        inner = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        node = _resolved(inner or {})
    return list(node.get("properties", {}))


def reference() -> str:
    """Every key of a scenario as Markdown: a heading and a table for each part."""
    parts = [_section("The top", "", schema())]
    parts += [_section(f"`{key}`", key, node) for key, node in _tables("", schema())]
    return "\n".join(parts)


def _tables(prefix: str, node: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for name, entry in node["properties"].items():
        inner = _resolved(entry.get("items", entry))
        if "properties" in inner:
            key = f"{prefix}{name}{'[]' if 'items' in entry else ''}"
            found += [(key, inner), *_tables(f"{key}.", inner)]
    return found


def _section(title: str, key: str, node: dict[str, Any]) -> str:
    about = f"{node['description'].splitlines()[0]}\n\n" if key else ""
    rows = "\n".join(_row(name, entry, name in node.get("required", ())) for name, entry in node["properties"].items())
    return f"### {title}\n\n{about}| key | what it takes | default | meaning |\n|---|---|---|---|\n{rows}\n"


def _row(name: str, entry: dict[str, Any], required: bool) -> str:
    default = "must be given" if required else _default(entry)
    return f"| `{name}` | {_kind(entry)} | {default} | {entry.get('description', '').replace('|', '/')} |"


def _default(entry: dict[str, Any]) -> str:
    value = entry.get("default")
    if value in (None, "", [], {}):
        return "–"
    return "as below" if isinstance(value, dict | list) and "$ref" in str(entry) else f"`{json.dumps(value)}`"


def _kind(entry: dict[str, Any]) -> str:
    """What a key takes, in words."""
    if "anyOf" in entry:
        kinds = [_kind(choice) for choice in entry["anyOf"] if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "$ref" in entry:
        return "a table"
    if "enum" in entry:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in entry["enum"])
    match entry.get("type"):
        case "array":
            inner = entry.get("items", {})
            return "tables" if "$ref" in inner else f"a list of {_kind(inner).removeprefix('a ')}s"
        case "object":
            return "values by name" if '"string"' in json.dumps(entry["additionalProperties"]) else "numbers by name"
        case "string":
            return "text"
        case "boolean":
            return "`true` or `false`"
        case kind:
            return ("a whole number" if kind == "integer" else "a number") + _bounds(entry)


def _bounds(entry: dict[str, Any]) -> str:
    if "minimum" in entry and "maximum" in entry:
        return f" from {entry['minimum']} to {entry['maximum']}"
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    told = [f"{word} {entry[bound]}" for bound, word in words.items() if bound in entry]
    return f", {' and '.join(told)}" if told else ""


def _resolved(node: dict[str, Any]) -> dict[str, Any]:
    reference = node.get("$ref")
    found: dict[str, Any] = schema()["$defs"][reference.rsplit("/", 1)[-1]] if reference else node
    return found
