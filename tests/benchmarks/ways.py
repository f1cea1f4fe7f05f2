"""Ways to simulate as child processes: an environment for each where it needs one, and rounds in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.benchmarks.harness import ROOT

BASELINES = Path(__file__).parent / "baselines"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the rounds."""

    title: str
    program: str
    """A file beside `turns.py`, or a module of ours."""
    arguments: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    """What its own environment holds; without any, this one's Python runs it."""
    rounds: int = 20
    """In one turn."""


@dataclass(slots=True)
class Measured:
    """What a way showed."""

    way: Way
    start_seconds: float
    start_cpu: float
    """Processor seconds of the start, imports included."""
    clients_per_second: list[float] = field(default_factory=list)
    cpu_per_client: list[float] = field(default_factory=list)
    accuracy: float = 0.0

    @property
    def speed(self) -> float:
        return median(self.clients_per_second)

    @property
    def cpu(self) -> float:
        """Processor seconds a client, of all threads together."""
        return median(self.cpu_per_client)


class NotInstalled(Exception):
    """A framework can't be installed here."""


def environment(way: Way, cache: Path) -> str:
    """The Python of a way, installed into the cache when it is first asked for."""
    if not way.packages:
        return sys.executable
    folder = cache / Path(way.program).stem
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(way.packages)
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"installing {', '.join(way.packages)} into {folder} ...", file=sys.stderr, flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [str(python), "-m", "pip", "install", "--quiet", *way.packages],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise NotInstalled(f"{way.title}: {done.stderr.strip().splitlines()[-1] if done.stderr else 'failed'}")
        stamp.write_text(wanted)
    return str(python)


class Child:
    """A way that runs, and waits for its turns."""

    def __init__(self, way: Way, data: Path, cache: Path) -> None:
        python = environment(way, cache)
        target = ["-m", way.program] if not way.program.endswith(".py") else [str(BASELINES / way.program)]
        self._process = subprocess.Popen(
            [python, *target, str(data), *way.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env=_plain(os.environ) if way.packages else _with_tests(os.environ),
        )
        began = self._answer()
        self.measured = Measured(way, began["start_seconds"], began["start_cpu"])

    def turn(self, rounds: int, cohort: int, *, counts: bool = True) -> None:
        """Let it run some rounds; those that warm it up don't count."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{rounds}\n")
        self._process.stdin.flush()
        answer = self._answer()
        if counts:
            self.measured.clients_per_second.append(rounds * cohort / answer["seconds"])
            self.measured.cpu_per_client.append(answer["cpu"] / rounds / cohort)
            self.measured.accuracy = answer["accuracy"]

    def end(self) -> None:
        self._process.communicate("\n", timeout=60)

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, float] = json.loads(line)
                return found
        raise NotInstalled(f"{self._process.args!r} ended with {self._process.wait()} and no answer")


def _plain(environ: os._Environ[str]) -> dict[str, str]:
    """Without what would bring this environment's packages into another."""
    return {name: value for name, value in environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def _with_tests(environ: os._Environ[str]) -> dict[str, str]:
    """With this repository's tests to be imported."""
    return {**environ, "PYTHONPATH": os.pathsep.join([str(ROOT), environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
