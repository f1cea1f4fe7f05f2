"""`make bench`: run the benchmarks, each with a table; `BENCH_ARGS="--json build/bench.json aggregation"` for some."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib import import_module
from pathlib import Path

from tests.benchmarks.harness import Table, seconds

NAMES = (
    "aggregation",
    "private",
    "private_memory",
    "predictor",
    "device",
    "large",
    "coordinator",
    "serving",
    "learning",
    "releases",
    "deltas",
    "drift",
)
BY_NAME_ONLY = ("abreast", "fleet", "mixed", "private_learning", "runtime", "simulation")
"""These take many minutes, or install other frameworks into environments of their own."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    known = f"which ones; all of them: {', '.join(NAMES)}; only by name: {', '.join(BY_NAME_ONLY)}"
    parser.add_argument("names", nargs="*", choices=[*NAMES, *BY_NAME_ONLY, []], help=known)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    chosen = parser.parse_args()
    print(f"{os.cpu_count()} cores\n", flush=True)
    found: dict[str, object] = {}
    for name in chosen.names or NAMES:
        tables: list[Table] = []
        spent = seconds(lambda name=name, tables=tables: tables.append(import_module(f"tests.benchmarks.{name}").run()))
        print(f"{tables[0]}  ({name}: {spent:.0f} s)\n", flush=True)
        found[name] = tables[0].to_tree()
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps({"cores": os.cpu_count(), "benchmarks": found}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
