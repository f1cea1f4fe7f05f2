"""What moves a task on when no device asks: deadlines, closing a round, the verdict, the next round.

    COLLECTING   time is up, or the goal was met        -> AGGREGATING, or ABANDONED and a new round
    AGGREGATING  sum -> strategy -> candidate -> judge  -> COMPLETED with a version, or FAILED; and a new round
                 with `evaluate_candidates`             -> VALIDATING, and an EVALUATE round of the candidate;
                                                           its metrics then decide

Blobs are written first. Then one transaction holds everything: version, lineage, release, strategy state, the round's
end, audit rows and the next round. Dying anywhere before its commit means doing the same again, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import sqlalchemy as sa

from umbel.digests import Digest
from umbel.errors import AlreadyExists, BudgetSpent, UmbelError, Unavailable
from umbel.plan import Kind
from umbel.update import Metrics
from umbel_server import audit, round_records, task_records
from umbel_server.adaptive_clip import next_clip
from umbel_server.aggregation import Collected, Presummed
from umbel_server.candidate import Candidate, Parent, make_candidate
from umbel_server.round import Base, Round, RoundKey, RoundState
from umbel_server.runner import TaskRunner
from umbel_server.task import TaskState, plan_to_tree
from umbel_server.task_records import TaskRecord
from umbel_server.validation import TRAINING_METRICS, CandidateFacts, Comparison, Refused, Verdict, judge_candidate
from umbel_server.versions import CANDIDATE, TRAINING, Lineage, Version, VersionState

Change = tuple[Round, Round]
"""A round before and after."""


async def advance(runner: TaskRunner) -> bool:
    """Take one step, if there is one to take; returns whether there was."""
    async with runner.lock:
        held = runner.active
        if held is None:
            return _open_if_wanted(runner)
        if held.state is RoundState.COLLECTING:
            if runner.waits_for_helper and await _agreed(runner):
                return True
            return runner.active is held and _look_at_the_time(runner, held)
        if held.key.kind is Kind.EVALUATE:
            return await _close_evaluation(runner, held)
        return await _close_training(runner, held)


async def _agreed(runner: TaskRunner) -> bool:
    """Whether the helper has just agreed to the active round; if not, it is asked again at the next tick."""
    try:
        await runner.agree()
    except (AlreadyExists, BudgetSpent) as error:
        _end_unagreed(runner, error)
        # One number a tick after going back to a backup, until it is one that the helper hasn't had.
        return isinstance(error, BudgetSpent)
    except UmbelError as error:
        runner.tools.private.held_up(runner.task.name, error)
        return False
    return True


def _end_unagreed(runner: TaskRunner, error: UmbelError) -> None:
    """The round ends before it began; where there is no budget for it, the task pauses until somebody decides."""
    held, now, record = runner.active, runner.tools.clock.now(), runner.record
    if held is None:
        return
    after, training = held.abandon(str(error), now), runner.rounds.get(Kind.TRAIN)
    if held.key.kind is Kind.EVALUATE and training is not None:
        # The training round that follows will find no budget either, and pause the task.
        _decide(runner, training, (held, after), Refused(f"its evaluation can't begin: {error}"), {}, now)
        return
    if isinstance(error, BudgetSpent) and runner.task.state is TaskState.RUNNING:
        record = replace(record, task=runner.task.paused())
    commit(runner, [(held, after)], record, now)


def _may_wait(runner: TaskRunner, held: Round) -> bool:
    """Whether a private round may go on waiting for the helper's answer; afterwards its shares are deleted."""
    agreed = runner.agreed.get(held.key)
    return agreed is not None and runner.tools.clock.now() <= agreed.descriptor.not_after


def _open_if_wanted(runner: TaskRunner) -> bool:
    if not runner.record.wants_a_round:
        return False
    commit(runner, [], runner.record, runner.tools.clock.now())
    return True


def _look_at_the_time(runner: TaskRunner, held: Round) -> bool:
    now = runner.tools.clock.now()
    after = held.expire(now).close(now)
    if runner.task.state is TaskState.DONE and after.state is RoundState.COLLECTING:
        after = held.abandon("the task was stopped", now)
    if after is held:
        return False
    training = runner.rounds.get(Kind.TRAIN)
    if after.state is not RoundState.ABANDONED:
        runner.save(held, after, now)
    elif held.key.kind is Kind.EVALUATE and training is not None:
        _decide(runner, training, (held, after), Refused(f"its evaluation was abandoned: {after.reason}"), {}, now)
    else:
        commit(runner, [(held, after)], runner.record, now)
    return True


# A TRAIN round.


@dataclass(frozen=True, slots=True)
class _Made:
    """A candidate all of whose files are durable."""

    candidate: Candidate
    strategy_state: Digest | None


async def _close_training(runner: TaskRunner, held: Round) -> bool:
    collected = await _collected(runner, held)
    if collected is None:
        return False
    if isinstance(collected, Round):
        commit(runner, [(held, collected)], _judged(runner.record), runner.tools.clock.now())
        return True
    made = await runner.tools.offload(_make, runner, held, collected, _recent_norms(runner))
    if isinstance(made, _Made):
        _publish(runner, held, collected, made)
        return True
    now = runner.tools.clock.now()
    after = held.aggregated(collected.weight, collected.metrics, None).failed(made.reason, now)
    # The votes on the clip count whatever became of the candidate: they are released.
    commit(
        runner,
        [(held, after)],
        _judged(_reclipped(runner.record, collected)),
        now,
        measured(runner, held.base, collected.metrics),
    )
    return True


async def _collected(runner: TaskRunner, held: Round) -> Collected | Round | None:
    """A closed round's reports, folded, or the round as it failed; None while the helper may still answer."""
    tools, task = runner.tools, runner.task
    try:
        async with tools.at_helper if task.updates_private else nullcontext():
            collected: Collected = await tools.offload(collect, runner, held)
    except UmbelError as error:
        if isinstance(error, Unavailable) and _may_wait(runner, held):
            tools.private.held_up(task.name, error)
            return None
        return held.failed(f"{error.code}: {error}", tools.clock.now())
    if task.updates_private:
        tools.private.answered(task.name)
    return collected


def collect(runner: TaskRunner, held: Round) -> Collected:
    """A closed round's reports, folded; raises what folding again may raise."""
    return runner.fold.up_to_date(runner.asked, held).close()


def _make(runner: TaskRunner, held: Round, collected: Collected, recent_norms: tuple[float, ...]) -> _Made | Refused:
    tools, task = runner.tools, runner.task
    parent = Parent(
        bundle=tools.registry.bundle(held.base.bundle),
        strategy_state=tools.blobs.state(task.name, runner.record.strategy_state),
        steps=runner.record.steps,
        recent_norms=recent_norms,
        held_out=tools.blobs.holdout(task.validation.holdout),
    )
    made = make_candidate(parent, collected, task.strategy, task.validation, tools.runtime)
    if isinstance(made, Refused):
        return made
    tools.registry.keep_successor(made.manifest, made.files)
    return _Made(made, tools.blobs.put_state(task.name, made.strategy_state))


def _publish(runner: TaskRunner, held: Round, collected: Collected, made: _Made) -> None:
    """Write the version: accepted at once, or a candidate that devices will measure."""
    now, registry = runner.tools.clock.now(), runner.tools.registry
    record = _reclipped(runner.record, collected)
    waits = runner.task.evaluate_candidates
    measure = measured(runner, held.base, collected.metrics)
    state = VersionState.CANDIDATE if waits else VersionState.ACCEPTED
    lineage = _lineage(runner, held, collected, made, verdict="" if waits else "accepted")
    with runner.tools.store.transaction() as connection:
        measure(connection)
        manifest = made.candidate.manifest
        version = registry.add_version(connection, runner.task.model, held.base.version, manifest, lineage, now, state)
        after = held.aggregated(collected.weight, collected.metrics, version.number)
        if waits:
            release = registry.release(connection, version, CANDIDATE, now)
            round_records.set_pending_state(connection, held.key, made.strategy_state)
            base = Base(version.number, release.number, version.bundle)
            key = RoundKey(held.key.task, held.key.number, Kind.EVALUATE)
            opened = _write(runner, connection, [(held, after)], record, now, (key, base))
        else:
            record = _stepped(record, made.strategy_state)
            changes = [(held, after.completed(version.number, now))]
            _release(runner, connection, version, now)
            opened = _write(runner, connection, changes, record, now)
    if waits:
        runner.record = record
        runner.rounds[Kind.TRAIN] = after
        runner.tell_of(held, after, now)
        runner.fold.forget()
        _entered(runner, opened)
    else:
        _settled(runner, changes, record, opened, now)


def _lineage(runner: TaskRunner, held: Round, collected: Collected, made: _Made, verdict: str) -> Lineage:
    task = runner.task
    return Lineage(
        task=task.name,
        round=held.key.number,
        cohort=collected.count,
        weight=collected.weight,
        strategy=task.strategy.name,
        plan=plan_to_tree(task.plan_for(Kind.TRAIN)),
        step_norm=made.candidate.facts.step_norm,
        verdict=verdict,
    )


# An EVALUATE round.


async def _close_evaluation(runner: TaskRunner, held: Round) -> bool:
    training = runner.rounds.get(Kind.TRAIN)
    collected = await _collected(runner, held)
    if collected is None:
        return False
    now = runner.tools.clock.now()
    if isinstance(collected, Round):
        if training is None:
            commit(runner, [(held, collected)], _judged(runner.record), now)
        else:
            reason = f"its evaluation failed: {collected.reason}"
            _decide(runner, training, (held, collected), Refused(reason), {}, now)
        return True
    after = held.aggregated(collected.weight, collected.metrics, held.base.version).completed(held.base.version, now)
    if training is None:
        commit(runner, [(held, after)], _judged(runner.record), now, measured(runner, held.base, collected.metrics))
        return True
    facts = _facts(runner, training, collected.metrics)
    verdict = judge_candidate(facts, runner.task.validation)
    _decide(runner, training, (held, after), verdict, collected.metrics, now)
    return True


def _facts(runner: TaskRunner, training: Round, metrics: Metrics) -> CandidateFacts:
    # What the server saw itself was judged before the candidate went out; only the devices' word is new.
    with runner.tools.store.reading() as connection:
        version = runner.tools.registry.version(connection, runner.task.model, training.version or 0)
    compared = Comparison(candidate=metrics, parent=training.metrics)
    return CandidateFacts(True, version.lineage.step_norm, _recent_norms(runner), federated=compared)


def _decide(
    runner: TaskRunner, training: Round, evaluation: Change, verdict: Verdict, metrics: Metrics, now: float
) -> None:
    """Settle the candidate of a training round."""
    registry, number = runner.tools.registry, training.version or 0
    with runner.tools.store.transaction() as connection:
        version = registry.version(connection, runner.task.model, number)
        if metrics:
            measured(runner, evaluation[0].base, metrics)(connection)
            version = registry.version(connection, runner.task.model, number)
        if isinstance(verdict, Refused):
            registry.settle(connection, version, VersionState.REFUSED, verdict.reason)
            after, record = training.failed(verdict.reason, now), _judged(runner.record)
        else:
            registry.settle(connection, version, VersionState.ACCEPTED, "accepted")
            after = training.completed(number, now)
            record = _stepped(runner.record, round_records.pending_state(connection, training.key))
            _release(runner, connection, version, now)
        round_records.set_pending_state(connection, training.key, None)
        changes = [evaluation, (training, after)]
        opened = _write(runner, connection, changes, record, now)
    _settled(runner, changes, record, opened, now)


# One transaction, then memory.


def commit(
    runner: TaskRunner,
    changes: Sequence[Change],
    record: TaskRecord,
    now: float,
    also: Callable[[sa.Connection], None] = lambda connection: None,
) -> None:
    """Write ends of rounds, what stands beside them and the next round in one transaction, then take it all up."""
    with runner.tools.store.transaction() as connection:
        also(connection)
        opened = _write(runner, connection, changes, record, now)
    _settled(runner, changes, record, opened, now)


def _write(
    runner: TaskRunner,
    connection: sa.Connection,
    changes: Sequence[Change],
    record: TaskRecord,
    now: float,
    next_one: tuple[RoundKey, Base] | None = None,
) -> Round | None:
    for before, after in changes:
        round_records.save(connection, before, after, now)
    if record != runner.record:
        task_records.update(connection, record)
        if record.task.state is not runner.task.state:
            audit.append(connection, now, audit.COORDINATOR, f"task.{record.task.state.value}", record.task.name)
    if next_one is not None:
        return runner.open(connection, *next_one, now)
    return runner.open_next(connection, record, now)


def _settled(
    runner: TaskRunner, changes: Sequence[Change], record: TaskRecord, opened: Round | None, now: float
) -> None:
    runner.record = record
    for before, after in changes:
        runner.rounds[after.key.kind] = after
        runner.tell_of(before, after, now)
    for _, after in changes:
        if after.state.is_over:
            runner.leave(after)
    runner.tools.blobs.keep_states(record.task.name, record.strategy_state)
    _entered(runner, opened)


def _entered(runner: TaskRunner, opened: Round | None) -> None:
    if opened is not None:
        runner.enter(opened)


# Small parts.


def _judged(record: TaskRecord) -> TaskRecord:
    """One more round has had its verdict; the last one ends the task."""
    judged = replace(record, judged_rounds=record.judged_rounds + 1)
    if judged.judged_rounds >= record.task.rounds and record.task.state is not TaskState.DONE:
        return replace(judged, task=record.task.done())
    return judged


def _stepped(record: TaskRecord, state: Digest | None) -> TaskRecord:
    """And its candidate was accepted: the strategy has taken a step."""
    return replace(_judged(record), steps=record.steps + 1, strategy_state=state)


def _reclipped(record: TaskRecord, collected: Collected) -> TaskRecord:
    """With the clip that follows from the cohort's votes, where it moves."""
    within = collected.within_clip if isinstance(collected, Presummed) else None
    if within is None:
        return record
    task = record.task
    return replace(record, clip_norm=next_clip(record.clip, within, task.privacy, task.plan))


def _release(runner: TaskRunner, connection: sa.Connection, version: Version, now: float) -> None:
    """An accepted version goes out: for the next rounds to start from, and to the task's own channel."""
    runner.tools.registry.release(connection, version, TRAINING, now)
    if runner.task.channel:
        runner.tools.publish(connection, version, runner.task.channel, now)
    body = {"round": version.lineage.round, "task": version.lineage.task, "bundle": version.bundle}
    subject = f"{version.model}/{version.number}"
    audit.append(connection, now, audit.COORDINATOR, "version.accepted", subject, body)


def measured(runner: TaskRunner, base: Base, metrics: Metrics) -> Callable[[sa.Connection], None]:
    """Keep what a cohort measured of the version it started from."""
    of_base = {name: value for name, value in metrics.items() if name not in TRAINING_METRICS}

    def write(connection: sa.Connection) -> None:
        if of_base:
            runner.tools.registry.measured(connection, runner.task.model, base.version, of_base)

    return write


def _recent_norms(runner: TaskRunner) -> tuple[float, ...]:
    """Step norms of the task's accepted versions, newest last."""
    history = runner.task.validation.history
    with runner.tools.store.reading() as connection:
        found = runner.tools.registry.versions(connection, runner.task.model, limit=4 * history)
    accepted = [version for version in found if version.state is VersionState.ACCEPTED]
    own = [version.lineage.step_norm for version in accepted if version.lineage.task == runner.task.name]
    return tuple(reversed(own[:history]))
