"""Programs speak on whatever streams they were started with: closed ones, full ones, ones without all letters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from umbel.version import VERSION

BIN = Path(sys.executable).parent
PROGRAMS = {
    "umbel": ["-c", "from umbel_server.cli import main; main()", "init", "--name", "localhost", "made ü", "--json"],
    "umbel-device": ["-m", "umbel_client.cli", "--home", "home ü", "examples", "stats", "--json"],
    "umbel-simulate": ["-c", "from umbel_simulations.cli import main; main()", "list", "--json"],
}


each_program = pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=name, marks=[pytest.mark.slow] if name in ("umbel", "umbel-simulate") else [])
        for name, words in PROGRAMS.items()
    ],
)


@each_program
def test_standard_output_without_all_letters_is_enough(tmp_path: Path, words: list[str]) -> None:
    done = _run(tmp_path, words, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


def test_signs_that_are_not_there_come_out_plainly_and_json_loses_no_letter(tmp_path: Path) -> None:
    code = (
        "from umbel_server.cli.output import console; from umbel.program import take_streams\n"
        "from umbel_models.printing import show\n"
        "take_streams(); console().print('≥ 0.5 – ü'); show({'name': 'ü'}, as_json=True)"
    )
    table, _, tree = _run(tmp_path, ["-c", code], PYTHONIOENCODING="ascii").stdout.partition("\n")
    assert (table, json.loads(tree)) == (">= 0.5 - ?", {"name": "ü"})


@each_program
def test_what_nobody_reads_is_not_told_as_done(tmp_path: Path, words: list[str]) -> None:
    """`umbel-simulate go-no-go … | head` must not say go."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nobody:
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, stdout=nobody, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, "")


@each_program
def test_closed_streams_stop_nothing(tmp_path: Path, words: list[str]) -> None:
    shell = f'exec "$0" "$@" <&- >&- 2>"{tmp_path}/told"'
    done = subprocess.run(["/bin/sh", "-c", shell, sys.executable, *words], cwd=tmp_path, check=False)
    assert (done.returncode, (tmp_path / "told").read_text()) == (0, "")


def test_what_is_opened_next_never_becomes_a_closed_stream(tmp_path: Path) -> None:
    """SQLite's file would be standard error, and a warning would go into it."""
    code = (
        "import os; from umbel.program import take_streams; take_streams(); "
        "found = os.open('file', os.O_CREAT | os.O_RDWR); os.write(2, b'spoilt'); os.write(found, str(found).encode())"
    )
    shell = 'exec "$0" "$@" <&- >&- 2>&-'
    subprocess.run(["/bin/sh", "-c", shell, sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert int((tmp_path / "file").read_text()) > 2


def _run(folder: Path, words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder, env=os.environ | environment, capture_output=True, text=True, encoding="utf-8", check=False,
    )  # fmt: skip


@pytest.mark.parametrize("program", ["umbel", "umbel-compile", "umbel-device", "umbel-simulate"])
def test_each_program_tells_its_version(program: str) -> None:
    done = subprocess.run([BIN / program, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{program} {VERSION}\n", "")
