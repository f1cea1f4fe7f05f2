"""CI's look at the demo's report lets a good one pass, and says what is wrong with any other."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent.parent / ".ci" / "check_demo.py"
GOOD: dict[str, Any] = {
    "rounds": [{"round": n, "accuracy": 0.8, "reports": 15, "seconds": 2.5} for n in range(1, 16)],
    "devices": [
        {"id": f"d{n}", "global_accuracy": 0.9, "personal_accuracy": 0.97, "peak_memory_mb": 95.0, "modules": []}
        for n in range(20)
    ],
    "global_accuracy": 0.9,
    "personal_accuracy": 0.97,
    "bytes_up": 1000,
    "bytes_down": 2000,
    "seconds": 60.0,
}


def check(report: object, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "report.json"
    path.write_text(json.dumps(report), "utf-8")
    return subprocess.run([sys.executable, str(SCRIPT), str(path)], capture_output=True, text=True, check=False)


def test_a_good_report_passes_and_is_told(tmp_path: Path) -> None:
    done = check(GOOD, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "15 rounds, 20 devices, global 0.900, personal 0.970" in done.stdout


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda r: r["rounds"].pop(), "14 rounds"),
        (lambda r: r["rounds"][3].update(round=3), "don't rise"),
        (lambda r: r["rounds"][3].update(reports=0), "makes no sense"),
        (lambda r: r["rounds"][3].update(accuracy=1.5), "makes no sense"),
        (lambda r: r["devices"].pop(), "19 devices"),
        (lambda r: r["devices"][0].update(id="d1"), "20 different ones"),
        (lambda r: r["devices"][7].update(peak_memory_mb=130.0), "d7 took 130 MB"),
        (lambda r: r["devices"][7].update(modules=["torch"]), "imported ['torch']"),
        (lambda r: r.update(global_accuracy=0.7), "global_accuracy is 0.700"),
        (lambda r: r.update(personal_accuracy=0.9), "personal_accuracy is 0.900"),
        (lambda r: r.update(personal_accuracy=float("nan")), "personal_accuracy is nan"),
        (lambda r: r["devices"][7].update(personal_accuracy=float("nan")), "of device d7 is nan"),
        (lambda r: r.update(bytes_up=0), "bytes_up is 0"),
        (lambda r: r.pop("seconds"), "form is not what was agreed"),
        (lambda r: r["devices"][0].pop("modules"), "form is not what was agreed"),
    ],
)
def test_what_was_promised_and_is_missing_is_named(
    spoil: Callable[[dict[str, Any]], object], says: str, tmp_path: Path
) -> None:
    report = copy.deepcopy(GOOD)
    spoil(report)
    done = check(report, tmp_path)
    assert done.returncode == 1
    assert says in done.stderr


def test_no_report_at_all_is_a_failure(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "none.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "did `make demo` finish?" in done.stderr
