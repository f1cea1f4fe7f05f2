"""Files of a server's folder: whole or not at all, and, unless somebody else is to read them, their owner's only."""

from __future__ import annotations

import os
import re
import secrets
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from umbel.errors import MalformedMessage, NotFound

PRIVATE: Final = 0o600
PUBLIC: Final = 0o644
_ASIDE: Final = re.compile(r"\..+\.[0-9a-f]{8}")


def write_file(path: Path, data: bytes, mode: int = PRIVATE) -> None:
    """Write or replace a file, whole or not at all; durable when it returns.

    Raises:
        OSError: it can't be written; what stood there before still does.
    """
    aside = aside_of(path)
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    flush(path.parent)


def aside_of(path: Path) -> Path:
    """Where to write what is to take the place of a file or a folder."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def drop_left(folder: Path, since: Path) -> None:
    """Remove what lies aside and is older than a file that was written whole: who wrote it was killed before that."""
    with suppress(FileNotFoundError):
        written = since.stat().st_mtime_ns
        for left in folder.iterdir():
            if _ASIDE.fullmatch(left.name) and left.stat().st_mtime_ns < written:
                left.unlink(missing_ok=True)


def write_result(path: Path, data: bytes) -> None:
    """Write what somebody asked for, for all to read: whole or not at all, where that is a file.

    Raises:
        OSError: it can't be written; what stood there before still does.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        # /dev/stdout and its like: not to be replaced.
        path.write_bytes(data)
    else:
        write_file(path, data, PUBLIC)


def flush(path: Path) -> None:
    """Have the disk keep a file's bytes, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_file(path: Path) -> bytes:
    """Read a whole file; raises `NotFound`."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        # A folder that isn't there either is one that nobody has made yet; any other file is the caller's own.
        made = "; `umbel init` makes a coordinator's folder, `umbel helper init` a helper's"
        raise NotFound(f"{path} isn't there{'' if path.parent.is_dir() else made}") from None


def read_text(path: Path) -> str:
    """Read a whole file of text; raises `NotFound` or `MalformedMessage`."""
    try:
        return read_file(path).decode()
    except UnicodeDecodeError as error:
        raise MalformedMessage(f"{path} isn't text: {error}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; raises `NotFound` or `MalformedMessage`."""
    try:
        return tomllib.loads(read_text(path))
    except ValueError as error:
        raise MalformedMessage(f"{path} isn't TOML: {error}") from error


def make_private(folder: Path) -> None:
    """Make a folder that only its owner may enter."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def make_file_private(path: Path) -> None:
    """Have a file that another program will write, such as a database, readable by its owner only.

    SQLite gives the files beside its own (`-wal`, `-shm`) the same mode; those that are there already get it here.
    """
    path.touch(mode=PRIVATE)
    for file in (path, *(path.with_name(path.name + beside) for beside in ("-wal", "-shm", "-journal"))):
        if file.exists() and file.stat().st_mode & 0o077:
            file.chmod(PRIVATE)
