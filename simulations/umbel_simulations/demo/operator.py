"""The operator of the demo: the verbs of `umbel`, each as a command of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from umbel_simulations.demo.programs import ProgramFailed

UMBEL = [sys.executable, "-c", "from umbel_server.cli import main; main()"]


class Operator:
    """Calls `umbel` on one coordinator's folder and reads its JSON; as the first admin, or with another identity."""

    def __init__(self, state: Path, identity: Path | None = None) -> None:
        self.state = state
        self._identity = ["--identity", str(identity)] if identity else []

    def init(self) -> None:
        """Make the coordinator's folder."""
        _run(["init", str(self.state), "--name", "127.0.0.1", "--json"])

    def call(self, *verb: str) -> Any:
        """One verb, such as `call("models", "list")`; returns what it printed.

        Raises:
            ProgramFailed: it was refused; the message is the coordinator's own.
        """
        return json.loads(_run([*verb, "--state", str(self.state), *self._identity, "--json"]))


def _run(arguments: list[str]) -> str:
    done = subprocess.run([*UMBEL, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise ProgramFailed(f"umbel {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
