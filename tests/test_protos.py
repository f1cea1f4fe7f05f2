"""`make protos`, after an edit: Python from the protos, as the build of the package makes it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROTOS = sorted(path.relative_to(ROOT) for path in ROOT.glob("protos/umbel/*/*.proto"))


def test_generating_by_hand_writes_what_the_build_wrote(tmp_path: Path) -> None:
    for path in [Path("hatch_build.py"), *PROTOS]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    subprocess.run([sys.executable, tmp_path / "hatch_build.py"], check=True, capture_output=True)
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2*")]
    assert all((tmp_path / path).read_text() == (ROOT / path).read_text() for path in made)
    assert {path.parent / f"{path.stem}_pb2.py" for path in PROTOS} <= set(made)
