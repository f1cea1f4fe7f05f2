"""A grid of runs: every combination of some values, side by side in processes of their own."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbel.digests import digest_of
from umbel.errors import MalformedMessage, OutOfBounds, UmbelError, unusable
from umbel_server.json_text import to_text
from umbel_simulations.engines import Silent
from umbel_simulations.runs import Run, play
from umbel_simulations.scenario import Scenario
from umbel_simulations.scenario_file import changed

Grid = Mapping[str, Sequence[Any]]
"""The values to try, by dotted key."""


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a grid."""

    values: Mapping[str, Any]
    scenario: Scenario


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a point."""

    point: Point
    run: Run | None
    error: str = ""
    """Why there is no run."""


def values_of(text: str) -> list[Any]:
    """The values of "0.1,0.2" or "iid,natural": TOML values, or plain words, with commas between."""
    try:
        return list(tomllib.loads(f"values = [{text}]")["values"])
    except ValueError:
        return [value_of(word) for word in text.split(",")]


def value_of(text: str) -> Any:
    """One value: as TOML has it, or a plain word."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        return text.strip()


def pair_of(text: str) -> tuple[str, str]:
    """The key and the value of "task.plan.lr=0.1".

    Raises:
        MalformedMessage: there is no "=" or no key.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise MalformedMessage(f"{text!r} doesn't say which key gets which value; write it as task.plan.lr=0.1")
    return key.strip(), value.strip()


def grid_of(texts: Sequence[str]) -> Grid:
    """The grid of "task.plan.lr=0.05,0.1", "task.goal=10,20".

    Raises:
        MalformedMessage: see `pair_of`; or a key comes twice, or a value of one.
    """
    grid: dict[str, list[Any]] = {}
    for key, text in map(pair_of, texts):
        values = values_of(text)
        if key in grid:
            raise MalformedMessage(f"{key} comes twice; name all its values at once: {key}={text},…")
        if twice := [value for place, value in enumerate(values) if value in values[:place]]:
            raise MalformedMessage(f"{key} gets {twice[0]!r} twice; each combination is played once")
        grid[key] = values
    return grid


def points(scenario: Scenario, grid: Grid) -> list[Point]:
    """All combinations, in the order of the grid; each is checked before any is run.

    Raises:
        BadInput: a key or a value that a scenario can't have.
        OutOfBounds: nothing to vary.
    """
    if not grid or any(not values for values in grid.values()):
        raise OutOfBounds("a sweep needs at least one key with values, such as --over task.plan.lr=0.05,0.1")
    combinations = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    return [Point(values, changed(scenario, values)) for values in combinations]


def sweep(
    found: Sequence[Point], folder: Path, *, parallel: int, workers: int, fresh: bool = False
) -> Iterator[Result]:
    """Run all points, and give each result as it comes; what is finished in the folder isn't run again.

    Args:
        found: what to run.
        folder: gets a folder for each run, named by its values.
        parallel: how many processes.
        workers: threads in each.
        fresh: begin each anew, whatever its folder holds.
    """
    # Fresh processes: threads and sessions of this one can't be taken along by a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(parallel, mp_context=context, initializer=_end_with_parent) as pool:
        with _deaf_to_ctrl_c():
            tasks = {
                pool.submit(_play, point.scenario, folder / name_of(point), workers, fresh): point for point in found
            }
        try:
            for task in as_completed(tasks):
                yield _result(tasks[task], task)
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def _end_with_parent() -> None:
    """Killed outright, a sweep ends none of its processes: they would go on, and then wait for work for ever."""

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _result(point: Point, task: Future[Run]) -> Result:
    try:
        return Result(point, task.result())
    except UmbelError as error:
        return Result(point, None, str(error))
    except OSError as error:
        return Result(point, None, unusable(error))
    except BrokenProcessPool:
        return Result(point, None, "its process was killed, perhaps for want of memory; the command goes on")


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that begin in here don't hear Ctrl-C, which a terminal sends to all: who began them ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def name_of(point: Point) -> str:
    """The folder of a point: a name that tells its values, and a digest in case it can't tell them all."""
    words = "-".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in point.values.items())
    plain = "".join(letter if letter.isalnum() or letter in "=.-_" else "_" for letter in words)[:80]
    return f"{plain}-{digest_of(to_text(dict(point.values)).encode())[:8]}"


def _play(scenario: Scenario, folder: Path, workers: int, fresh: bool) -> Run:
    return play(scenario, folder, workers=workers, progress=Silent(), fresh=fresh)
