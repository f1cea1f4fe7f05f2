"""How this process takes memory from the system: for programs that are nothing but a device, or a coordinator."""

from __future__ import annotations

import ctypes
from typing import Final

_ARENA_MAX: Final = -8
_MMAP_THRESHOLD: Final = -3
_TRIM_THRESHOLD: Final = -1
"""Parameters of glibc's `mallopt` (malloc.h)."""
_LARGE: Final = 64 << 10


def give_back_what_is_freed(large: int = _LARGE) -> bool:
    """Have the C library hand freed memory back soon, and keep one heap rather than one for each thread.

    Training, and closing a round, allocate and free the same few large buffers, and gRPC brings threads that hardly
    allocate. What glibc keeps of them by default is some 6 MB on a device, and several times the model at a
    coordinator. It holds for the whole process, so an app that embeds the SDK decides for itself.

    Args:
        large: buffers of so many bytes or more come from the system and go back at once.

    Returns:
        Whether this C library knows how; others (musl, macOS) have no need of it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, large), (_TRIM_THRESHOLD, large))
    return [mallopt(parameter, value) for parameter, value in settings] == [1, 1, 1]
