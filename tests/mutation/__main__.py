"""`python -m tests.mutation`: for each guard, a copy of the code without it, and the private tests on that copy.

A mutant is killed when a test fails on an assertion or on the wrong error; a mutant that can't even be imported proves
nothing and counts as broken, and so does everything if the tests fail on the code as it is. Exits with 1 if any
survives or is broken.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.mutation.guards import GUARDS, Mutant

ROOT = Path(__file__).parents[2]
TREES = ("protos", "models", "client", "server", "simulations", "tests", "pyproject.toml")
UNCHANGED = Mutant("nothing taken out", "pyproject.toml", "[build-system]", "[build-system]")
PROOF = "import umbel.cohort_sum, umbel_client.private, umbel_server.helper.service, umbel_server.secure_aggregation"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--only", default="", help="guards whose name contains this")
    wanted = [mutant for mutant in GUARDS if parser.parse_args().only in mutant.name]
    if (whole := _judge(UNCHANGED)) != "survived":
        print(f"the tests fail on the code as it is ({whole}); nothing was shown")
        return 1
    outcomes = {}
    for mutant in wanted:
        if (outcome := _judge(mutant)) != "killed":
            outcomes[mutant.name] = outcome
            print(f"  {outcome}: {mutant.name}", flush=True)
    print(f"{len(wanted) - len(outcomes)} of {len(wanted)} guards are kept by a test")
    return 1 if outcomes else 0


def _judge(mutant: Mutant) -> str:
    with tempfile.TemporaryDirectory(prefix="umbel-mutant-") as folder:
        copy = Path(folder)
        for tree in TREES:
            source = ROOT / tree
            if source.is_dir():
                shutil.copytree(source, copy / tree, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / tree)
        target = copy / mutant.file
        text = target.read_text()
        if text.count(mutant.before) != 1:
            return f"broken ({text.count(mutant.before)} times in {mutant.file})"
        target.write_text(text.replace(mutant.before, mutant.after))
        if _run(copy, "-c", PROOF):
            return "broken (doesn't import)"
        tests = ("tests/private", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow")
        return "killed" if _run(copy, "-m", "pytest", *tests) == 1 else "survived"


def _run(copy: Path, *arguments: str) -> int:
    paths = os.pathsep.join(str(copy / tree) for tree in ("protos", "models", "client", "server", "simulations"))
    environment = os.environ | {"PYTHONPATH": f"{paths}{os.pathsep}{copy}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, timeout=600, check=False
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
