"""One process at a time: who holds a folder or a file holds it alone, and lets go at the end."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from umbel.errors import WrongState
from umbel.holding import alone_in, alone_with, held


def is_free(path: Path) -> bool:
    """Whether another opening of a file could be locked now, as another process's would be."""
    with path.open("rb") as other:
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_folder_is_held_by_one_alone(tmp_path: Path) -> None:
    for hold in (alone_in(tmp_path), held(tmp_path, "in use")):
        with hold, pytest.raises(WrongState, match="in use"), held(tmp_path, "in use"):
            pass
    with held(tmp_path, "in use"):
        pass


def test_a_file_is_held_by_one_alone_also_once_another_took_its_place(tmp_path: Path) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    file.touch()
    other.touch()
    with alone_with(file):
        assert not is_free(file)
    assert is_free(file)
    with alone_with(file):
        other.replace(file)
        assert is_free(file), "who comes now holds the new one"


def test_a_system_without_fcntl_is_told_so() -> None:
    code = "import sys; sys.modules['fcntl'] = None; from umbel_client import Device"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ImportError: Umbel locks its folders by fcntl, which this system lacks" in ended.stderr
