"""Child processes that end when the demo ends, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from umbel.errors import UmbelError

GRACE_SECONDS: Final = 8.0


class ProgramFailed(UmbelError):
    """A program of the demo ended before its time."""

    code = "program-failed"


class Programs:
    """Programs started in the background, each with a log file of its own; a context that stops them all."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Programs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a program; what it prints goes to `<logs>/<name>.log`."""
        with self._log(name).open("ab") as log:
            # A session of its own, so that Ctrl-C reaches the demo alone and programs are stopped in order.
            self._running[name] = subprocess.Popen(  # noqa: S603  (our own commands)
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=_one_thread()
            )

    def finished(self, name: str) -> bool:
        """Whether a program has ended well.

        Raises:
            ProgramFailed: it ended with another exit code than 0.
        """
        code = self._running[name].poll()
        if code:
            raise ProgramFailed(f"{name} ended with exit code {code}; its last words, from {self._log(name)}:\n"
                                + self._last_words(name))  # fmt: skip
        return code == 0

    def all_well(self) -> None:
        """Make sure that no program has failed.

        Raises:
            ProgramFailed: one ended with another exit code than 0.
        """
        for name in self._running:
            self.finished(name)

    def stop(self) -> None:
        """Ask every program to end, wait a while, and end those that don't."""
        alive = [process for process in self._running.values() if process.poll() is None]
        for process in alive:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        for process in alive:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)
                process.wait()

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _last_words(self, name: str) -> str:
        return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-12:])


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return  # it ended by itself in between


def _one_thread() -> dict[str, str]:
    # Twenty processes share a few cores: a pool of threads in each would only fight the others.
    return os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
