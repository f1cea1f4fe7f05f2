"""The folder of the user that a program runs as: a service or a container may have none."""

from __future__ import annotations

from pathlib import Path

from umbel.errors import NotFound


def in_home(path: Path | str) -> Path:
    """A path whose `~` is the user's home.

    Raises:
        NotFound: HOME isn't set, and the machine knows no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise NotFound(f"no home folder is known for {path}; set HOME, or name another place") from None
