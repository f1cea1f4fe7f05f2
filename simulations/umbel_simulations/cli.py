"""`umbel-simulate`: play scenarios, put runs side by side, judge whether to launch.

Results go to standard output (tables, or JSON with `--json`), progress and messages to standard error. Exit codes:
0 done (and go), 1 no-go, or a run that failed, 2 what was asked doesn't make sense, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final

try:
    import click
    import typer
    from rich.console import Console
    from typer.main import get_command
except ModuleNotFoundError as missing:
    raise SystemExit(f"umbel-simulate needs {missing.name}: pip install 'umbel[simulate]'") from missing

from umbel.errors import BadInput, NotFound, UmbelError, unusable
from umbel.program import take_streams, writes_all
from umbel.version import VERSION
from umbel_server.files import write_result
from umbel_server.passing import may_pass
from umbel_simulations.runs import Run, play, read
from umbel_simulations.scenario import Scenario
from umbel_simulations.scenario_file import changed, find, library

ROOT: Final = Path("umbel-runs")
"""Where runs go unless `-o` says otherwise."""

_ABOUT = """Play a fleet on this machine before anything is launched.

1. umbel-simulate list

2. umbel-simulate run smartwatch

3. umbel-simulate run smartwatch --set task.goal=16 -o bigger

4. umbel-simulate compare umbel-runs/smartwatch-fleet-seed1 bigger

5. umbel-simulate go-no-go smartwatch && echo launch

Exit codes: 0 done (and go), 1 no-go or failed, 2 what was asked doesn't make sense.
"""

app = typer.Typer(
    name="umbel-simulate", help=_ABOUT, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

ScenarioOrRun = Annotated[
    str, typer.Argument(help="A scenario, or the folder of a finished run.", metavar="SCENARIO|RUN")
]
ScenarioName = Annotated[str, typer.Argument(help="A name from `list`, or a .toml file.", metavar="SCENARIO")]
Seed = Annotated[int | None, typer.Option("--seed", help="Instead of the scenario's own.", min=0)]
Workers = Annotated[
    int, typer.Option("--workers", help="Threads or processes; the outcome is the same for any number.", min=1)
]
EngineChoice = Annotated[str | None, typer.Option("--engine", help="fleet, cohort or ray, instead of the scenario's.")]
Folder = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="The run's folder.", show_default="umbel-runs/NAME-ENGINE-seedSEED"),
]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Another value at a key, such as task.plan.lr=0.1; may be repeated.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Begin anew, whatever the folder holds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


@app.command()
def run(
    scenario: ScenarioName,
    seed: Seed = None,
    workers: Workers = 2,
    engine: EngineChoice = None,
    output: Folder = None,
    sets: Sets = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Play a scenario and write its report; the same command goes on after a kill.

    Example: umbel-simulate run poisoned-fleet --set adversaries.0.share=0.1 -o fewer-liars
    """
    found = _played(_chosen(scenario, seed, engine, sets), output, workers, fresh)
    _show_run(found, as_json)


@app.command("go-no-go")
def go_no_go(
    scenario: ScenarioOrRun,
    seed: Seed = None,
    workers: Workers = 2,
    engine: EngineChoice = None,
    output: Folder = None,
    sets: Sets = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Judge a run against its thresholds; exit code 1 is a no-go. Plays the scenario first, unless it is played.

    Example: umbel-simulate go-no-go smartwatch && echo launch
    """
    from umbel_simulations.judgement import is_go, judge

    if Path(scenario).is_dir():
        if sets or seed is not None or engine:
            raise BadInput(f"{scenario} is a finished run: what it was played with can't be changed any more")
        found = read(Path(scenario))
    else:
        found = _played(_chosen(scenario, seed, engine, sets), output, workers, fresh)
    checks = judge(found.outcome)
    if as_json:
        _print_json({"go": is_go(checks), "checks": _checks_tree(found), "report": str(found.folder)})
    else:
        from umbel_simulations.terminal import judgement_table

        _out().print(judgement_table(found.outcome))
        if not checks:
            _err().print("The scenario names no [thresholds], and what isn't asked isn't shown: no-go.")
    raise typer.Exit(0 if is_go(checks) else 1)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs, or their report.json.", metavar="RUN")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Also write a page with the curves.")] = None,
    as_json: AsJson = False,
) -> None:
    """Put finished runs side by side.

    Example: umbel-simulate compare before after -o compare.html
    """
    from umbel_simulations.report.figures import measures
    from umbel_simulations.report.page import render_comparison

    found = {name: read(path).outcome for name, path in zip(_names(runs), runs, strict=True)}
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_result(output, render_comparison(found).encode())
        _err().print(f"The page: {output}", soft_wrap=True)
    if as_json:
        _print_json({name: measures(outcome) | {"digest": outcome.digest()} for name, outcome in found.items()})
    else:
        from umbel_simulations.terminal import figures_table

        _out().print(figures_table(found))


@app.command()
def sweep(
    scenario: ScenarioName,
    over: Annotated[list[str], typer.Option("--over", help="A key and its values; repeat it for a grid.")],
    seed: Seed = None,
    workers: Annotated[int, typer.Option("--workers", help="Threads in each process.", min=1)] = 1,
    parallel: Annotated[int, typer.Option("--parallel", help="How many runs at a time.", min=1)] = 2,
    engine: EngineChoice = None,
    output: Folder = None,
    sets: Sets = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Play every combination of some values, side by side; the same command goes on after a kill.

    Example: umbel-simulate sweep digits-dirichlet --over data.alpha=0.1,1 --over task.plan.lr=0.02,0.05
    """
    from umbel_simulations import sweep as grids

    base = _chosen(scenario, seed, engine, sets)
    grid = grids.grid_of(over)
    found = grids.points(base, grid)
    folder = output or ROOT / f"{base.name}-sweep"
    results = []
    tried = grids.sweep(found, folder, parallel=parallel, workers=workers, fresh=fresh)
    with _stoppable():
        for done, result in enumerate(tried, start=1):
            told = ", ".join(f"{key}={_cell(value)}" for key, value in result.point.values.items())
            _err().print(f"{done} of {len(found)}: {told}{': ' + result.error if result.error else ''}", soft_wrap=True)
            results.append(result)
    results.sort(key=lambda result: found.index(result.point))
    _show_sweep(results, list(grid), as_json)
    if any(result.error for result in results):
        raise typer.Exit(1)


@app.command("list")
def list_scenarios(as_json: AsJson = False) -> None:
    """Show the scenarios that come with the package.

    Example: umbel-simulate list --json
    """
    scenarios = [find(name) for name in library()]
    if as_json:
        _print_json([{"name": one.name, "engine": one.engine, "description": one.description} for one in scenarios])
        return
    from umbel_simulations.terminal import table

    rows = [(one.name, one.engine, one.description) for one in scenarios]
    _out().print(table(("scenario", "engine", "what it shows"), rows, words=True))


@app.command()
def schema(
    keys: Annotated[
        bool, typer.Option("--keys", help="Every key as Markdown instead, as in the reference page.")
    ] = False,
) -> None:
    """Print the JSON Schema of scenarios, for editors.

    Example: umbel-simulate schema > scenario-schema.json
    """
    from umbel_simulations.schema import reference, schema_text

    sys.stdout.write(reference() if keys else schema_text())


# What the verbs share.


def _chosen(name: str, seed: int | None, engine: str | None, sets: list[str] | None) -> Scenario:
    from umbel_simulations.sweep import pair_of, value_of

    values: dict[str, Any] = {key: value_of(text) for key, text in map(pair_of, sets or ())}
    values |= {key: value for key, value in (("seed", seed), ("engine", engine)) if value is not None}
    scenario = find(name)
    return changed(scenario, values) if values else scenario


def default_folder(scenario: Scenario) -> Path:
    """Where a run goes unless something else is said."""
    return ROOT / f"{scenario.name}-{scenario.engine}-seed{scenario.seed}"


def _played(scenario: Scenario, output: Path | None, workers: int, fresh: bool) -> Run:
    from umbel_simulations.terminal import Bar

    with _stoppable(), Bar(scenario.name, _err()) as bar:
        return play(scenario, output or default_folder(scenario), workers=workers, progress=bar, fresh=fresh)


@contextmanager
def _stoppable() -> Iterator[None]:
    """Say what Ctrl-C has left."""
    try:
        yield
    except KeyboardInterrupt:
        _err().print("Stopped; the same command goes on.")
        raise typer.Exit(130) from None


def _show_run(found: Run, as_json: bool) -> None:
    from umbel_simulations.judgement import judge
    from umbel_simulations.report.figures import figures, measures

    report = {"report": str(found.folder / "report.html")}
    if as_json:
        told = {"digest": found.outcome.digest(), "checks": _checks_tree(found)}
        _print_json(measures(found.outcome, found.cost) | report | told)
        return
    from umbel_simulations.terminal import judgement_table, table

    _out().print(table(("", ""), list((figures(found.outcome, found.cost) | report).items()), words=True))
    if judge(found.outcome):
        _out().print(judgement_table(found.outcome))


def _show_sweep(results: list[Any], keys: list[str], as_json: bool) -> None:
    from umbel_simulations.report.figures import figures, measures

    told = measures if as_json else figures
    rows: list[Mapping[str, Any]] = [
        {key: result.point.values[key] for key in keys}
        | (told(result.run.outcome, result.run.cost) if result.run else {"verdict": "failed", "error": result.error})
        for result in results
    ]
    if as_json:
        _print_json(rows)
        return
    from umbel_simulations.terminal import table

    main = ("verdict", "accuracy", "loss", "worst twentieth", "personal", "wasted", "virtual hours", "real seconds")
    shown = (*keys, *main)
    _out().print(table(shown, [[_cell(row.get(column, "")) for column in shown] for row in rows]))


def _cell(value: Any) -> str:
    """A value as JSON has it, words without their quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _checks_tree(found: Run) -> list[dict[str, Any]]:
    from umbel_simulations.judgement import judge

    return [
        {"name": check.name, "wanted": check.wanted, "found": check.found, "passes": check.passes}
        for check in judge(found.outcome)
    ]


def _names(paths: list[Path]) -> list[str]:
    """A name for each run: its folder's, told apart by a number where two are the same."""
    folders = [(path if path.is_dir() else path.parent).resolve().name for path in paths]
    return [name if folders.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(folders, start=1)]


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=not writes_all(sys.stdout)) + "\n")


def _out() -> Console:
    # Into a pipe or a file a row stays one line, however long.
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 300)


def _err() -> Console:
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn a refusal into a message and an exit code."""
    try:
        yield
    except (BadInput, NotFound) as error:
        sys.stderr.write(f"umbel-simulate: {error}\n")
        raise SystemExit(2) from error
    except UmbelError as error:
        sys.stderr.write(f"umbel-simulate: {error}\n")
        raise SystemExit(1) from error
    except OSError as error:
        sys.stderr.write(f"umbel-simulate: {unusable(error)}\n")
        raise SystemExit(1) from error
    except Exception as error:
        if not may_pass(error):
            raise
        words = "there is no room for the run's databases, or they can't be written to"
        sys.stderr.write(f"umbel-simulate: {words} ({getattr(error, 'orig', error)}); the same command goes on\n")
        raise SystemExit(1) from error


def program() -> click.Command:
    """The whole command line."""
    return click.version_option(VERSION, message=f"umbel-simulate {VERSION}")(get_command(app))


def main() -> None:
    """Entry point of `umbel-simulate`."""
    take_streams()
    with _refusals():
        program()()
