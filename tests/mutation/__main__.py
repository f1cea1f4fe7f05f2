"""`python -m tests.mutation [private|releases|serving]`: takes each guard out, one at a time, in a copy of the code,
and runs the tests that have to notice.

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Final

from tests.mutation import access, guards, releases, rollouts, serving
from tests.mutation.guards import Mutant

ROOT: Final = Path(__file__).parents[2]
TREES: Final = ("protos", "models", "client", "server", "simulations", "tests", "pyproject.toml")
PROOFS: Final = {
    "private": "import umbel.cohort_sum, umbel_client.private, umbel_server.helper.service, "
    "umbel_server.secure_aggregation",
    "releases": "import umbel_client.device, umbel_client.tuf_files, umbel_server.app",
    "serving": "import umbel_server.app, umbel_server.serving.rest",
}
"""That a mutant still is a program."""
LISTS: Final = {
    "private": guards.GUARDS,
    "releases": (*releases.GUARDS, *rollouts.GUARDS, *access.GUARDS),
    "serving": serving.GUARDS,
}
SECONDS: Final = 600.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("list", nargs="?", choices=sorted(LISTS), default="private")
    parser.add_argument("--only", default="", help="guards whose name, or file, contains this")
    parser.add_argument("--workers", type=int, default=2, help="how many at a time, each in a copy of its own")
    chosen = parser.parse_args()
    wanted = [mutant for mutant in LISTS[chosen.list] if chosen.only in f"{mutant.name} {mutant.file}"]
    with tempfile.TemporaryDirectory(prefix="umbel-mutant-") as folder, ThreadPoolExecutor(chosen.workers) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for worker in range(chosen.workers):
            copies.put(_copied(Path(folder, str(worker))))
        for tests, code in pool.map(partial(_unharmed, copies), dict.fromkeys(mutant.tests for mutant in wanted)):
            if code:
                print(f"{' '.join(tests)} fail with no guard taken out (pytest ended with {code}): nothing was shown")
                return 1
        kept = 0
        for mutant, outcome in pool.map(partial(_judged, copies, PROOFS[chosen.list]), wanted):
            kept += outcome == "killed"
            if outcome != "killed":
                print(f"  {outcome}: {mutant.name} ({mutant.file})", flush=True)
    print(f"{kept} of {len(wanted)} guards are kept by a test")
    return 0 if kept == len(wanted) else 1


@contextmanager
def _taken(copies: SimpleQueue[Path]) -> Iterator[Path]:
    copy = copies.get()
    try:
        yield copy
    finally:
        copies.put(copy)


def _unharmed(copies: SimpleQueue[Path], tests: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    with _taken(copies) as copy:
        return tests, _tested(copy, tests)


def _judged(copies: SimpleQueue[Path], proof: str, mutant: Mutant) -> tuple[Mutant, str]:
    with _taken(copies) as copy:
        return mutant, _judge(copy, mutant, proof)


def _copied(to: Path) -> Path:
    to.mkdir()
    for tree in TREES:
        source = ROOT / tree
        if source.is_dir():
            shutil.copytree(source, to / tree, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, to / tree)
    return to


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
