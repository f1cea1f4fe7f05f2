"""The operator of the demo: the verbs of `umbel`, each as a command of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from umbel.helper_card import HelperCard
from umbel_simulations.demo.programs import ProgramFailed

UMBEL = [sys.executable, "-c", "from umbel_server.cli import main; main()"]


class Operator:
    """Calls `umbel` on one coordinator's folder and reads its JSON; as the first admin, or with another identity."""

    def __init__(self, state: Path, identity: Path | None = None) -> None:
        self.state = state
        self._identity = ["--identity", str(identity)] if identity else []

    @property
    def release_key(self) -> Path:
        """What a helper's operator is given."""
        return self.state / "release.pub"

    def init(self) -> None:
        """Make the coordinator's folder."""
        _run(["init", str(self.state), "--name", "127.0.0.1", "--json"])

    def call(self, *verb: str) -> Any:
        """One verb, such as `call("models", "list")`; returns what it printed.

        Raises:
            ProgramFailed: it was refused; the message is the coordinator's own.
        """
        return json.loads(_run([*verb, "--state", str(self.state), *self._identity, "--json"]))


class HelperOperator:
    """Runs the helper. In the demo it is the same party as the other one, which the product calls development trust."""

    def __init__(self, state: Path) -> None:
        self.state = state

    @property
    def card(self) -> Path:
        """What coordinator and devices are given."""
        return self.state / "card.json"

    def init(self, leader: Path, minimum_cohort: int) -> None:
        """Make the helper's folder."""
        chosen = ["--leader", f"@{leader}", "--address", "127.0.0.1:0", "--minimum-cohort", str(minimum_cohort)]
        _run(["helper", "init", str(self.state), *chosen, "--json"])

    def listens(self) -> bool:
        """Whether the helper has written into its card where it listens."""
        return HelperCard.from_text(self.card.read_bytes()).address.rpartition(":")[2] != "0"

    def tokens(self, population: str, count: int) -> list[str]:
        """Tokens that let devices take part."""
        asked = ["helper", "tokens", "--state", str(self.state), "--population", population, "--count", str(count)]
        made: list[str] = json.loads(_run([*asked, "--json"]))["tokens"]
        return made


def _run(arguments: list[str]) -> str:
    done = subprocess.run([*UMBEL, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise ProgramFailed(f"umbel {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
