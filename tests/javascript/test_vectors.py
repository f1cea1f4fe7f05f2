"""JavaScript comes to the bytes of `tests/vectors`, refuses the bad ones, and does what plans say."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.javascript.devices import CHECKOUT, scripts

pytestmark = pytest.mark.slow  # npm fetches packages for it, and the quick tests need pip alone


def passed(folder: Path, name: str) -> int:
    """How many tests of a file pass; all have to."""
    command = ["node", "--test", "--test-reporter=tap", str(scripts(folder / "scripts") / name)]
    environment = os.environ | {"UMBEL": str(CHECKOUT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout
    return int(next(line for line in done.stdout.splitlines() if line.startswith("# pass ")).split()[-1])


def test_javascript_reads_and_makes_the_golden_bytes(tmp_path: Path) -> None:
    assert passed(tmp_path, "vectors.test.mjs") >= 90


def test_javascript_uses_nothing_that_it_has_not_checked(tmp_path: Path) -> None:
    assert passed(tmp_path, "shelf.test.mjs") >= 10


def test_javascript_trains_as_a_plan_says(tmp_path: Path) -> None:
    assert passed(tmp_path, "training.test.mjs") >= 8
