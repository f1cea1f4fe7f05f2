"""How a program that runs on is told to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def told_to_stop(stop: Callable[[], None]) -> Iterator[None]:
    """Have `stop` called on the running event loop at SIGTERM, at Ctrl-C, and when the terminal goes.

    A program that was started to outlive its terminal (`nohup`) does.
    """
    loop = asyncio.get_running_loop()
    numbers = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
