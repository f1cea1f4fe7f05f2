"""The cohort engine: a scenario's training without its protocol, as fast as this machine can.

    prepare -> [draw a cohort -> train it side by side -> step -> judge now and then] x rounds -> judge each user

The same plan, training graph and strategy as a fleet; no devices that sleep, no messages, no faults: virtual time is
only how long clients train.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from umbel.clock import Clock, SystemClock
from umbel.digests import Digest, digest_of
from umbel.errors import BadInput
from umbel.update import Metrics
from umbel.weights import Weights
from umbel_client.examples import Examples
from umbel_server.json_text import to_text
from umbel_simulations.cohort import checkpoint
from umbel_simulations.cohort.algorithm import Algorithm, Stage, Step
from umbel_simulations.cohort.checkpoint import Checkpoint
from umbel_simulations.cohort.clients import Backend
from umbel_simulations.cohort.fedbuff import FedBuff
from umbel_simulations.cohort.personal import personalise
from umbel_simulations.cohort.pool import Pool
from umbel_simulations.cohort.resident import OnnxBackend
from umbel_simulations.cohort.rounds import evaluate, evaluate_each
from umbel_simulations.cohort.scaffold import Scaffold
from umbel_simulations.cohort.strategies import StrategyRounds, Trains
from umbel_simulations.cohort.team import others_worth, team
from umbel_simulations.engines import Progress
from umbel_simulations.judging import sample
from umbel_simulations.outcome import Outcome, RoundOutcome, Spread, mean_of
from umbel_simulations.scenario import Scenario, to_tree
from umbel_simulations.setting import Setting, prepare

_LOOKS: Final = 50
"""How often, at most, the global model is judged on the way."""
_CHECKPOINT_SECONDS: Final = 5.0
"""How much real time a kill costs, at most, beside the step that was under way."""
_ALGORITHMS: Final[Mapping[str, type[Scaffold] | type[FedBuff]]] = {"scaffold": Scaffold, "fedbuff": FedBuff}


def run(scenario: Scenario, *, workers: int, progress: Progress, folder: Path) -> Outcome:
    """Play a scenario; see `umbel_simulations.engines.Engine`.

    Raises:
        BadInput: the scenario asks for something that only a fleet has, or `folder` is of another run.
        UmbelError: the bundle or the data are refused; see `prepare`.
    """
    require_cohort(scenario)
    return play(scenario, prepare(scenario), workers=workers, progress=progress, folder=folder)


def require_cohort(scenario: Scenario) -> None:
    """Refuse what would change the outcome and isn't played here; faults and rollouts are simply not part of it.

    Raises:
        BadInput: naming what to do instead.
    """
    if scenario.shifts:
        raise BadInput('shifts: only the fleet has a time at which data change; choose engine = "fleet"')
    if scenario.adversaries:
        raise BadInput('adversaries: only the fleet has them; choose engine = "fleet"')
    if scenario.task.privacy.noise_multiplier:
        raise BadInput('task.privacy.noise_multiplier: only a fleet has a helper that adds noise; engine = "fleet"')


def play(
    scenario: Scenario,
    setting: Setting,
    *,
    workers: int,
    progress: Progress,
    folder: Path,
    clock: Clock | None = None,
    trains: Trains | None = None,
) -> Outcome:
    """Play a scenario with a bundle and a federation at hand.

    Args:
        scenario: what to play.
        setting: its bundle and its users.
        workers: threads, or processes where these are quicker; the outcome is the same for any number.
        progress: is told.
        folder: for the checkpoint, and for what processes share.
        clock: only says when to write a checkpoint.
        trains: how a strategy's cohorts get trained; by `workers` on this machine unless given.

    Raises:
        BadInput: `folder` is of another run; or the scenario asks for what its model doesn't have.
        Unavailable: one of its processes ended on the way.
    """
    backend = backend_of(setting, with_drift=scenario.algorithm.kind == "scaffold")
    with Pool(backend, workers) as pool:
        stage = Stage.of(scenario, setting, backend, pool)
        if scenario.algorithm.app:
            weights, rounds, sessions = _by_program(stage, progress)
        else:
            with _algorithm(stage, workers, folder, trains) as algorithm:
                run = _Run(stage, algorithm, progress, folder, clock or SystemClock())
                weights, rounds, sessions = run.to_its_end()
        personal: list[Metrics] = []
        if scenario.algorithm.personalisation != "none":
            personal = personalise(stage, weights, backend_of, workers)
        return _outcome(stage, weights, rounds, sessions, personal)


@contextmanager
def _algorithm(stage: Stage, workers: int, folder: Path, trains: Trains | None) -> Iterator[Algorithm]:
    kind = stage.scenario.algorithm.kind
    if kind != "strategy":
        yield _ALGORITHMS[kind](stage)
    elif trains is not None:
        yield StrategyRounds(stage, trains)
    else:
        with team(stage, others_worth(stage, workers), folder) as trainers:
            yield StrategyRounds(stage, trainers.train)


def backend_of(setting: Setting, *, moving: Collection[str] | None = None, with_drift: bool = False) -> Backend:
    """What a setting's model is trained with: ONNX Runtime, or torch where the setting has a spec instead of graphs."""
    if setting.spec is None:
        return OnnxBackend(setting.bundle, moving=moving, with_drift=with_drift)
    from umbel_simulations.cohort.torch_backend import TorchBackend

    return TorchBackend(setting.bundle, setting.spec, moving=moving, with_drift=with_drift)


@dataclass(slots=True, eq=False)
class _Run:
    """The rounds of one run, from where it stands."""

    stage: Stage
    algorithm: Algorithm
    progress: Progress
    folder: Path
    clock: Clock

    def to_its_end(self) -> tuple[Weights, tuple[RoundOutcome, ...], Counter[str]]:
        """Take all steps that are left; the last weights, what each round was, and how often each client trained."""
        name = name_of(self.stage.scenario)
        weights, rounds = self.stage.setting.bundle.shared_weights(), list[RoundOutcome]()
        sessions: Counter[str] = Counter()
        kept = checkpoint.read(self.folder, name, weights.shapes)
        if kept is not None:
            weights, rounds, sessions = kept.weights, list(kept.rounds), Counter(kept.sessions)
            self.algorithm.restore(kept.memory)
        written, total = self.clock.now(), self.stage.task.rounds
        while len(rounds) < total:
            step = self.algorithm.step(len(rounds) + 1, weights)
            weights = step.weights
            sessions.update(client.name for client in step.cohort)
            rounds.append(self._told(step, rounds))
            if self.clock.now() - written >= _CHECKPOINT_SECONDS or len(rounds) == total:
                Checkpoint(name, weights, self.algorithm.memory(), tuple(rounds), sessions).write(self.folder)
                written = self.clock.now()
        return weights, tuple(rounds), sessions

    def _told(self, step: Step, before: list[RoundOutcome]) -> RoundOutcome:
        number, total = len(before) + 1, self.stage.task.rounds
        opened = before[-1].closed_hour if before else 0.0
        accuracy = loss = None
        if number == total or number % math.ceil(total / _LOOKS) == 0:
            central = self.stage.setting.federation.central
            accuracy, loss = _judged(self.stage, step.weights, central if number == total else sample(central))
        told = RoundOutcome(
            number=number,
            verdict=step.verdict,
            opened_hour=opened,
            closed_hour=opened + step.seconds / 3600,
            invited=len(step.cohort),
            reported=step.reported,
            accuracy=accuracy,
            loss=loss,
            train_loss=step.train_loss,
            reason=step.reason,
        )
        score = "" if accuracy is None else f", accuracy {accuracy:.3f}"
        self.progress.step(number, total, told.closed_hour, f"round {number} {told.verdict}{score}")
        return told


def _by_program(stage: Stage, progress: Progress) -> tuple[Weights, tuple[RoundOutcome, ...], Counter[str]]:
    """The rounds of somebody's own program; the last weights are those that it sent last."""
    # Loads flwr, which takes a second.
    from umbel_simulations.cohort import program

    some, total = sample(stage.setting.federation.central), stage.task.rounds

    def tell(over: RoundOutcome) -> None:
        message = f"round {over.number} {over.verdict}, {over.reported} of {over.invited} reported"
        progress.step(over.number, max(total, over.number), over.closed_hour, message)

    played = program.play(stage, lambda weights: _judged(stage, weights, some), tell)
    return played.weights, tuple(played.rounds), played.sessions


def _judged(stage: Stage, weights: Weights, examples: Examples) -> tuple[float | None, float | None]:
    """Accuracy and loss."""
    metrics = evaluate(stage.pool, stage.backend, weights, examples)
    return mean_of(metrics, "correct"), mean_of(metrics, "loss")


def name_of(scenario: Scenario) -> Digest:
    """What a checkpoint says that it is of: the scenario with its seed, every default written out."""
    return digest_of(to_text(to_tree(scenario)).encode())


def _outcome(
    stage: Stage,
    weights: Weights,
    rounds: tuple[RoundOutcome, ...],
    sessions: Counter[str],
    personal: Sequence[Metrics],
) -> Outcome:
    pool, backend, federation = stage.pool, stage.backend, stage.setting.federation
    last = evaluate(pool, backend, weights, federation.central)
    first = evaluate(pool, backend, stage.setting.bundle.shared_weights(), federation.central)
    spreads = {
        "accuracy": _spread(evaluate_each(pool, backend, weights, federation.clients)),
        "personal_accuracy": _spread(personal),
        # As in a fleet: of the whole run, and of all users, those who were never asked among them.
        "seconds": Spread.of(stage.seconds(client) * sessions[client.name] for client in federation.clients),
        "sessions": Spread.of(float(sessions[client.name]) for client in federation.clients),
    }
    return Outcome(
        scenario=to_tree(stage.scenario),
        engine=stage.scenario.engine,
        seed=stage.scenario.seed,
        hours=rounds[-1].closed_hour,
        rounds=rounds,
        weights=str(digest_of(weights.to_bytes())),
        accuracy=mean_of(last, "correct"),
        loss=mean_of(last, "loss"),
        first_accuracy=mean_of(first, "correct"),
        per_device={name: spread for name, spread in spreads.items() if spread is not None},
        devices=len(federation.clients),
        sessions=sum(one.invited for one in rounds),
        trained=sum(one.invited for one in rounds),
        wasted=sum(one.invited - (one.reported if one.verdict == "accepted" else 0) for one in rounds),
    )


def _spread(metrics: Sequence[Metrics]) -> Spread | None:
    shares = [mean_of(one, "correct") for one in metrics]
    return Spread.of(share for share in shares if share is not None)
