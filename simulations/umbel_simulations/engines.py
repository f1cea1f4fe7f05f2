"""The one form that every engine has, and the engines by name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Final, Protocol, cast

from umbel.errors import NotFound
from umbel_simulations.outcome import Outcome
from umbel_simulations.scenario import EngineName, Scenario


class Progress(Protocol):
    """Hears how far a run is; must be cheap."""

    def step(self, done: float, total: float, hours: float, message: str) -> None:
        """So much of the whole is done, at so many virtual hours.

        Args:
            done: rounds that are over, or virtual hours: whatever the engine counts by.
            total: how many there will be.
            hours: virtual hours since the run began.
            message: one line for people.
        """


class Silent:
    """Progress that nobody watches."""

    def step(self, done: float, total: float, hours: float, message: str) -> None:
        """Say nothing."""


class Engine(Protocol):
    """Plays a scenario."""

    def __call__(self, scenario: Scenario, *, workers: int, progress: Progress, folder: Path) -> Outcome:
        """Play it to its end, or go on where `folder` says that an earlier try was.

        Args:
            scenario: what to play.
            workers: threads, or processes where these are quicker; the outcome is the same for any number.
            progress: is told.
            folder: for what a resumed run needs; exists.
        """


ENGINES: Final[dict[EngineName, str]] = {
    "fleet": "umbel_simulations.fleet.engine",
    "cohort": "umbel_simulations.cohort.engine",
    "ray": "umbel_simulations.cohort.ray_engine",
}
"""Where each engine's `run` stands; loaded when it is asked for, as they have needs of their own."""


def engine(name: EngineName) -> Engine:
    """The engine of this name.

    Raises:
        NotFound: a package that it needs isn't installed.
    """
    try:
        return cast(Engine, import_module(ENGINES[name]).run)
    except ModuleNotFoundError as missing:
        extra = "simulate-ray" if name == "ray" else "simulate"
        raise NotFound(f"the engine {name!r} needs {missing.name}: pip install 'umbel[{extra}]'") from missing
