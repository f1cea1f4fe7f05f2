"""Cohorts that a program asks for: one round of a driven task, whose single updates go to the program.

    run_cohort   weights -> a version that is never accepted -> a round of the chosen devices -> wait
    advance      time is up, or the goal was met -> the updates, handed over; nothing is made of them here

Goal, minimum, over-selection and deadline are the task's, as ever. An order lives in memory only: what a restart finds
open, nobody waits for any more, so it is ended and never becomes a version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa
import structlog

from umbel.errors import BadInput, OutOfBounds, UmbelError, WrongState
from umbel.identity import DeviceId
from umbel.manifest import Manifest
from umbel.plan import Kind, Plan
from umbel.successor import successor
from umbel.update import Update
from umbel.weights import Weights
from umbel_server import round_records
from umbel_server.aggregation import Collected, Singles
from umbel_server.closing import collect, commit, measured
from umbel_server.round import Base, Round, RoundKey, RoundState
from umbel_server.runner import Order, TaskRunner
from umbel_server.task import Task, TaskState, plan_to_tree
from umbel_server.versions import CANDIDATE, Lineage, Version, VersionState

Answers = list[tuple[DeviceId, Update]]
_HANDED_OUT = "handed out for a program; never judged"
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class CohortOrder:
    """What a program asks of a cohort: run this plan from these weights, on these devices."""

    plan: Plan
    weights: Weights
    devices: tuple[DeviceId, ...]
    round_number: int
    """The program's own count. Devices draw by the number of the coordinator's round, which nothing repeats."""


async def run_cohort(
    runner: TaskRunner, order: CohortOrder, longest: float | None, wake: Callable[[], None]
) -> Answers:
    """Run one cohort and wait for it; one order at a time, others stand in line.

    Args:
        runner: of a driven task.
        order: what to run, on which devices.
        longest: seconds after which the round ends; the task's deadline, if that is sooner.
        wake: called when there is something to advance.

    Returns:
        Who reported what, in order of acceptance; nothing if fewer than the task's minimum did.

    Raises:
        WrongState: the task isn't driven, isn't running, or was stopped meanwhile.
        OutOfBounds: fewer devices than the task's minimum, or a time that isn't above 0.
        BadInput: a plan that the model can't run.
        WeightsMismatch, NotFinite, GoldenMismatch: weights that make no version of the model.
    """
    async with runner.ordering:
        task = _asked(runner, order, longest)
        async with runner.lock:
            while runner.active is not None:
                # Left open by a program that is gone: one step ends it.
                await _step(runner)
            placed = await _place(runner, task, order)
        wake()
        try:
            return await placed.done
        finally:
            wake()


async def advance(runner: TaskRunner) -> bool:
    """Take one step of a driven task's round, if there is one to take; returns whether there was."""
    async with runner.lock:
        return await _step(runner)


def _asked(runner: TaskRunner, order: CohortOrder, longest: float | None) -> Task:
    task = runner.task
    if not task.driven:
        raise WrongState(f"task {task.name!r} runs its own rounds; create one with driven = true for a program")
    if task.state is not TaskState.RUNNING:
        raise WrongState(f"task {task.name!r} is {task.state.value}; a program can use it only while it runs")
    devices = len(set(order.devices))
    if devices < task.minimum:
        raise OutOfBounds(
            f"{devices} devices asked, but task {task.name!r} counts nothing below {task.minimum}; "
            "sample more of them, or create the task with a lower minimum"
        )
    seconds = task.deadline_seconds if longest is None else min(longest, task.deadline_seconds)
    return replace(task, plan=order.plan, goal=min(task.goal, devices), deadline_seconds=seconds)


async def _place(runner: TaskRunner, task: Task, order: CohortOrder) -> Order:
    """Open the round; its weights are durable before a device hears of it."""
    tools = runner.tools
    with tools.store.reading() as connection:
        newest = tools.registry.newest_accepted(connection, task.model)
    manifest, files = await tools.offload(_bundle_of, runner, newest, order)
    if files:
        tools.registry.keep_successor(manifest, files)
    now = tools.clock.now()
    runner.order = Order(task, frozenset(order.devices), asyncio.get_running_loop().create_future())
    try:
        with tools.store.transaction() as connection:
            number = round_records.last_number(connection, task.name) + 1
            version = tools.registry.version_of(connection, task.model, manifest.digest)
            if version is None:
                version = _hand_out(runner, connection, newest, manifest, number, now)
            release = tools.registry.base_release(connection, version)
            base = Base(version.number, release.number, version.bundle)
            opened = runner.open(connection, RoundKey(task.name, number, task.plan.kind), base, now)
        runner.enter(opened)
    except BaseException:
        runner.order = None
        raise
    return runner.order


def _bundle_of(runner: TaskRunner, newest: Version, order: CohortOrder) -> tuple[Manifest, dict[str, bytes]]:
    """The bundle with the order's weights, and its files that may not be in the blobs yet."""
    parent = runner.tools.registry.bundle(newest.bundle)
    unknown = set(order.plan.hyperparameters) - set(parent.manifest.hyperparameters)
    if unknown and order.plan.kind is Kind.TRAIN:
        known = ", ".join(sorted(parent.manifest.hyperparameters)) or "none"
        raise BadInput(f"model {runner.task.model!r} has no hyper-parameters {sorted(unknown)}; it has {known}")
    if order.weights.to_bytes() == parent.shared_weights().to_bytes():
        return parent.manifest, {}
    return successor(parent, order.weights, runner.tools.runtime)


def _hand_out(
    runner: TaskRunner, connection: sa.Connection, parent: Version, manifest: Manifest, number: int, now: float
) -> Version:
    """A version that rounds may start from and nobody is served: a candidate without a verdict, for good."""
    registry, task = runner.tools.registry, runner.task
    lineage = Lineage(task=task.name, round=number, plan=plan_to_tree(task.plan), verdict=_HANDED_OUT)
    state = VersionState.CANDIDATE
    version = registry.add_version(connection, task.model, parent.number, manifest, lineage, now, state)
    registry.release(connection, version, CANDIDATE, now)
    return version


async def _step(runner: TaskRunner) -> bool:
    held = runner.active
    if held is None:
        return False
    if held.state is not RoundState.COLLECTING:
        await _hand_over(runner, held)
        return True
    now, why = runner.tools.clock.now(), _why_ended(runner)
    after = held.expire(now).close(now)
    if why and after.state is RoundState.COLLECTING:
        after = after.abandon(why, now)
    if after is held:
        return False
    if after.state is RoundState.ABANDONED:
        _log.warning("a cohort came to nothing", round=str(after.key), reason=after.reason)
        _end(runner, held, after, WrongState(why) if why else [])
    else:
        runner.save(held, after, now)
    return True


async def _hand_over(runner: TaskRunner, held: Round) -> None:
    """Give a closed round's updates to the program that waits for them, and end the round."""
    failure: UmbelError
    if why := _why_ended(runner):
        failure = WrongState(why)
    else:
        try:
            collected = await runner.tools.offload(collect, runner, held)
        except UmbelError as error:
            failure = error
        else:
            devices = [session.device for session in held.reports]
            after = held.aggregated(collected.weight, collected.metrics, None)
            _end(runner, held, after.completed(None, runner.tools.clock.now()), _answers(devices, collected))
            return
    reason = f"{failure.code}: {failure}"
    _end(runner, held, held.failed(reason, runner.tools.clock.now()), failure)


def _answers(devices: Sequence[DeviceId], collected: Collected) -> Answers:
    if not isinstance(collected, Singles):
        raise WrongState("a driven task's reports were summed up; its single updates are gone")
    return list(zip(devices, collected, strict=True))


def _end(runner: TaskRunner, held: Round, after: Round, outcome: Answers | UmbelError) -> None:
    now = runner.tools.clock.now()
    also = measured(runner, held.base, after.metrics)
    commit(runner, [(held, after)], runner.record, now, also)
    order, runner.order = runner.order, None
    if order is None or not order.is_wanted:
        return
    if isinstance(outcome, UmbelError):
        order.done.set_exception(outcome)
    else:
        order.done.set_result(outcome)


def _why_ended(runner: TaskRunner) -> str:
    """Why nobody can have what the open round gives; empty while somebody waits."""
    if runner.order is None or not runner.order.is_wanted:
        return "the program that asked for it is gone"
    if runner.task.state is TaskState.DONE:
        return "the task was stopped"
    return ""
