"""Two calls from two threads, the second in the midst of the first: nobody waits for a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

Call = Callable[[], Any]


class Turn:
    """Somebody's lock, which tells that one stands at it."""

    def __init__(self, lock: threading.Lock, settled: threading.Event) -> None:
        self._lock, self._settled = lock, settled

    def __enter__(self) -> None:
        if self._lock.locked():
            self._settled.set()
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def crossed(locked: Any, place: Any, step: str, first: Call, second: Call) -> tuple[Any, Future[Any]]:
    """What a first call gives, and what becomes of a second one that is made in its midst.

    Args:
        locked: what both calls are of; its lock is `_lock`.
        place: where the first call finds a function of its own.
        step: that function's name; it begins once the second call is done, or stands at the lock.
        first: made here.
        second: made on another thread.
    """
    settled, do = threading.Event(), getattr(place, step)
    coming: list[Future[Any]] = []
    with pytest.MonkeyPatch.context() as hands, ThreadPoolExecutor(1) as other:

        def late(*arguments: Any) -> Any:
            hands.setattr(place, step, do)
            coming.append(other.submit(second))
            coming[0].add_done_callback(lambda _: settled.set())
            assert settled.wait(60)
            return do(*arguments)

        hands.setattr(locked, "_lock", Turn(locked._lock, settled))
        hands.setattr(place, step, late)
        return first(), coming[0]
