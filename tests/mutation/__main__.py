"""`python -m tests.mutation [private|releases]`: takes each guard out, one at a time, in a copy of the code, and runs
the tests that have to notice.

A mutant is killed when a test fails on an assertion or on the wrong error; a mutant that can't even be imported, or
whose tests can't be collected, proves nothing and counts as broken. Nor does a failure prove anything that is there
anyhow: so all tests run first with no guard taken out. Exits with 1 if any guard survives or is broken.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.mutation import access, guards, releases, rollouts
from tests.mutation.guards import Mutant

ROOT: Final = Path(__file__).parents[2]
TREES: Final = ("protos", "models", "client", "server", "simulations", "tests", "pyproject.toml")
PROOFS: Final = {
    "private": "import umbel.cohort_sum, umbel_client.private, umbel_server.helper.service, "
    "umbel_server.secure_aggregation",
    "releases": "import umbel_client.device, umbel_client.tuf_files, umbel_server.app",
}
"""That a mutant still is a program."""
LISTS: Final = {"private": guards.GUARDS, "releases": (*releases.GUARDS, *rollouts.GUARDS, *access.GUARDS)}
SECONDS: Final = 600.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("list", nargs="?", choices=sorted(LISTS), default="private")
    parser.add_argument("--only", default="", help="guards whose name, or file, contains this")
    chosen = parser.parse_args()
    wanted = [mutant for mutant in LISTS[chosen.list] if chosen.only in f"{mutant.name} {mutant.file}"]
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="umbel-mutant-") as folder:
        copy = Path(folder)
        _copy(copy)
        for tests in dict.fromkeys(mutant.tests for mutant in wanted):
            if code := _tested(copy, tests):
                print(f"{' '.join(tests)} fail with no guard taken out (pytest ended with {code}): nothing was shown")
                return 1
        for mutant in wanted:
            outcome = _judge(copy, mutant, PROOFS[chosen.list])
            if outcome != "killed":
                outcomes[mutant] = outcome
                print(f"  {outcome}: {mutant.name} ({mutant.file})", flush=True)
    print(f"{len(wanted) - len(outcomes)} of {len(wanted)} guards are kept by a test")
    return 1 if outcomes else 0


def _copy(to: Path) -> None:
    for tree in TREES:
        source = ROOT / tree
        if source.is_dir():
            shutil.copytree(source, to / tree, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / tree)


def _judge(copy: Path, mutant: Mutant, proof: str) -> str:
    target = copy / mutant.file
    text = target.read_text("utf-8")
    # A second may be too short for the bytecode's date to tell.
    compiled = Path(importlib.util.cache_from_source(str(target)))
    if text.count(mutant.before) != 1:
        return f"broken ({text.count(mutant.before)} times there)"
    try:
        target.write_text(text.replace(mutant.before, mutant.after), "utf-8")
        compiled.unlink(missing_ok=True)
        if _run(copy, "-c", proof):
            return "broken (doesn't import)"
        code = _tested(copy, mutant.tests)
    except subprocess.TimeoutExpired:
        return "broken (its tests don't end)"
    finally:
        target.write_text(text, "utf-8")
        compiled.unlink(missing_ok=True)
    return {0: "survived", 1: "killed"}.get(code, f"broken (pytest ended with {code})")


def _tested(copy: Path, tests: tuple[str, ...]) -> int:
    return _run(copy, "-m", "pytest", *tests, "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow")


def _run(copy: Path, *arguments: str) -> int:
    paths = os.pathsep.join(str(copy / tree) for tree in ("protos", "models", "client", "server", "simulations"))
    environment = os.environ | {"PYTHONPATH": f"{paths}{os.pathsep}{copy}"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, timeout=SECONDS, check=False
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
