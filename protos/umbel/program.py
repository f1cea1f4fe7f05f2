"""What every program for people needs around it; imported before anything that imports gRPC.

gRPC's own log of failed handshakes stays off the screen: the errors say it already. gRPC reads the variable once, when
it is first imported, so that a function would come late.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import Final

_PLAINLY: Final = {"≥": ">=", "≤": "<=", "–": "-", "…": "..."}
"""What tables say by signs that not every terminal has."""

os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def take_streams() -> None:
    """Make standard output and error fit to be written to, whatever the program was started with.

    A stream that was closed leads nowhere; its number must not go to the next file that is opened (a database, say),
    for whatever is printed would go into that. Of the signs that a terminal lacks, a few come out in plain
    letters, the rest as question marks.
    """
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(spare, True)
    os.close(spare)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(number, "w", closefd=False))  # noqa: SIM115 - as long as the program
        elif isinstance(stream, io.TextIOWrapper) and name == "stdout" and not writes_all(stream):
            codecs.register_error("plainly", _plainly)
            stream.reconfigure(errors="plainly")


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAINLY.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


def writes_all(stream: object) -> bool:
    """Whether a stream has every letter."""
    return "utf" in str(getattr(stream, "encoding", "")).lower()
