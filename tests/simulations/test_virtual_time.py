"""Virtual time jumps, never runs on behind anybody's back, and says so when nothing will ever happen."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from umbel.errors import SimulationStuck
from umbel_simulations.fleet import virtual_time
from umbel_simulations.fleet.faults import Plug, ProcessKilled
from umbel_simulations.fleet.sleepers import Sleepers
from umbel_simulations.fleet.virtual_time import Ahead, VirtualClock, VirtualLoop, run


def test_a_year_passes_at_once() -> None:
    async def main(loop: VirtualLoop) -> float:
        await asyncio.sleep(365 * 86_400)
        return VirtualClock(loop, 1000.0).now()

    assert run(main) == pytest.approx(1000.0 + 365 * 86_400)


async def test_a_notebook_whose_own_loop_runs_may_play_too() -> None:
    async def main(loop: VirtualLoop) -> float:
        await asyncio.sleep(60)
        return loop.time()

    assert run(main) == 60


def test_what_takes_longer_than_all_time_ends_with_it() -> None:
    async def main(loop: VirtualLoop) -> float:
        await asyncio.sleep(1e300)
        await asyncio.sleep(1e300)
        return loop.time()

    assert run(main) == pytest.approx(2.0**32)


def test_events_come_in_the_order_of_their_time() -> None:
    told: list[tuple[float, str]] = []

    async def one(loop: VirtualLoop, name: str, pause: float) -> None:
        for _ in range(3):
            await asyncio.sleep(pause)
            told.append((loop.time(), name))

    async def main(loop: VirtualLoop) -> None:
        await asyncio.gather(one(loop, "slow", 5.0), one(loop, "fast", 2.0), one(loop, "sudden", 1e-4))

    run(main)
    assert [name for _, name in told] == ["sudden"] * 3 + ["fast", "fast", "slow", "fast", "slow", "slow"]
    assert [at for at, _ in told] == pytest.approx([1e-4, 2e-4, 3e-4, 2.0, 4.0, 5.0, 6.0, 10.0, 15.0])


def test_waiting_for_what_nobody_will_do_is_an_error_and_not_a_hang() -> None:
    async def main(loop: VirtualLoop) -> None:
        await asyncio.Event().wait()

    with pytest.raises(SimulationStuck, match="every task waits"):
        run(main)


def test_no_thread_runs_past_virtual_time() -> None:
    async def main(loop: VirtualLoop) -> tuple[str, float]:
        async with asyncio.timeout(1.0):
            name = await asyncio.to_thread(lambda: threading.current_thread().name)
        return name, loop.time()

    assert run(main) == (threading.current_thread().name, 0.0)


def test_an_error_of_offloaded_work_comes_out_where_it_is_awaited() -> None:
    async def main(loop: VirtualLoop) -> None:
        await asyncio.to_thread(lambda: 1 // 0)

    with pytest.raises(ZeroDivisionError):
        run(main)


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("worthwhile", [0.0, 60.0])
def test_work_that_runs_ahead_is_joined_at_the_same_moment_for_any_number_of_threads(
    workers: int, worthwhile: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(virtual_time, "WORTHWHILE", worthwhile)
    told: list[tuple[float, int]] = []
    threads = set()

    def work(number: int) -> int:
        # Later ones are done sooner in real time, and are joined later all the same.
        time.sleep(0.002 * (5 - number))
        threads.add(threading.current_thread().name)
        return number

    async def one(loop: VirtualLoop, ahead: Ahead, number: int) -> None:
        await asyncio.sleep(number * 0.1)
        result = await ahead(lambda: work(number), at_least=10.0)
        told.append((round(loop.time(), 6), result))

    async def main(loop: VirtualLoop) -> None:
        ahead = Ahead(workers)
        await asyncio.gather(*(one(loop, ahead, number) for number in range(5)))
        ahead.close()

    run(main)
    assert told == [(round(10.0 + number * 0.1, 6), number) for number in range(5)]
    aside = workers > 1 and not worthwhile
    assert all(name.startswith("training") == aside for name in threads), "what is quick pays on no thread"


def test_work_whose_visit_was_cancelled_does_not_go_on_behind_anybodys_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_time, "WORTHWHILE", 0.0)
    begun, may_end, done = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait(10.0)
        done.set()

    async def main(loop: VirtualLoop) -> bool:
        ahead = Ahead(2)
        visit = asyncio.ensure_future(ahead(work, 10.0))
        await asyncio.sleep(1.0)
        begun.wait(10.0)
        visit.cancel()
        threading.Timer(0.01, may_end.set).start()
        await asyncio.gather(visit, return_exceptions=True)
        was_done = done.is_set()
        ahead.close()
        return was_done

    assert run(main)


def test_what_still_waits_when_a_run_ends_is_told_so() -> None:
    told: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.sleep(100.0)
        finally:
            told.append("ended")

    async def main(loop: VirtualLoop) -> None:
        waiting.append(asyncio.ensure_future(waits()))
        await asyncio.sleep(1.0)

    waiting: list[asyncio.Task[None]] = []
    run(main)
    assert told == ["ended"]


def test_sleepers_wake_when_they_are_due_whoever_lay_down_first() -> None:
    told: list[tuple[float, str]] = []

    async def main(loop: VirtualLoop) -> int:
        sleepers: Sleepers[str] = Sleepers(loop, lambda name: told.append((round(loop.time(), 6), name)))
        for due, name in ((5.0, "late"), (2.0, "early"), (5.0, "late too"), (3.0, "between"), (9.0, "never")):
            sleepers.add(due, name)
        await asyncio.sleep(4.0)
        sleepers.add(4.5, "added on the way")
        sleepers.add(1.0, "overdue")
        await asyncio.sleep(2.0)
        return len(sleepers)

    assert run(main) == 1
    assert told == [
        (2.0, "early"), (3.0, "between"), (4.0, "overdue"), (4.5, "added on the way"), (5.0, "late"), (5.0, "late too"),
    ]  # fmt: skip


def test_who_wakes_may_lie_down_again_at_once() -> None:
    told: list[float] = []

    async def main(loop: VirtualLoop) -> None:
        def wake(left: int) -> None:
            told.append(round(loop.time(), 6))
            if left:
                sleepers.add(loop.time() + 1.0, left - 1)

        sleepers = Sleepers(loop, wake)
        sleepers.add(1.0, 2)
        await asyncio.sleep(10.0)

    run(main)
    assert told == [1.0, 2.0, 3.0]


def test_a_process_whose_plug_was_pulled_takes_no_other_step() -> None:
    pulled, later = Plug(), Plug()
    later.pull_in(1)
    later("the last")
    with pytest.raises(ProcessKilled):
        pulled.pull()
    for plug in (pulled, later, pulled, later):
        with pytest.raises(ProcessKilled):
            plug("after it")
        assert plug.is_pulled
