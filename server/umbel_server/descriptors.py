"""How many files and connections a server may have open at once."""

from __future__ import annotations

import contextlib
import resource


def take_all_that_are_allowed() -> None:
    """Raise this process's limit to the highest that it may have.

    With the usual 1,024, strangers who connect and say nothing would soon leave none for the store.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
