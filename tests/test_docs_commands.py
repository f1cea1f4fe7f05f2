"""What README and tutorials tell a reader to type works as they say; the conventions stand in CONTRIBUTING.md."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.docs_runner import SLOW, Command, PageFailed, commands, run

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOW_TO = [DOCS / "how-to" / f"{name}.md" for name in ("plan-a-launch", "ask-over-the-network")]
PAGES = [ROOT / "README.md", *sorted((DOCS / "tutorials").glob("*.md")), *HOW_TO]


def page(path: Path) -> object:
    marks = [pytest.mark.slow] if SLOW in path.read_text("utf-8") else []
    return pytest.param(path, id=str(path.relative_to(ROOT)), marks=marks)


@pytest.mark.parametrize("path", [page(path) for path in PAGES])
def test_every_command_of_a_page_does_what_the_page_says(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    folder.mkdir()
    run(path.read_text("utf-8"), folder, timeout=600)


# The runner itself: a page that lies must not pass.


def fenced(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```", ""])


def test_a_session_lasts_from_block_to_block(tmp_path: Path) -> None:
    text = fenced("console", "$ mkdir sub && cd sub", "$ WORD=seed") + fenced("bash", 'test "$WORD" = seed', "touch x")
    run(text, tmp_path, timeout=20)
    assert (tmp_path / "sub" / "x").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (fenced("console", "$ true", "$ exit 3"), "exit code 3"),
        (fenced("bash", "false", "true"), "exit code 1"),
        (fenced("console", "$ false | true"), "exit code 1"),
        (fenced("console", "$ echo one", "two"), "the page shows 'two'"),
        (fenced("console", "$ printf 'a\\nb\\n'", "b", "a"), "the page shows 'a'"),
        (fenced("console", "output alone"), "output before any"),
        (fenced("", "$ echo of no language"), "name the language"),
        ("<!-- not run -->\n" + fenced("console", "$ false"), "say why"),
    ],
)
def test_a_page_that_lies_fails(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(PageFailed, match=says):
        run(text, tmp_path, timeout=20)


def test_a_command_that_hangs_fails_and_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(PageFailed, match="took too long"):
        run(fenced("console", "$ sleep 1234.5"), tmp_path, timeout=0.5)
    assert "1234.5" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_output_may_be_shown_in_part(tmp_path: Path) -> None:
    run(fenced("console", "$ seq 1 30 && echo took 12 seconds", "7", "...", "took ... seconds"), tmp_path, timeout=20)


def test_a_file_that_the_reader_saves_is_saved(tmp_path: Path) -> None:
    text = "<!-- file: code/say.py -->\n\n" + fenced("python", "print('it''s', \"here\", '$HOME')")
    run(text + fenced("console", "$ python code/say.py", "its here $HOME"), tmp_path, timeout=20)


def test_what_runs_in_another_terminal_is_waited_for_and_ends_with_the_page(tmp_path: Path) -> None:
    server = "<!-- another terminal -->\n" + fenced("console", "$ sleep 0.3; touch ready; sleep 4321.5")
    reader = "<!-- wait for: test -f ready -->\n" + fenced("console", "$ ls", "ready")
    run(server + reader, tmp_path, timeout=20)
    assert "4321.5" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_a_comment_speaks_for_the_next_block_alone(tmp_path: Path) -> None:
    text = "<!-- not run: it needs a phone -->\n" + fenced("console", "$ false") + fenced("console", "$ touch run")
    run(text, tmp_path, timeout=20)
    assert (tmp_path / "run").exists()


def test_a_comment_with_prose_between_speaks_for_nothing() -> None:
    text = "<!-- not run: old -->\nBut then:\n" + fenced("console", "$ echo a \\", "> b", "a b")
    assert list(commands(text)) == [Command(4, "echo a \\\nb", ("a b",))]


def test_the_reader_starts_with_an_empty_home(tmp_path: Path) -> None:
    run(fenced("console", '$ test "$HOME" = "$PWD"', "$ python -c 'import umbel'"), tmp_path, timeout=20)
