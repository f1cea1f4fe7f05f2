"""A benchmark that doesn't run measures nothing: the quick ones are run here, without judging any time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.device import HEAVY
from tests.benchmarks.harness import ROOT, Table


def test_chosen_benchmarks_print_tables_and_write_json(tmp_path: Path) -> None:
    written = tmp_path / "build" / "bench.json"
    command = [sys.executable, "-m", "tests.benchmarks", "device", "--json", str(written)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Memory of a device's process" in done.stdout
    found = json.loads(written.read_text())["benchmarks"]
    assert list(found) == ["device"]
    assert found["device"]["ratios"][HEAVY] == 0


def test_an_unknown_benchmark_is_answered_with_the_known_ones() -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "speed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "aggregation" in done.stderr


def test_a_table_says_which_aims_were_met() -> None:
    table = Table("t", ("way", "s"), [("a", 1.0)], {"low": 1.0, "high": 1.0}, {"low": ("<=", 2.0), "high": (">=", 2.0)})
    assert (table.met("low"), table.met("high")) == (True, False)
    assert "met" in str(table)
    assert "MISSED" in str(table)
