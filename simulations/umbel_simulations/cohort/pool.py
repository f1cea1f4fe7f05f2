"""A cohort trained by a pool of workers, and summed up in one order.

Floating-point addition isn't associative, so the order of a sum is part of its result. Whichever worker is ready
first, updates are added in the order of their items; the same sum comes out of any number of workers, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from types import TracebackType
from typing import Any, Final, Generic, TypeVar

import numpy as np

from umbel.errors import OutOfBounds
from umbel_simulations.cohort.clients import Backend, Worker

T = TypeVar("T")
R = TypeVar("R")

SILENT: Final[Mapping[str, Any]] = {"over": "ignore", "invalid": "ignore"}
"""Overflows are found by looking at results, not by warnings; said once for all items, as saying so costs time."""
_AHEAD = 4
"""How many results for each worker may wait for an earlier one."""


class Pool:
    """Workers in threads, kept for a whole simulation.

    Args:
        backend: makes the workers.
        workers: how many; at least 1.
    """

    def __init__(self, backend: Backend, workers: int) -> None:
        if workers < 1:
            raise OutOfBounds(f"workers is {workers}; it must be at least 1")
        self.together = backend.together
        self._workers = [backend.worker() for _ in range(workers)]
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="umbel-cohort")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._threads.shutdown()

    def each(self, items: Sequence[T], work: Callable[[Worker, T], R], take: Callable[[T, R], None]) -> None:
        """Do `work` on each item, side by side, and `take` the results one by one, in the order of the items.

        What `work` or `take` raises stops the rest, and is raised here.
        """
        if len(self._workers) == 1 or len(items) == 1:
            self.alone(items, work, take)
            return
        line = _Line(items, take, _AHEAD * len(self._workers))
        serving = [self._threads.submit(line.serve, worker, work) for worker in self._workers]
        for one in serving:
            one.result()

    def alone(self, items: Sequence[T], work: Callable[[Worker, T], R], take: Callable[[T, R], None]) -> None:
        """The same by one worker, one item after the other, in the caller's thread."""
        with np.errstate(**SILENT):
            for item in items:
                take(item, work(self._workers[0], item))


class _Line(Generic[T, R]):
    """The items of one `each`, the results that wait for an earlier one, and whose turn it is."""

    def __init__(self, items: Sequence[T], take: Callable[[T, R], None], ahead: int) -> None:
        self._items = items
        self._take = take
        self._ahead = ahead
        self._changed = Condition()
        self._begun = 0
        self._taken = 0
        self._waiting: dict[int, R] = {}
        self._is_stopped = False

    def serve(self, worker: Worker, work: Callable[[Worker, T], R]) -> None:
        """Take items as long as there are any."""
        try:
            with np.errstate(**SILENT):
                for index in self._turns():
                    self._done(index, work(worker, self._items[index]))
        except BaseException:
            with self._changed:
                self._is_stopped = True
                self._changed.notify_all()
            raise

    def _turns(self) -> Iterator[int]:
        while True:
            with self._changed:
                # The earliest item that isn't taken yet is always in somebody's hands, so this ends.
                while not self._is_stopped and self._begun - self._taken >= self._ahead:
                    self._changed.wait()
                if self._is_stopped or self._begun == len(self._items):
                    return
                index = self._begun
                self._begun += 1
            yield index

    def _done(self, index: int, result: R) -> None:
        """Take all results whose turn it is; one thread at a time, while others go on working."""
        with self._changed:
            # Only one thread at a time has the result whose turn it is: until it is taken, `_taken` stays.
            if index != self._taken or self._is_stopped:
                self._waiting[index] = result
                return
        while True:
            self._take(self._items[index], result)
            with self._changed:
                self._taken = index = index + 1
                self._changed.notify_all()
                if index not in self._waiting or self._is_stopped:
                    return
                result = self._waiting.pop(index)
