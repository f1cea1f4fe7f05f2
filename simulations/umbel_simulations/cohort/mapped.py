"""A value whose arrays lie in a file that several processes map: one copy in memory, however many read it.

    [array, at a multiple of 64]... [the rest of the value, and where its arrays lie] [where that begins: 8 bytes]

Pickle's protocol 5 keeps arrays out of its stream (PEP 574). Only ever for files that this program itself has made and
hands to its own children: unpickling runs what is in there.
"""

from __future__ import annotations

import mmap
import pickle
from typing import IO, Any, Final

_ALIGNED: Final = 64
_PLACE_BYTES: Final = 8


def lay_out(value: object, file: IO[bytes]) -> None:
    """Write a value into an empty file; raises `OSError` if there is no room for it."""
    spans: list[tuple[int, int]] = []

    def lay(buffer: pickle.PickleBuffer) -> None:
        file.write(bytes(-file.tell() % _ALIGNED))
        raw = buffer.raw()
        spans.append((file.tell(), raw.nbytes))
        file.write(raw)

    rest = pickle.dumps(value, protocol=5, buffer_callback=lay)
    begins = file.tell()
    file.write(pickle.dumps((rest, spans)))
    file.write(begins.to_bytes(_PLACE_BYTES))
    file.flush()


def take_up(descriptor: int) -> Any:
    """The value that `lay_out` wrote into an open file; its arrays can't be written to."""
    whole = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    begins = int.from_bytes(whole[-_PLACE_BYTES:])
    rest, spans = pickle.loads(whole[begins:-_PLACE_BYTES])  # noqa: S301 - our own parent's
    return pickle.loads(rest, buffers=[whole[at : at + size] for at, size in spans])  # noqa: S301
