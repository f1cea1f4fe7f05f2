"""Cohorts trained by several processes, this one among them, for models whose steps are short.

    parts of a cohort --part i to process i mod n--> what each comes to --in the order of the parts--> their sum

The calls of a small model take about as long as the Python between them, which one thread of a process runs at a time:
there a second thread brings next to nothing, and a second process does. Parts and their order are those of the pool of
threads, so the sum is the same, to the bit. What it takes to start a process, about as long as training a few thousand
such clients, is paid beside the first rounds: threads train these.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Final

from umbel.errors import UmbelError, Unavailable
from umbel_client.examples import NONE
from umbel_server.flower.spec import needs_singles
from umbel_simulations.cohort import teammate
from umbel_simulations.cohort.algorithm import Stage
from umbel_simulations.cohort.clients import Start
from umbel_simulations.cohort.mapped import lay_out
from umbel_simulations.cohort.rounds import Call, Cohort, in_parts, part_of, parts_of, train
from umbel_simulations.cohort.teammate import Answer, Duty, Request
from umbel_simulations.data import ClientData

_WORTH: Final = 100_000
"""How many steps of clients a run must be: 784-64-10 takes eight seconds for these, and wins two."""
_MOST_BYTES: Final = 4 << 30
"""How large the file may be in which processes share their examples."""
_PATIENCE: Final = 10.0
"""Seconds until a process that has closed its connection is over, at most."""


def others_worth(stage: Stage, workers: int) -> int:
    """How many processes beside this one pay for a run: none for a short one, or where threads do as well."""
    together, task = stage.backend.together, stage.task
    if together == 1 or workers == 1 or os.name != "posix" or not sys.executable or needs_singles(task.strategy):
        return 0
    count = min(task.goal, len(stage.clients))
    steps = task.rounds * count * sum(map(stage.steps, stage.clients)) / max(1, len(stage.clients))
    if steps < _WORTH or sum(_bytes_of(client) for client in stage.clients) > _MOST_BYTES:
        return 0
    return min(workers, len(in_parts(range(count), together))) - 1


@contextmanager
def team(stage: Stage, others: int, folder: Path) -> Iterator[Team]:
    """A team, as long as it is needed.

    Args:
        stage: whose clients it trains; its back end is ONNX Runtime.
        others: how many processes beside this one.
        folder: where a file may lie that is as large as all examples.

    Raises:
        OSError: a process can't be started, or there is no room for the file.
    """
    found = Team(stage)
    try:
        if others:
            found.grow(others, folder)
        yield found
    finally:
        found.let_go()


class Team:
    """This process, and others that train beside it once they are ready.

    Args:
        stage: whose clients it trains.
    """

    def __init__(self, stage: Stage) -> None:
        self._pool, self._bundle, self._clients = stage.pool, stage.setting.bundle, stage.clients
        self._places = {client.name: at for at, client in enumerate(stage.clients)}
        self._others: list[_Other] = []

    def grow(self, others: int, folder: Path) -> None:
        """Start so many processes, and don't wait for them; raises `OSError` as `team`."""
        clients = tuple(replace(client, held_back=NONE) for client in self._clients)
        # Without a name: a killed run leaves nothing. Whoever has it open keeps it.
        with tempfile.TemporaryFile(dir=folder) as file:
            lay_out(Duty(self._bundle, clients), file)
            for number in range(1, others + 1):
                self._others.append(_Other(file, number, others + 1))

    def is_ready(self, timeout: float = 0.0) -> bool:
        """Whether all processes are there, after some seconds at most for each; raises `Unavailable` if one ended."""
        return bool(self._others) and all(other.is_ready(timeout) for other in self._others)

    def train(self, cohort: Sequence[ClientData], call: Call, start: Start, *, wants_singles: bool) -> Cohort:
        """Train a cohort; see `Trains`.

        Raises:
            Unavailable: a process ended on the way.
            UmbelError: as `rounds.train`.
        """
        # Single updates of a whole cohort would take longer to carry than to train.
        if wants_singles or not self.is_ready():
            return train(self._pool, cohort, call, start, wants_singles=wants_singles)
        parts = parts_of(cohort, call, self._pool.together)
        collected = Cohort(start)
        try:
            for part in self._trained(parts, call, start):
                collected.take_part(part)
        except BaseException:
            # Answers that nobody waits for any more would be taken for the next ones.
            self.let_go()
            raise
        return collected

    def _trained(self, parts: Sequence[Sequence[ClientData]], call: Call, start: Start) -> Iterator[Cohort]:
        """What each part comes to, in their order."""
        places = [[self._places[client.name] for client in part] for part in parts]
        for other in self._others:
            other.ask(Request(call, start.weights, places))
        own, count = list[Cohort](), len(self._others) + 1
        self._pool.alone(
            parts[::count],
            lambda worker, part: part_of(worker, [call.share(client) for client in part], start),
            lambda _part, done: own.append(done),
        )
        found = [own, *(other.answer() for other in self._others)]
        return (found[at % count][at // count] for at in range(len(parts)))

    def let_go(self) -> None:
        """End all processes."""
        for other in self._others:
            other.end()
        self._others.clear()


class _Other:
    """One process beside this one."""

    def __init__(self, file: IO[bytes], number: int, count: int) -> None:
        self._is_ready = False
        self._connection, theirs = multiprocessing.Pipe()
        with theirs:
            files = theirs.fileno(), file.fileno()
            start = f"from {teammate.__name__} import main; main()"
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [sys.executable, "-c", start, *map(str, (*files, number, count))],
                pass_fds=files,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Whoever presses Ctrl-C means the parent, which then lets it go.
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(place or str(Path.cwd()) for place in sys.path)},
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_ready(self, timeout: float) -> bool:
        if not self._is_ready and self._connection.poll(timeout):
            self._received()
            self._is_ready = True
        return self._is_ready

    def ask(self, request: Request) -> None:
        try:
            self._connection.send(request)
        except ConnectionError:
            raise self._lost() from None

    def answer(self) -> list[Cohort]:
        found = self._received()
        if isinstance(found, UmbelError):
            raise found
        return found or []

    def end(self) -> None:
        """At once: it has nothing to put away."""
        self._process.kill()
        self._process.wait()
        self._connection.close()

    def _received(self) -> Answer | None:
        try:
            found: Answer | None = self._connection.recv()
        except (EOFError, ConnectionError):
            raise self._lost() from None
        return found

    def _lost(self) -> Unavailable:
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            how = "no longer answers"
        else:
            how = f"was killed by signal {-code}, perhaps for want of memory" if code < 0 else f"ended with {code}"
        return Unavailable(
            f"process {self.pid} of this run, which trained beside it, {how}; run the same again to go on "
            "from the last checkpoint, with --workers 1 if need be"
        )


def _bytes_of(client: ClientData) -> int:
    arrays = (*client.training.inputs.values(), *client.training.targets.values())
    return sum(array.nbytes for array in arrays)
