"""Devices that don't do as they should. Each lies through a seam that a real one could lie through.

* sign-flip, scaling: train, and report the delta turned round, or many times as large
* lazy: report without training
* label-flip: train on wrong answers
* nan: seal a report with NaN in it, past its own checks
* replay: report again what was counted before
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from umbel.bundle import Bundle
from umbel.digests import digest_of
from umbel.messages import release_from_bytes, update_to_bytes
from umbel.randomness import generator
from umbel.release import verify_statement
from umbel.runtime import Arrays, EvaluateSession, InferSession, Runtime, TrainSession
from umbel.sealing import Binding, seal
from umbel.update import Update
from umbel.visit import Assignment, ReportBegin
from umbel.weights import Weights
from umbel_client.examples import Examples
from umbel_simulations.world import Adversary


def who_lies(adversaries: tuple[Adversary, ...], devices: int, seed: int) -> dict[int, Adversary]:
    """Which devices are which adversary's, drawn once."""
    order = generator(seed, "adversaries").permutation(devices)
    found: dict[int, Adversary] = {}
    begin = 0
    for adversary in adversaries:
        end = begin + round(adversary.share * devices)
        found |= {int(device): adversary for device in order[begin:end]}
        begin = end
    return found


def lying_runtime(runtime: Runtime, adversary: Adversary) -> Runtime:
    """A runtime whose training ends where the adversary wants it."""
    match adversary.kind:
        case "sign-flip":
            return _Lying(runtime, -1.0)
        case "scaling":
            return _Lying(runtime, adversary.factor)
        case "lazy":
            return _Lying(runtime, 0.0)
        case _:
            return runtime


def flipped(examples: Examples, ends: Mapping[str, float]) -> Examples:
    """The same examples with wrong answers: the opposite ones, such as 0 for 1, or the first class for the last.

    Args:
        examples: what a device has.
        ends: by target, the least and the greatest answer, added up.
    """
    return replace(examples, targets={name: _opposite(array, ends[name]) for name, array in examples.targets.items()})


def _opposite(answers: NDArray[Any], ends: float) -> NDArray[Any]:
    # Classes count from 0: what lies below marks that there is nothing to learn, and no lie would be believed.
    given = answers >= 0 if answers.dtype.kind == "i" else True
    return np.where(given, ends - answers, answers).astype(answers.dtype)


class _Lying:
    """Tells a delta that is `factor` times the honest one."""

    def __init__(self, runtime: Runtime, factor: float) -> None:
        self._runtime, self._factor = runtime, factor

    @property
    def name(self) -> str:
        """The real one's."""
        return self._runtime.name

    def infer(self, bundle: Bundle, weights: Weights) -> InferSession:
        """Honest."""
        return self._runtime.infer(bundle, weights)

    def evaluate(self, bundle: Bundle, weights: Weights) -> EvaluateSession:
        """Honest."""
        return self._runtime.evaluate(bundle, weights)

    def train(
        self,
        bundle: Bundle,
        weights: Weights,
        hyperparameters: Mapping[str, float] | None = None,
        slots: Weights | None = None,
    ) -> TrainSession:
        """Training that ends somewhere else."""
        return _Bent(self._runtime.train(bundle, weights, hyperparameters, slots), weights, self._factor)


class _Bent:
    def __init__(self, session: TrainSession, base: Weights, factor: float) -> None:
        self._session, self._base, self._factor = session, base, factor

    def step(self, inputs: Arrays, targets: Arrays) -> float:
        """One step; a lazy one saves itself the work."""
        return self._session.step(inputs, targets) if self._factor else 0.0

    def weights(self) -> Weights:
        """Base plus the bent delta."""
        honest = self._session.weights()
        base = self._base.subset(list(honest.arrays))
        return base + (honest - base).scaled(self._factor)

    def slots(self) -> Weights:
        """Honest."""
        return self._session.slots()


Report = tuple[ReportBegin, bytes]
Forge = Callable[[ReportBegin, bytes, Assignment | None], Report]
"""(question, sealed bytes, the assignment) -> what is sent instead."""


def honest(begin: ReportBegin, sealed: bytes, assignment: Assignment | None) -> Report:
    """What the device made."""
    del assignment
    return begin, sealed


def not_a_number(release_key: bytes, shapes: Mapping[str, tuple[int, ...]]) -> Forge:
    """Seal NaN for this very round; what is summed in secret can't hold one, so there a bit is turned instead."""

    def forge(begin: ReportBegin, sealed: bytes, assignment: Assignment | None) -> Report:
        if assignment is None:
            return begin, sealed
        if assignment.private_round is not None:
            return _instead(begin, sealed[:-1] + bytes([sealed[-1] ^ 1]))
        base = release_from_bytes(verify_statement(assignment.base, release_key)).bundle
        delta = Weights({name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()})
        update = Update(delta, 1.0, {"loss": 1.0, "examples": 1.0})
        binding = Binding(assignment.task, assignment.round, begin.session_id, begin.report_id, base)
        return _instead(begin, seal(update_to_bytes(update), assignment.sealing, binding))

    return forge


def replaying(kept: list[bytes]) -> Forge:
    """Keep the first report, and send it again for every later session."""

    def forge(begin: ReportBegin, sealed: bytes, assignment: Assignment | None) -> Report:
        del assignment
        if not kept:
            kept.append(sealed)
        return _instead(begin, kept[0])

    return forge


def _instead(begin: ReportBegin, sealed: bytes) -> Report:
    return replace(begin, sealed_size=len(sealed), sealed_digest=digest_of(sealed)), sealed
