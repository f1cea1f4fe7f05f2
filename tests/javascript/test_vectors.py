"""JavaScript comes to the bytes of `tests/vectors`, and refuses the bad ones."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.javascript.devices import CHECKOUT, scripts


def test_javascript_reads_and_makes_the_golden_bytes(tmp_path: Path) -> None:
    folder = scripts(tmp_path / "scripts")
    command = ["node", "--test", "--test-reporter=tap", str(folder / "vectors.test.mjs")]
    environment = os.environ | {"UMBEL": str(CHECKOUT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout
    passed = next(line for line in done.stdout.splitlines() if line.startswith("# pass "))
    assert int(passed.split()[-1]) >= 80
