"""Run the commands that a page of the docs shows, as a reader would type them: in order, in an empty folder.

A page is one shell session: `cd`, variables and background processes last from block to block. Fenced `console` blocks
hold `$ command` lines (a command goes on over lines that start with `> `) and, between them, lines of output that must
appear in this order; `...` stands for anything. Fenced `bash`, `sh` and `shell` blocks are scripts.

An HTML comment right before a block says how to treat it:

    <!-- not run: why -->          leave it out
    <!-- file: path -->            save the block (of any language) under this path
    <!-- another terminal -->      run it in the background until the page ends
    <!-- wait for: command -->     first try this until it succeeds, a minute at most
    <!-- slow page -->             anywhere: the page takes minutes; `make test` leaves it to `make test-all`
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SHELLS = ("bash", "sh", "shell")
SLOW = "<!-- slow page -->"
MARK = "\x1e"
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*).*$")
_DIRECTIVE = re.compile(r"^\s*<!-- (?P<word>not run|file|another terminal|wait for)(?:: (?P<rest>.+?))? -->\s*$")


class PageFailed(AssertionError):
    """A command of a page did not do what the page says."""


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block, with the comments that stand right before it."""

    line: int
    language: str
    text: str
    directives: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Command:
    """One command, and the lines of output that the page shows after it."""

    line: int
    script: str
    expected: tuple[str, ...] = ()


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = iter(enumerate(page.splitlines(), 1))
    directives: dict[str, str] = {}
    for number, line in lines:
        if found := _DIRECTIVE.match(line):
            directives[found["word"]] = found["rest"] or ""
        elif fence := _FENCE.match(line):
            inside = []
            for _, text in lines:
                if text.strip() == "```":
                    break
                inside.append(text.removeprefix(fence["indent"]))
            yield Block(number, fence["language"], "\n".join(inside) + "\n", directives)
            directives = {}
        elif line.strip():
            directives = {}


def console(block: Block) -> Iterator[Command]:
    """The commands of a `console` block."""
    script: list[str] = []
    expected: list[str] = []
    start = block.line
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if line.startswith("$ "):
            if script:
                yield Command(start, "\n".join(script), tuple(expected))
            start, script, expected = number, [line[2:]], []
        elif line.startswith("> ") and script and not expected:
            script.append(line[2:])
        elif line.strip() and not script:
            raise PageFailed(f"line {number}: output before any `$ command`: {line!r}")
        elif line.strip():
            expected.append(line.strip())
    if script:
        yield Command(start, "\n".join(script), tuple(expected))


def commands(page: str) -> Iterator[Command]:
    """Everything that a page wants run, in order.

    Raises:
        PageFailed: a block that looks like a command and can't be told to be one.
    """
    for block in blocks(page):
        yield from _commands_of(block)


def _commands_of(block: Block) -> Iterator[Command]:
    if "not run" in block.directives:
        if not block.directives["not run"]:
            raise PageFailed(f"line {block.line}: say why this block isn't run: <!-- not run: why -->")
        return
    if "file" in block.directives:
        yield Command(block.line, _save(Path(block.directives["file"]), block.text))
        return
    if block.language in SHELLS:
        found = [Command(block.line, block.text)]
    elif block.language == "console":
        found = list(console(block))
    elif re.search(r"^\$ ", block.text, re.MULTILINE):
        raise PageFailed(f"line {block.line}: name the language of this block of commands: ```console")
    else:
        return
    if "wait for" in block.directives:
        yield Command(block.line, _wait(block.directives["wait for"]))
    if "another terminal" in block.directives:
        yield Command(block.line, "{\n" + "\n".join(each.script for each in found) + "\n} &")
    else:
        yield from found


def _save(path: Path, text: str) -> str:
    parent = shlex.quote(str(path.parent))
    return f"mkdir -p {parent}\nprintf %s {shlex.quote(text)} >{shlex.quote(str(path))}"


def _wait(command: str) -> str:
    return f"SECONDS=0\nuntil ( {command} ) >/dev/null 2>&1; do [ $SECONDS -lt 60 ]; sleep 0.4; done"


def run(page: str, folder: Path, *, timeout: float) -> None:
    """Run a page's commands in `folder`; whatever it started is stopped at the end.

    Raises:
        PageFailed: a command failed, took too long, or its output lacks a line that the page shows.
    """
    found = list(commands(page))
    script = ["set -euo pipefail"]
    for index, command in enumerate(found):
        script += [f"printf '\\n{MARK}%d\\n' {index}", command.script]
    log = folder.parent / f"{folder.name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["bash", "-c", "\n".join(script)],
            cwd=folder,
            env=_environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop_all_of(process)
    _compare(found, log.read_text("utf-8", errors="replace"), code)


def _environment(folder: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("UMBEL_", "PYTEST_", "COV_"))}
    programs = str(Path(sys.executable).parent)
    ports = dict(zip((f"UMBEL_{port}_PORT" for port in ("DEVICE", "ENROL", "ADMIN")), _free_ports(3), strict=True))
    # Wide enough that no table is wrapped, and without colours: what a page shows.
    return (
        own
        | ports
        | {
            "HOME": str(folder),
            "PATH": os.pathsep.join([programs, os.environ["PATH"]]),
            "COLUMNS": "160",
            "NO_COLOR": "1",
            "PYTHONUNBUFFERED": "1",
        }
    )


def _free_ports(count: int) -> list[str]:
    """Ports for a page's coordinator, the same each time that it starts: another may hold the usual ones here."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


def _stop_all_of(process: subprocess.Popen[bytes]) -> None:
    """Ask the page's whole process group to end, and end what hasn't after five seconds."""
    group = [each for each in psutil.process_iter() if _group_of(each) == process.pid]
    for each in group:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.terminate()
    _, left = psutil.wait_procs(group, timeout=5)
    for each in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()


def _group_of(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def _compare(found: list[Command], log: str, code: int | None) -> None:
    outputs = dict(re.findall(rf"{MARK}(\d+)\n([^{MARK}]*)", log))
    last = len(outputs) - 1
    if code != 0:
        what = "took too long" if code is None else f"failed with exit code {code}"
        raise PageFailed(f"line {found[last].line}: {what}:\n$ {found[last].script}\n{outputs.get(str(last), log)}")
    for index, command in enumerate(found):
        _require_lines(command, outputs[str(index)])


def _require_lines(command: Command, output: str) -> None:
    rest = iter(output.splitlines())
    for wanted in command.expected:
        pattern = re.compile(".*".join(re.escape(part) for part in wanted.split("...")))
        if not any(pattern.search(" ".join(line.split())) or pattern.search(line) for line in rest):
            raise PageFailed(
                f"line {command.line}: the page shows {wanted!r} after\n$ {command.script}\nwhich printed\n{output}"
            )
