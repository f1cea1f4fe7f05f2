"""The power goes, or the disk is full, at any step of what writes files: to be looked at from the next start."""

from __future__ import annotations

import errno
import io
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

STEPS = ("write", "replace", "rename", "unlink", "open")
"""After each of them the disk holds something else; all are of `os`, but the opening of a file that is written to."""


class PowerCut(BaseException):
    """The machine is dark."""


def dies_at(patch: pytest.MonkeyPatch, last: int) -> list[str]:
    """Let the power go at a step of this number (0 is the first), half of a write done; the steps that were taken.

    Steps of this thread only: others play other machines. What C code writes (SQLite, NumPy) isn't seen.
    """

    def cut(name: str, half: Callable[[], object]) -> None:
        if len(taken) == last:
            half()
            raise PowerCut(name)

    taken = _watch(patch, cut)
    return taken


def fills_up_at(patch: pytest.MonkeyPatch, last: int) -> list[str]:
    """Let the disk have no more room from a step of this number on; the steps that were taken."""

    def full(name: str, half: Callable[[], object]) -> None:
        if len(taken) >= last and name in ("write", "open"):
            half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a file")

    taken = _watch(patch, full)
    return taken


def unflushed(patch: pytest.MonkeyPatch, act: Callable[[], object]) -> list[str]:
    """What an action put in its place and a power cut may take away after it, its bytes or its name; bytes have to be
    on the medium before the name that they get, names before the action returns.
    """
    happened: list[tuple[str, int, Path]] = []

    def flush(descriptor: int) -> None:
        real_flush(descriptor)
        happened.append(("flush", os.fstat(descriptor).st_ino, Path()))

    def replace(source: Any, target: Any) -> None:
        real_replace(source, target)
        happened.append(("replace", Path(target).stat().st_ino, Path(target)))

    real_flush, real_replace = os.fsync, os.replace
    patch.setattr(os, "fsync", flush)
    patch.setattr(os, "replace", replace)
    act()
    assert any(step == "replace" for step, _, _ in happened), "nothing was put anywhere"
    flushed = [inode if step == "flush" else 0 for step, inode, _ in happened]
    return [
        str(path)
        for at, (step, inode, path) in enumerate(happened)
        if step == "replace" and (inode not in flushed[:at] or path.parent.stat().st_ino not in flushed[at:])
    ]


def _watch(patch: pytest.MonkeyPatch, before: Callable[[str, Callable[[], object]], None]) -> list[str]:
    taken: list[str] = []
    here = threading.get_ident()

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() == here and _changes(name, arguments, options):
                before(name, lambda: _half(name, real, arguments, options))
                taken.append(name)
            return real(*arguments, **options)

        return step

    for name in STEPS:
        module = io if name == "open" else os
        patch.setattr(module, name, watched(name, getattr(module, name)))
    return taken


def _changes(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> bool:
    if name != "open":
        return True
    mode = str(arguments[1] if len(arguments) > 1 else options.get("mode", "r"))
    is_there = "a" in mode and Path(arguments[0]).exists()
    return not is_there and any(letter in mode for letter in "wax+")


def _half(name: str, real: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """What of a step may be done when it is cut off: half of a write, or a file that was made and holds nothing."""
    if name == "write":
        real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
    elif name == "open":
        real(*arguments, **options).close()


@contextmanager
def no_room() -> Iterator[None]:
    """No file of this process may grow, whoever writes it: Python, SQLite, another thread (EFBIG, by the kernel)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with capture_logs():  # `umbel serve` goes on where its log can't; the tests' own output is a file too
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
