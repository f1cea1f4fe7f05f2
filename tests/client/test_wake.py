"""One visit does all that is due, and a device that is lost anywhere goes on where it was."""

from __future__ import annotations

import asyncio
import gc
import os
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import umbel_client
from tests.client.conftest import Bench
from tests.client.recordings import recordings
from umbel.errors import DigestMismatch, UmbelError, Unreachable, WrongState
from umbel.plan import Kind, Plan
from umbel.visit import Outcome, ReportBegin, RetryWindow
from umbel_client import ALWAYS, Device, Ending, IdlePolicy, PersonalSettings
from umbel_client.enrolment import new_key
from umbel_client.files import Disk
from umbel_client.kit import only_visitor
from umbel_client.session import Session
from umbel_client.status import DeviceStatus
from umbel_client.trainer import run

PLAN = Plan(epochs=2, batch_size=16, hyperparameters={"lr": 0.1}, clip_norm=5.0, seed=3)
PERSONAL = PersonalSettings(epochs=2, hyperparameters={"lr": 0.1})
IN_TRAINING = 11
"""So many looks at the host, and a new device is in the middle of training: one for each file, then for each step."""


async def test_a_device_that_is_not_eligible_sends_not_a_byte(bench: Bench) -> None:
    bench.coordinator.publish()
    device = bench.open(policy=IdlePolicy())
    visit = await device.wake()
    assert visit.ending is Ending.WAITED
    assert visit.reasons
    assert bench.channel.calls == []


async def test_one_visit_adopts_the_release_trains_and_reports(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    device = bench.device_with_examples(personal=PERSONAL)
    visit = await device.wake()
    assert visit.error is None
    assert visit.ending is Ending.CONTRIBUTED
    assert visit.session is not None and visit.session.shape == "-v[]+^"
    assert visit.release is not None and visit.release.outcome is Outcome.ADOPTED
    [update] = bench.coordinator.updates.values()
    assert update.weight == 56
    assert 0 < update.delta.norm() <= PLAN.clip_norm * (1 + 1e-6)
    assert update.metrics["examples"] == 14
    assert update.metrics["train_examples"] == 112
    assert bench.clock.now() <= visit.next_wake <= bench.clock.now() + 0.01
    logits = device.predict(recordings(3)[0])["logits"]
    assert logits.shape == (3, 7)


async def test_an_evaluation_reports_metrics_and_no_delta(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [Plan(kind=Kind.EVALUATE)]
    await bench.device_with_examples().wake()
    [update] = bench.coordinator.updates.values()
    assert len(update.delta) == 0
    assert update.weight == update.metrics["examples"] == 14
    assert bench.open().kit.memory.state.last_contribution is None


async def test_what_happened_is_told_at_the_next_visit_and_only_once(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    device = bench.device_with_examples(personal=PERSONAL)
    await device.wake()
    await bench.open().wake()
    await bench.open().wake()
    first, second, third = bench.coordinator.check_ins
    assert (first.sessions, first.outcomes) == (third.sessions, third.outcomes) == ((), ())
    assert [record.shape for record in second.sessions] == ["-v[]+^"]
    assert [outcome.outcome for outcome in second.outcomes] == [Outcome.ADOPTED]
    assert len(second.held_bundles) == 1


async def test_too_late_is_told_before_the_upload_and_the_window_is_kept(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    bench.coordinator.closed = True
    device = bench.device_with_examples(personal=PERSONAL)
    visit = await device.wake()
    assert visit.ending is Ending.REFUSED
    assert visit.session is not None and visit.session.shape == "-v[]+#"
    assert visit.session.error == "round-closed"
    assert bench.coordinator.uploads == {}
    assert 5.0 <= visit.next_wake - bench.clock.now() <= 6.0
    assert bench.open()._sessions.load() is None


async def test_a_broken_upload_goes_on_at_its_offset_with_the_same_bytes(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    bench.coordinator.break_upload_after = 8192
    device = bench.device_with_examples(personal=PERSONAL)
    visit = await device.wake()
    assert isinstance(visit.error, Unreachable)
    [half] = bench.coordinator.uploads.values()
    assert len(half) == 8192
    visit = await bench.open().wake()
    assert visit.ending is Ending.CONTRIBUTED
    assert visit.session is not None and visit.session.shape == "-v[]+!+^"
    assert len(bench.coordinator.updates) == 1
    assert len(bench.coordinator.check_ins) == 1


async def test_an_acknowledgement_that_got_lost_is_asked_for_again_and_counts_once(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    finish = bench.coordinator.finish
    lost: list[Any] = []

    def finish_and_lose(begin: Any) -> Any:
        window = finish(begin)
        if not lost:
            lost.append(begin)
            raise Unreachable("the answer got lost")
        return window

    bench.coordinator.finish = finish_and_lose  # type: ignore[method-assign]
    await bench.device_with_examples(personal=PERSONAL).wake()
    visit = await bench.open().wake()
    assert visit.ending is Ending.CONTRIBUTED
    assert list(bench.coordinator.updates) == [lost[0].report_id]


async def test_a_sealed_report_that_was_damaged_on_disk_is_made_anew(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    bench.coordinator.break_upload_after = 0
    await bench.device_with_examples(personal=PERSONAL).wake()
    sealed = bench.home / "session" / "sealed.bin"
    sealed.write_bytes(sealed.read_bytes()[:-1])
    visit = await bench.open().wake()
    assert visit.ending is Ending.CONTRIBUTED
    assert visit.session is not None and visit.session.shape == "-v[]+!v[]+^"


async def test_a_cancelled_visit_ends_within_a_step_of_training_and_leaves_nothing_at_work(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [replace(PLAN, epochs=100_000)]
    device = bench.device_with_examples(personal=PersonalSettings(epochs=0), offload=asyncio.to_thread)
    training = asyncio.Event()
    loop = asyncio.get_running_loop()
    steps: list[float] = []

    class Watched:
        def read(self) -> DeviceStatus:
            steps.append(loop.time())
            loop.call_soon_threadsafe(training.set)
            return DeviceStatus()

    object.__setattr__(device.kit, "status", Watched())
    told: list[str] = []
    loop.set_exception_handler(lambda _, context: told.append(context["message"]))
    visit = asyncio.create_task(device.wake())
    while len(steps) < IN_TRAINING:
        training.clear()
        await training.wait()
    visit.cancel()
    (ended,) = await asyncio.gather(visit, return_exceptions=True)
    assert isinstance(ended, asyncio.CancelledError)
    # What it writes last is there: nothing comes after, into the next visit's session or a home that was deleted.
    assert device.kit.stopping.is_set()
    assert (bench.home / "session" / "progress.safetensors").exists()
    del visit, ended
    await asyncio.sleep(0)
    gc.collect()
    assert not told, "nor is the app's log told of training that stopped as it was asked to"


class Dies(BaseException):
    """The process is gone."""


@pytest.mark.parametrize("call", ["check_in", "fetch", "report"])
async def test_a_process_that_dies_in_a_call_goes_on_at_the_next_start(bench: Bench, call: str) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    device = bench.device_with_examples(personal=PERSONAL)

    def die(name: str) -> None:
        if name == call:
            raise Dies

    bench.channel._called = die  # type: ignore[method-assign]
    with pytest.raises(Dies):
        await device.wake()
    del bench.channel._called
    visit = await bench.open(personal=PERSONAL).wake()
    assert visit.ending is Ending.CONTRIBUTED
    assert len(bench.coordinator.updates) == 1


async def test_a_session_whose_deadline_passed_is_dropped_and_told(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    device = bench.device_with_examples(personal=PERSONAL, policy=IDLE_ONLY, status=StopsAfter(IN_TRAINING))
    visit = await device.wake()
    assert visit.ending is Ending.INTERRUPTED
    bench.clock.instant += 3600
    visit = await bench.open().wake()
    assert visit.ending is Ending.RESTED
    [told] = bench.coordinator.check_ins[-1].sessions
    assert told.shape.endswith("!") and told.error == "round-closed"
    assert "report" not in bench.channel.calls


async def test_a_report_whose_acknowledgement_was_lost_is_known_to_count_after_its_deadline_too(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    device = bench.device_with_examples(personal=PERSONAL)
    finish = bench.coordinator.finish

    def counts_and_is_gone(begin: ReportBegin) -> RetryWindow:
        finish(begin)
        raise Unreachable("the line went dead")

    with monkeypatch.context() as patch:
        patch.setattr(bench.coordinator, "finish", counts_and_is_gone)
        assert (await device.wake()).ending is Ending.FAILED
    bench.clock.instant += 3600
    bench.coordinator.closed = True
    visit = await bench.open().wake()
    assert visit.ending is Ending.CONTRIBUTED
    assert bench.open().kit.memory.state.contributions == len(bench.coordinator.updates) == 1


@pytest.mark.parametrize("error", [UmbelError("a fault of the coordinator"), DigestMismatch("damaged on the way")])
async def test_a_report_that_failed_inside_or_came_damaged_is_sent_again_until_its_deadline(
    bench: Bench, error: UmbelError
) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    finish, asked = bench.coordinator.finish, list[str]()

    def fails_twice(begin: ReportBegin) -> RetryWindow:
        asked.append(begin.sealed_digest)
        if len(asked) < 3:
            raise error
        return finish(begin)

    bench.coordinator.finish = fails_twice  # type: ignore[method-assign]
    visits = [await bench.device_with_examples(personal=PERSONAL).wake()]
    visits += [await bench.open().wake() for _ in range(2)]
    assert [visit.ending for visit in visits] == [Ending.FAILED, Ending.FAILED, Ending.CONTRIBUTED]
    assert visits[0].next_wake - bench.clock.now() <= 900
    assert visits[2].session is not None and visits[2].session.shape == "-v[]+!+!+^"
    assert len({*asked}) == len(bench.coordinator.updates) == 1


async def test_a_report_that_keeps_failing_inside_is_given_up_once_its_deadline_has_passed(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]

    def fails(begin: ReportBegin) -> RetryWindow:
        raise UmbelError("a fault of the coordinator")

    bench.coordinator.finish = fails  # type: ignore[method-assign]
    assert (await bench.device_with_examples(personal=PERSONAL).wake()).session is None
    bench.clock.instant += 3600
    visit = await bench.open().wake()
    assert visit.session is not None and (visit.session.shape, visit.session.error) == ("-v[]+!+*", "internal")


async def test_a_report_that_comes_after_its_deadline_is_told_as_refused(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    device = bench.device_with_examples(personal=PERSONAL)
    bench.coordinator.break_upload_after = 0
    await device.wake()
    bench.clock.instant += 3600
    bench.coordinator.closed = True
    visit = await bench.open().wake()
    assert visit.ending is Ending.REFUSED
    assert visit.session is not None and (visit.session.shape, visit.session.error) == ("-v[]+!+#", "round-closed")
    assert (await bench.open().wake()).ending is Ending.RESTED


class StopsAfter:
    """A host that takes its machine back after so many looks."""

    def __init__(self, looks: int) -> None:
        self.left = looks

    def read(self) -> DeviceStatus:
        self.left -= 1
        return DeviceStatus(idle=self.left >= 0)


IDLE_ONLY = IdlePolicy(require_power=False, require_unmetered=False, max_temperature=None, min_free_bytes=0)


async def test_interrupted_training_goes_on_and_ends_as_an_unbroken_run(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    settings = PersonalSettings(epochs=0)
    device = bench.device_with_examples(personal=settings, policy=IDLE_ONLY, status=StopsAfter(IN_TRAINING))
    visit = await device.wake()
    assert visit.ending is Ending.INTERRUPTED
    assert "in use" in str(visit.error)
    again = bench.open(personal=settings)
    assert again._sessions.progress(again.kit.examples.revision(), 70) is not None
    visit = await again.wake()
    assert visit.session is not None and visit.session.shape == "-v[!v[]+^"
    [resumed] = bench.coordinator.updates.values()

    unbroken = await _unbroken_update(bench, settings)
    assert resumed.delta == unbroken.delta
    assert resumed.metrics == unbroken.metrics


async def _unbroken_update(bench: Bench, settings: PersonalSettings) -> Any:
    device = bench.open(personal=settings)
    [assignment] = bench.coordinator.open.values()
    bundle = device.kit.shelf.bundle(device.kit.shelf.slots.active.bundle, "onnx")  # type: ignore[union-attr]
    job = Session(assignment, "0" * 32).job(device.id)
    return run(job, bundle, device.kit.examples.split(0.0), device.kit.runtime, bench.clock)


async def test_new_examples_make_an_interrupted_run_start_anew(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    settings = PersonalSettings(epochs=0)
    device = bench.device_with_examples(personal=settings, policy=IDLE_ONLY, status=StopsAfter(IN_TRAINING))
    await device.wake()
    device.learn_from(*recordings(7, "later"))
    assert device._sessions.progress(device.kit.examples.revision(), 77) is None
    assert (await bench.open(personal=settings).wake()).ending is Ending.CONTRIBUTED


async def test_an_app_stops_a_visit_within_a_step(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    device = bench.device_with_examples(personal=PersonalSettings(epochs=0))
    step = device.kit.against_going_on
    looks: list[tuple[str, ...]] = []

    class Host:
        def read(self) -> DeviceStatus:
            looks.append(())
            if len(looks) == 3:
                device.stop()
            return DeviceStatus()

    object.__setattr__(device.kit, "status", Host())
    visit = await device.wake()
    assert visit.ending is Ending.INTERRUPTED
    assert len(looks) == 3
    assert step() == ("the app asked to stop",)


async def test_failures_back_off_and_success_forgets_them(bench: Bench) -> None:
    device = bench.open()
    bench.channel.down = Unreachable("no answer")
    waits = [(await device.wake()).next_wake - bench.clock.now() for _ in range(8)]
    assert waits[0] <= 4.0
    assert 64.0 <= waits[7] <= 512.0
    bench.channel.down = None
    await device.wake()
    assert device.kit.memory.state.failures == 0


@pytest.mark.parametrize(("ending", "parts", "down"), [
    (Ending.RESTED, {}, None),
    (Ending.WAITED, {"policy": IdlePolicy()}, None),
    (Ending.FAILED, {}, Unreachable("no answer")),
])  # fmt: skip
async def test_a_visit_with_nothing_to_do_saves_its_history_once_and_whole(
    bench: Bench, ending: Ending, parts: dict[str, Any], down: UmbelError | None
) -> None:
    steps: list[str] = []
    bench.channel.down = down
    device = bench.open(disk=Disk(steps.append), **parts)
    visit = await device.wake()
    assert visit.ending is ending
    assert steps.count("replace state.json") == 1
    kept = bench.open().kit.memory.state
    assert kept == device.kit.memory.state
    assert (kept.visits, kept.next_wake) == (1, visit.next_wake)


async def test_a_process_that_dies_before_its_history_is_saved_tells_its_session_again_never_not_at_all(
    bench: Bench,
) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    first = await bench.device_with_examples().wake()

    def dies(step: str) -> None:
        if step == "create state.json":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await bench.open(disk=Disk(dies)).wake()
    await bench.open().wake()
    await bench.open().wake()
    told = [check_in.sessions for check_in in bench.coordinator.check_ins]
    assert told == [(), (first.session,), (first.session,), ()]


async def test_a_device_without_a_model_says_how_to_get_one(bench: Bench) -> None:
    with pytest.raises(WrongState, match="brings what is released"):
        bench.open().predict(np.zeros((1, 6, 100), np.float32))


async def test_only_one_process_visits_from_a_home(bench: Bench) -> None:
    device = bench.open()
    with only_visitor(bench.home), pytest.raises(WrongState, match="on a visit"):
        await device.wake()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_during_a_visit_neither_ends_nor_keeps_it(tmp_path: Path) -> None:
    """A server that forks its workers gives them all open files of the visit, its lock too."""
    until, done = os.pipe()
    with ExitStack() as visit:
        visit.enter_context(only_visitor(tmp_path))
        if not (unwinding := os.fork()):
            visit.close()
            os._exit(0)
        os.waitpid(unwinding, 0)
        with pytest.raises(WrongState, match="on a visit"), only_visitor(tmp_path):
            pass
        if not (living := os.fork()):
            os.close(done)
            os.read(until, 1)
            os._exit(0)
    try:
        with only_visitor(tmp_path):
            pass
    finally:
        os.close(done)
        os.close(until)
        os.waitpid(living, 0)


async def test_contributing_lately_leaves_only_the_question_for_releases(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN, PLAN]
    policy = IdlePolicy(**{**_fields(ALWAYS), "min_seconds_between_contributions": 600.0})
    device = bench.device_with_examples(personal=PERSONAL, policy=policy)
    assert (await device.wake()).ending is Ending.CONTRIBUTED
    visit = await device.wake()
    assert visit.ending is Ending.RESTED
    assert any("contributed lately" in reason for reason in visit.reasons)
    bench.clock.instant += 601
    assert (await device.wake()).ending is Ending.CONTRIBUTED


async def test_a_process_that_dies_once_its_report_is_accepted_rests_all_the_same(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN, PLAN]
    policy = IdlePolicy(**{**_fields(ALWAYS), "min_seconds_between_contributions": 600.0})
    steps: list[str] = []

    def dies(step: str) -> None:
        steps.append(step)
        if step == "create state.json" and "remove sealed.bin" in steps:
            raise KeyboardInterrupt

    device = bench.device_with_examples(policy=policy, disk=Disk(dies))
    with pytest.raises(KeyboardInterrupt):
        await device.wake()
    visit = await bench.open(policy=policy).wake()
    assert visit.ending is Ending.RESTED
    assert any("contributed lately" in reason for reason in visit.reasons)


async def test_two_devices_with_the_same_history_draw_different_moments(bench: Bench, tmp_path: Any) -> None:
    bench.channel.down = Unreachable("no answer")
    first = (await bench.open().wake()).next_wake
    bench.home = tmp_path / "other"
    bench.identity = replace(bench.identity, private_key=new_key())
    assert (await bench.open().wake()).next_wake != first


def _fields(policy: IdlePolicy) -> dict[str, Any]:
    return asdict(policy)


def test_importing_the_public_face_gives_what_it_names() -> None:
    assert umbel_client.Device is Device
    assert all(getattr(umbel_client, name) is not None for name in umbel_client.__all__)
    with pytest.raises(AttributeError, match="Devize"):
        _ = umbel_client.Devize
