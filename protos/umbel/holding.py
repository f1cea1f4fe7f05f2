"""One process at a time in a folder: a lock that the kernel lets go of when its process ends, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError as missing:
    raise ImportError("Umbel locks its folders by fcntl, which this system lacks: it runs on Linux") from missing

from umbel.errors import WrongState


@contextmanager
def locked(handle: int, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock of an open file or folder for as long as the block lasts.

    A child that the app forks in between has the file open too: closing it here would leave the lock with that child.
    So it is let go of by name, and by this process alone, should the child unwind the block as well.

    Args:
        handle: a descriptor of it.
        refusal: what to say to whoever finds it held; None waits.

    Raises:
        WrongState: another process holds it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if refusal is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise WrongState(refusal or "") from None
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:
            fcntl.flock(handle, fcntl.LOCK_UN)


@contextmanager
def alone_in(folder: Path) -> Iterator[int]:
    """Wait for a folder, and hold it for as long as the block lasts: for changes that take no time; not to be nested.

    Args:
        folder: exists.

    Yields:
        Its descriptor, to flush the names in it by.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with locked(handle):
            yield handle
    finally:
        os.close(handle)


@contextmanager
def alone_with(file: Path) -> Iterator[None]:
    """Wait for a file, and hold it for as long as the block lasts, which may put another in its place.

    Args:
        file: exists.
    """
    while True:
        handle = os.open(file, os.O_RDONLY)
        try:
            with locked(handle):
                if os.path.samestat(os.fstat(handle), file.stat()):
                    yield
                    return
        finally:
            os.close(handle)


@contextmanager
def held(folder: Path, refusal: str) -> Iterator[None]:
    """Hold a folder for as long as the block lasts; leaves no file behind.

    Args:
        folder: exists.
        refusal: what to say to whoever finds it held.

    Raises:
        WrongState: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with locked(handle, refusal):
            yield
    finally:
        os.close(handle)
