"""What is published of scenarios is what the code takes: the schema, the table of keys, the table of the library."""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from tests.test_docs_words import EXAMPLE, MENTION, PROGRAMS, READ, commands_of, helps, typed
from umbel_simulations.cli import _chosen, default_folder
from umbel_simulations.scenario import Scenario, to_tree
from umbel_simulations.scenario_file import LIBRARY, find, library
from umbel_simulations.schema import keys_at, reference, schema, schema_text
from umbel_simulations.sweep import grid_of, points

DOCS = Path(__file__).parents[2] / "docs" / "reference"
PAGE = (DOCS / "scenarios.md").read_text("utf-8")
SIMULATE = PROGRAMS["umbel-simulate"]


def test_the_published_schema_is_the_codes() -> None:
    published = (DOCS / "scenario-schema.json").read_text("utf-8")
    assert published == schema_text(), "write it anew: umbel-simulate schema > docs/reference/scenario-schema.json"


def test_the_published_schema_judges_as_the_loader_does() -> None:
    """By a validator that isn't ours: it takes the library, and refuses what `load` refuses."""
    published = json.loads((DOCS / "scenario-schema.json").read_text("utf-8"))
    Draft202012Validator.check_schema(published)
    judge = Draft202012Validator(published)
    for name in library():
        tree = tomllib.loads((LIBRARY / f"{name}.toml").read_text("utf-8"))
        assert not [error.message for error in judge.iter_errors(tree)], name
        for wrong in ({"taks": {}}, {"seed": -1}, {"engine": "flete"}, {"task": {"goal": 0}}, {"hours": "24"}):
            assert not judge.is_valid(tree | wrong)


def test_the_page_has_every_key_as_the_code_has_it() -> None:
    assert reference().strip() in PAGE, "put the output of `umbel-simulate schema --keys` under 'Every key'"


def test_the_page_lists_the_library() -> None:
    for name in library():
        scenario = find(name)
        assert f"| `{name}` | {scenario.engine} | {scenario.description} |" in PAGE


def test_every_key_has_a_meaning() -> None:
    parts = [schema(), *schema()["$defs"].values()]
    silent = [key for part in parts for key, entry in part["properties"].items() if not entry.get("description")]
    assert not silent


def test_keys_of_a_place_are_known() -> None:
    assert keys_at(("faults", "outages", 0)) == ["process", "from_hour", "until_hour"]
    assert keys_at(("no", "such", "place")) == []


@pytest.mark.parametrize("name", library())
def test_a_scenario_written_out_reads_as_itself(name: str) -> None:
    from umbel_simulations.scenario import SCENARIOS

    assert SCENARIOS.validate_json(json.dumps(to_tree(find(name)))) == find(name)


def shown() -> Iterator[tuple[str, list[str]]]:
    """Each command that plays a scenario of the library, and where it is shown."""
    lines = [(page.name, words) for page in READ for words in typed(page.read_text("utf-8"))]
    named = [(page.name, line) for page in READ for line in MENTION.findall(page.read_text("utf-8"))]
    named += [("--help", line) for text in helps(SIMULATE) for line in EXAMPLE.findall(text)]
    lines += [(where, words) for where, line in named for words in commands_of(line)]
    return (
        (where, words[1:]) for where, words in lines if words[0] == "umbel-simulate" and {*words[2:3]} & {*library()}
    )


def test_what_is_shown_to_be_played_can_be_and_in_the_order_of_the_page() -> None:
    """Two runs that differ need two folders."""
    played: dict[tuple[str, Path], Scenario] = {}
    for where, (verb, *words) in shown():
        asked = SIMULATE.commands[verb].make_context(verb, words).params
        scenario = _chosen(asked["scenario"], asked["seed"], asked["engine"], asked["sets"])
        if verb == "sweep":
            assert points(scenario, grid_of(asked["over"]))
        else:
            folder = asked["output"] or default_folder(scenario)
            assert played.setdefault((where, folder), scenario) == scenario, (where, words)
    assert played
