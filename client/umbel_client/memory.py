"""How this process takes memory from the system: for programs that are nothing but a device."""

from __future__ import annotations

import ctypes
from typing import Final

_ARENA_MAX: Final = -8
_MMAP_THRESHOLD: Final = -3
_TRIM_THRESHOLD: Final = -1
"""Parameters of glibc's `mallopt` (malloc.h)."""
_LARGE: Final = 64 << 10


def give_back_what_is_freed() -> bool:
    """Have the C library hand freed memory back soon, and keep one heap rather than one for each thread.

    Training allocates and frees the same few large buffers at each step, and gRPC brings threads that hardly allocate:
    glibc's defaults, made for servers, keep some 6 MB for them that a device has better use for. It holds for the
    whole process, so an app that embeds the SDK decides for itself.

    Returns:
        Whether this C library knows how; others (musl, macOS) have no need of it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, _LARGE), (_TRIM_THRESHOLD, _LARGE))
    return [mallopt(parameter, value) for parameter, value in settings] == [1, 1, 1]
