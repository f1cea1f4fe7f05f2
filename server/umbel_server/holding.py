"""One process at a time in a folder: a lock that the kernel lets go of when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from umbel.errors import WrongState


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
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WrongState(refusal) from None
        yield
    finally:
        os.close(handle)
