"""From a run that has ended to its `Outcome`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from umbel.bundle import Bundle
from umbel.digests import digest_of
from umbel.identity import DeviceId
from umbel.plan import Kind
from umbel.runtime import Runtime
from umbel.update import Metrics
from umbel.weights import Weights
from umbel_client.examples import Examples
from umbel_client.trainer import TRAIN_EXAMPLES, TRAIN_LOSS
from umbel_server.round import Round, RoundState, SessionState
from umbel_simulations.fleet.crew import Crew
from umbel_simulations.fleet.drift import drift_of
from umbel_simulations.fleet.house import MODEL
from umbel_simulations.fleet.invariants import Audit, file_in_home, release_of
from umbel_simulations.fleet.member import Member, is_away
from umbel_simulations.fleet.rollouts import Played
from umbel_simulations.fleet.sessions import tally
from umbel_simulations.judging import evaluate, sample
from umbel_simulations.outcome import HourOutcome, Outcome, RolloutOutcome, RoundOutcome, Spread, mean_of
from umbel_simulations.scenario import Scenario, to_tree

_VERDICTS: Final = {RoundState.COMPLETED: "accepted", RoundState.FAILED: "refused", RoundState.ABANDONED: "abandoned"}
_MEGABYTE: Final = 1e6


def outcome_of(
    scenario: Scenario,
    crew: Crew,
    members: Mapping[DeviceId, Member],
    audit: Audit,
    available: Sequence[int],
    played: Iterable[Played],
    first: Bundle,
    held: tuple[str, ...],
) -> Outcome:
    """All that a run showed."""
    judge = _Judge(crew, first)
    states = [file_in_home(member, "state.json") for member in members.values()]
    sessions = tally(members.values(), states, audit.rounds, lambda member: is_away(crew, member))
    epoch, ledger = crew.clock.epoch, audit.ledger()
    told = [one for one in audit.rounds if one.key.kind is Kind.TRAIN]
    weights = judge.newest().shared_weights()
    last = judge.metrics(weights)
    rounds = tuple(_spending((_round(one, epoch, judge, crew) for one in told), audit.epsilons()))
    return Outcome(
        scenario=to_tree(scenario),
        engine="fleet",
        seed=scenario.seed,
        hours=round(crew.now() / 3600.0, 6),
        rounds=rounds,
        weights=digest_of(weights.to_bytes()),
        accuracy=mean_of(last, "correct"),
        loss=mean_of(last, "loss"),
        first_accuracy=mean_of(judge.metrics(first.shared_weights()), "correct"),
        per_device=_per_device(crew, scenario, members, states, judge, weights),
        devices=len(members),
        sessions=sum(crew.books.sessions.values()),
        trained=sessions.trained,
        wasted=sessions.wasted,
        dropped=sessions.dropped,
        shapes=dict(sessions.shapes),
        hourly=_hourly(crew, available),
        rollouts=tuple(_rollout(one, members) for one in played),
        drift=drift_of(told, first.manifest.histograms, epoch),
        faults=dict(sorted(crew.books.faults.items())),
        refusals=_refusals(audit.rounds),
        epsilon=ledger.epsilon_spent if ledger and math.isfinite(ledger.epsilon_spent) else 0.0,
        bytes_up=sum(int(state.get("bytes_up", 0)) for state in states),
        bytes_down=sum(int(state.get("bytes_down", 0)) for state in states),
        invariants=held,
    )


class _Judge:
    """Scores weights on what the federation held back."""

    def __init__(self, crew: Crew, first: Bundle) -> None:
        self._crew, self._first = crew, first
        self._sample = sample(crew.federation.central)
        self._known: dict[str, Metrics] = {}

    def newest(self) -> Bundle:
        """The newest accepted version."""
        registry = self._crew.house.parts.coordinator.registry
        with self._crew.house.parts.store.reading() as connection:
            return registry.bundle(registry.newest_accepted(connection, MODEL).bundle)

    def of_version(self, number: int | None) -> Weights | None:
        """A version's weights; None for none."""
        if number is None:
            return None
        operations = self._crew.house.parts.coordinator.operations
        return operations.bundle(MODEL, number).shared_weights()

    def metrics(self, weights: Weights) -> Metrics:
        """Over all of it."""
        name = digest_of(weights.to_bytes())
        if name not in self._known:
            self._known[name] = self._evaluated(weights, self._crew.federation.central)
        return self._known[name]

    def on_the_way(self, weights: Weights | None) -> Metrics:
        """Over a sample, unless these weights have been judged on all of it; nothing for none."""
        if weights is None:
            return {}
        return self._known.get(digest_of(weights.to_bytes())) or self._evaluated(weights, self._sample)

    def accuracy(self, weights: Weights, examples: Examples) -> float | None:
        """Share of right answers among examples of somebody's."""
        return mean_of(self._evaluated(weights, examples), "correct")

    def _evaluated(self, weights: Weights, examples: Examples) -> Metrics:
        runtime: Runtime = self._crew.runtime
        own = self._first.weights()
        return evaluate(self._first, Weights({**own.arrays, **weights.arrays}), examples, runtime)


def _round(held: Round, epoch: float, judge: _Judge, crew: Crew) -> RoundOutcome:
    metrics = judge.on_the_way(judge.of_version(held.version) if held.state is RoundState.COMPLETED else None)
    count = held.metrics.get(TRAIN_EXAMPLES, 0.0)
    summary = crew.house.parts.coordinator.operations.round(held.key.task, held.key.number)
    return RoundOutcome(
        number=held.key.number,
        verdict=_VERDICTS.get(held.state, held.state.value),
        opened_hour=_hour(held.opened_at, epoch),
        closed_hour=_hour(crew.clock.now() if held.ended_at is None else held.ended_at, epoch),
        invited=len(held.sessions),
        reported=len(held.reports),
        accuracy=mean_of(metrics, "correct"),
        loss=mean_of(metrics, "loss"),
        train_loss=held.metrics[TRAIN_LOSS] / count if count else None,
        bytes_up=held.bytes_up,
        bytes_down=summary.bytes_down,
        reason=held.reason,
    )


def _spending(rounds: Iterable[RoundOutcome], epsilons: Mapping[int, float]) -> Iterator[RoundOutcome]:
    """Rounds with what had been spent by then; one that was never private cost nothing."""
    spent = 0.0
    for one in rounds:
        now = epsilons.get(one.number, spent)
        spent = now if math.isfinite(now) else 0.0
        yield replace(one, epsilon=spent)


def _hour(at: float, epoch: float) -> float:
    return round((at - epoch) / 3600.0, 6)


def _per_device(
    crew: Crew,
    scenario: Scenario,
    members: Mapping[DeviceId, Member],
    states: Sequence[Mapping[str, Any]],
    judge: _Judge,
    weights: Weights,
) -> dict[str, Spread]:
    part = scenario.population
    clients = crew.federation.clients[: len(members)]
    scores = [judge.accuracy(weights, client.held_back) for client in clients]
    personal = [(state.get("scores") or {}).get("personal") for state in states]
    up, down = ([float(state.get(name, 0)) for state in states] for name in ("bytes_up", "bytes_down"))
    seconds = [member.seconds for member in members.values()]
    joules = [
        spent * part.watts
        + sent / _MEGABYTE * part.joules_per_megabyte_up
        + got / _MEGABYTE * part.joules_per_megabyte_down
        for spent, sent, got in zip(seconds, up, down, strict=True)
    ]
    spreads = {
        "accuracy": Spread.of(score for score in scores if score is not None),
        "personal_accuracy": Spread.of(score for score in personal if score is not None),
        "seconds": Spread.of(seconds),
        "bytes_up": Spread.of(up),
        "bytes_down": Spread.of(down),
        "joules": Spread.of(joules),
        "sessions": Spread.of(float(member.sessions) for member in members.values()),
    }
    return {name: spread for name, spread in spreads.items() if spread is not None}


def _hourly(crew: Crew, available: Sequence[int]) -> tuple[HourOutcome, ...]:
    books = crew.books
    return tuple(
        HourOutcome(hour, count, books.check_ins[hour], books.sessions[hour], books.reports[hour])
        for hour, count in enumerate(available)
    )


def _refusals(rounds: Iterable[Round]) -> dict[str, int]:
    refused: Counter[str] = Counter()
    for held in rounds:
        refused.update(one.detail for one in held.sessions.values() if one.state is SessionState.FAILED)
    return dict(sorted(refused.items()))


def _rollout(played: Played, members: Mapping[DeviceId, Member]) -> RolloutOutcome:
    words = {"succeeded": "completed", "rolled-back": "rolled-back", "paused": "paused"}
    ending = "not-begun" if played.started is None else words.get(played.stage, "running")
    return RolloutOutcome(
        release=played.release,
        content=played.plan.content,
        ending=ending,
        started_hour=None if played.started is None else round(played.started, 6),
        ended_hour=None if played.ended is None else round(played.ended, 6),
        devices_reached=played.reached,
        devices_left=sum(release_of(member) in played.numbers for member in members.values()),
        cleared_hour=round(played.ended, 6) if played.is_cleared and played.ended is not None else None,
        events=tuple(played.events),
    )
