"""`make protos`, after an edit: Python from the protos, as the build of the package makes it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = Path("protos/umbel/v1")


def test_generating_by_hand_writes_what_the_build_wrote(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir(parents=True)
    for path in [ROOT / "hatch_build.py", *(ROOT / FOLDER).glob("*.proto")]:
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    subprocess.run([sys.executable, tmp_path / "hatch_build.py"], check=True, capture_output=True)
    for made in (tmp_path / FOLDER).glob("*_pb2*"):
        assert made.read_text() == (ROOT / FOLDER / made.name).read_text()
    assert len(list((tmp_path / FOLDER).glob("*_pb2.py"))) == len(list((ROOT / FOLDER).glob("*.proto")))
