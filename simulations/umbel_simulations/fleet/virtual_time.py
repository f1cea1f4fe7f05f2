"""An event loop whose time jumps to the next event, and a clock that shows it.

Nothing is waited for: when every task waits, time becomes that of the earliest timer. Threads would go on meanwhile, so
there are none: what a program hands to `asyncio.to_thread` runs at once, on the loop. Work that may really run beside
the loop goes through `Ahead`, which joins it at a moment of virtual time that doesn't depend on how fast it was.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context
from typing import Any, Final, TypeVar

from umbel.errors import SimulationStuck

T = TypeVar("T")
_RESOLUTION: Final = 1e-6
"""Seconds; timers that are nearer to each other come together."""
_LATEST: Final = 2.0**32
"""Seconds, 136 years: what would come later comes then. A float tells instants that are twice as late apart no more."""
WORTHWHILE: Final = 0.02
"""Seconds of a processor that work has to take for a thread to pay."""


class _Jumps(selectors.BaseSelector):
    """A selector that never sleeps: it moves time forward instead."""

    def __init__(self) -> None:
        self._real = selectors.DefaultSelector()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready now; if nothing is, `timeout` seconds have passed."""
        if timeout is None:
            raise SimulationStuck(
                "every task waits and no timer is set: something waits for what nobody will do; "
                "look at what was last told, and at what a fault has cut off"
            )
        self.now += timeout
        return []

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """For the loop's own wake-up pipe."""
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Undo `register`."""
        return self._real.unregister(fileobj)

    def close(self) -> None:
        """Let go of the pipe."""
        self._real.close()

    def get_map(self) -> Any:
        """What is registered."""
        return self._real.get_map()


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time starts at 0 and passes only when nothing can be done without it passing.

    Raises, out of `run`:
        SimulationStuck: every task waits and no timer is set.
    """

    def __init__(self) -> None:
        self._jumps = _Jumps()
        super().__init__(self._jumps)
        # The loop's own is finer than what a float tells apart after a year: a timer would come near and never be due.
        self._clock_resolution = _RESOLUTION

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._jumps.now

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """As asyncio does, for instants that this time can show."""
        return super().call_at(min(when, _LATEST), callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Run it now: a thread would go on while time jumps."""
        del executor
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - whoever awaits it gets it
            done.set_exception(error)
        return done


class VirtualClock:
    """Virtual time as a date.

    Args:
        loop: whose time it is.
        epoch: POSIX seconds at the loop's 0.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, epoch: float) -> None:
        self._loop = loop
        self.epoch = epoch
        self._end: float | None = None

    def now(self) -> float:
        """The current instant, in POSIX seconds."""
        return self.epoch + self._loop.time() if self._end is None else self._end

    def stop(self) -> None:
        """Show this instant from now on, whatever has yet to come to its end."""
        self._end = self.now()


class Ahead:
    """Work that runs on threads while virtual time goes on, with the same result for any number of them.

    Who hands work in knows a time that it takes at least. It starts at once and is joined when so much virtual time has
    passed: there time stands still until the thread is done. Threads never see the loop, so what they do can depend
    neither on their number nor on their speed. Work that is done in milliseconds is done where it is joined: two
    threads that both want Python lose as much at each turn.

    Args:
        workers: threads; with 1 there are none, and all work is done where it is joined.
    """

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(workers, "training") if workers > 1 else None
        self._usual = 0.0
        """Seconds of a processor that such work took so far."""

    async def __call__(self, work: Callable[[], T], at_least: float) -> T:
        """The result of `work`, `at_least` virtual seconds from now."""
        if self._pool is None or self._usual < WORTHWHILE:
            await asyncio.sleep(at_least)
            return self._timed(work)
        running: Future[T] = self._pool.submit(self._timed, work)
        try:
            await asyncio.sleep(at_least)
        finally:
            # Also where the visit was cancelled: nothing may go on behind the back of virtual time.
            _settle(running)
        return running.result()

    def _timed(self, work: Callable[[], T]) -> T:
        began = time.thread_time()
        try:
            return work()
        finally:
            took = time.thread_time() - began
            self._usual = 0.9 * self._usual + 0.1 * took if self._usual else took

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


def _settle(running: Future[Any]) -> None:
    running.exception()


async def at_once(function: Callable[..., T], *arguments: Any) -> T:
    """An `Offload` for servers: the work is done here and takes no virtual time."""
    return function(*arguments)


def run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    """Run a program on a loop of its own, from its time 0.

    Raises:
        SimulationStuck: every task waits and no timer is set.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(main)
    # A notebook's: a thread runs one loop at a time.
    with ThreadPoolExecutor(1) as beside:
        return beside.submit(_run, main).result()


def _run(main: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(main(loop))
    finally:
        loop.run_until_complete(_end(asyncio.all_tasks(loop)))
        loop.close()


async def _end(tasks: Sequence[asyncio.Task[Any]] | set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
