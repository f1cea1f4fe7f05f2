"""Run somebody's Flower `ServerApp`, as it is, over the devices of a driven task.

It runs in a thread of the coordinator's process while the coordinator goes on serving, and what it makes it keeps
itself: it writes its result where its author wants it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Protocol

import structlog

from umbel.errors import BadInput, NotFound, UmbelError
from umbel.plan import Plan
from umbel_server.flower.grid import CohortPort, DeviceGrid
from umbel_server.flower.port import CoordinatorPort

# isort: split
from flwr.app import Context, RecordDict
from flwr.serverapp import ServerApp

Config = Mapping[str, bool | float | int | str]
_log = structlog.get_logger(__name__)


class PlannedPort(CohortPort, Protocol):
    """Where a program finds devices, and what they run unless it says otherwise."""

    @property
    def plan(self) -> Plan:
        """The task's own plan."""


@dataclass(frozen=True, slots=True)
class Program:
    """A program, and what it is run with."""

    app: ServerApp
    task: str
    """A task that was created with `driven = true`."""
    config: Config = field(default_factory=dict)
    """Flower's `run_config`."""

    def run(self, port: PlannedPort) -> None:
        """Run it to its end; raises what it raises."""
        grid = DeviceGrid(port, port.plan)
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(self.config))
        try:
            self.app(grid, context)
        finally:
            grid.close()

    def start(self, port: CoordinatorPort) -> Thread:
        """Run it in a thread of its own; what it raises is logged, and the coordinator goes on."""
        thread = Thread(target=self._run_and_tell, args=(port,), name="umbel-program", daemon=True)
        thread.start()
        return thread

    def _run_and_tell(self, port: CoordinatorPort) -> None:
        try:
            self.run(port)
        except UmbelError as error:
            _log.error("the program failed", task=self.task, code=error.code, error=str(error))
        except Exception:  # noqa: BLE001 - somebody else's code; the coordinator goes on
            _log.exception("the program failed", task=self.task)
        else:
            _log.info("the program has ended", task=self.task)


def load_app(name: str) -> ServerApp:
    """A `ServerApp` by `module:attribute`; the module may lie in the folder that this process was started in.

    Raises:
        BadInput: not a name of that form, or what it names is no `ServerApp`.
        NotFound: no such module or attribute.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise BadInput(f"{name!r} names no app; write module:attribute, such as my_app.server:app")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise NotFound(f"can't load {name!r} ({error}); start from the folder it lies in, or install it") from error
    if not isinstance(found, ServerApp):
        raise BadInput(f"{name!r} is a {type(found).__name__}, not a flwr ServerApp")
    return found
