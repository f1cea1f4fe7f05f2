"""A run and its folder: what was played, what an interrupted run needs to go on, and the report at the end.

<folder>/scenario.json   what is played here, by which version, and digests of its files: anything else is refused
<folder>/state/          the engine's own; deleted when the run is over
<folder>/report.json     the outcome and what it cost; a finished run isn't played again
<folder>/report.html     the same for people
"""

from __future__ import annotations

import resource
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from umbel.digests import digest_of_file
from umbel.errors import AlreadyExists, MalformedMessage, NotFound, UmbelError
from umbel.holding import held
from umbel.version import VERSION
from umbel_server.files import flush
from umbel_server.json_text import to_text
from umbel_simulations.engines import Progress, engine
from umbel_simulations.outcome import Cost, Outcome, from_json, to_json
from umbel_simulations.report import page
from umbel_simulations.scenario import Scenario, to_tree
from umbel_simulations.scratch import forget

REPORT: Final = "report.json"
PAGE: Final = "report.html"
_SCENARIO: Final = "scenario.json"
_STATE: Final = "state"
_DRAFT: Final = ".draft"


@dataclass(frozen=True, slots=True)
class Run:
    """A run that is over."""

    outcome: Outcome
    cost: Cost | None
    folder: Path


def play(scenario: Scenario, folder: Path, *, workers: int, progress: Progress, fresh: bool = False) -> Run:
    """Play a scenario to its end and write its report; a run that was cut off goes on, a finished one is only read.

    Args:
        scenario: with the seed and the engine to use.
        folder: the run's own; made if it isn't there.
        workers: threads.
        progress: is told.
        fresh: forget what is in the folder.

    Raises:
        AlreadyExists: the folder holds a run of something else, of another version, or of changed files.
        WrongState: another process plays in the folder at this moment.
        MalformedMessage: what the folder holds is damaged.
        OSError: the folder can't be made or written to.
        UmbelError: the engine's reasons.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder, f"another process plays in {folder} at this moment; wait for it, or choose another by -o"):
        _claim(folder, scenario, fresh)
        state = folder / _STATE
        if (folder / REPORT).is_file():
            # It may have been killed before it had cleared away.
            forget(state)
            shutil.rmtree(state, ignore_errors=True)
            return _with_page(read(folder))
        state.mkdir(exist_ok=True)
        watch = _Watch(progress)
        try:
            outcome = engine(scenario.engine)(scenario, workers=workers, progress=watch, folder=state)
        except BaseException as error:
            # What an app had done can't be gone on with, and whoever wrote it will change it.
            if isinstance(error, UmbelError) or scenario.algorithm.app:
                _let_go(folder)
            raise
        cost = watch.cost(workers)
        # The page first: whoever sees the report finds both.
        _write(folder / PAGE, page.render(outcome, cost))
        _write(folder / REPORT, to_json(outcome, cost))
        shutil.rmtree(state)
        return Run(outcome, cost, folder)


def read(path: Path) -> Run:
    """A finished run, by its folder or its report.

    Raises:
        NotFound: there is no report.
        MalformedMessage: it isn't one; says which.
    """
    report = path / REPORT if path.is_dir() else path
    if not report.is_file():
        raise NotFound(f"there is no finished run at {path}; play one: umbel-simulate run SCENARIO -o {path}")
    try:
        outcome, cost = from_json(report.read_bytes())
    except MalformedMessage as error:
        raise MalformedMessage(f"{report}: {error}; play the run again by --fresh") from error
    return Run(outcome, cost, report.parent)


def _claim(folder: Path, scenario: Scenario, fresh: bool) -> None:
    """Make the folder this scenario's own."""
    told, files = folder / _SCENARIO, {str(path): digest_of_file(path) for path in scenario.files()}
    # Another version may draw, or add up, otherwise: what it went on with would be no run of either.
    text = to_text({"scenario": to_tree(scenario), "files": files, "umbel": VERSION})
    if fresh and told.is_file():
        forget(folder / _STATE)
        shutil.rmtree(folder / _STATE, ignore_errors=True)
        # What shows that the folder is a run's goes last: nothing in a folder of other things is ours to delete.
        for old in (folder / REPORT, folder / PAGE, told):
            old.unlink(missing_ok=True)
    if told.is_file():
        if told.read_bytes() != text.encode():
            what = "another run, one by another version of Umbel, or one whose files have changed since"
            raise AlreadyExists(f"{folder} holds {what}; choose another folder by -o, or begin anew by --fresh")
        return
    if any(path.suffix != _DRAFT for path in folder.iterdir()):
        raise AlreadyExists(f"{folder} isn't empty and isn't a run's; choose another folder by -o")
    _write(told, text)


def _let_go(folder: Path) -> None:
    """Leave a folder that holds nothing to go on from, as after a name that is wrong, to whatever is right."""
    if not any((folder / _STATE).iterdir()):
        (folder / _STATE).rmdir()
        (folder / _SCENARIO).unlink()


def _with_page(run: Run) -> Run:
    """A finished run whose page is there too, should somebody have deleted it."""
    if not (run.folder / PAGE).is_file():
        _write(run.folder / PAGE, page.render(run.outcome, run.cost))
    return run


def _write(path: Path, text: str) -> None:
    """All or nothing: a kill leaves no half of a file, and a full disk nothing at all. Durable when it returns."""
    draft = path.with_suffix(_DRAFT)
    try:
        draft.write_text(text, encoding="utf-8")
        flush(draft)
        draft.replace(path)
        flush(path.parent)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


@dataclass(slots=True)
class _Watch:
    """Progress on its way to people, and what the run takes."""

    inner: Progress
    began: float = field(default_factory=time.perf_counter)
    first: float | None = None

    def step(self, done: float, total: float, hours: float, message: str) -> None:
        if self.first is None:
            self.first = time.perf_counter()
        self.inner.step(done, total, hours, message)

    def cost(self, workers: int) -> Cost:
        now = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        start = (self.first or now) - self.began
        return Cost(round(now - self.began, 3), round(start, 3), workers, round(peak / 1e6, 1))
