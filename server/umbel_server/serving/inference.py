"""Questions to models, and their answers; whoever carries them over the network stands before this.

Models run in threads of their own, so that rounds and rollouts go on meanwhile; but an answer that takes no longer than
the way to a thread and back is made at once. So many questions may wait and no more: whoever comes then is told so
immediately, rather than after its patience has run out.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from numpy.typing import NDArray

from umbel.clock import Clock
from umbel.errors import InputMismatch, UmbelError, Unavailable
from umbel.runtime import Arrays
from umbel_server.serving.served import Answering, Loaded, ServedModels

ANSWERED: Final = "answered"
MAX_QUESTION_BYTES: Final = 16 << 20
"""Of what a model is asked at a time: two dozen photographs as they go into a net."""
QUESTIONS: Final = 32
"""That one connection may have open: gRPC takes each in whole before anybody may say that it is one too many."""
_LOGGED: Final = 200
"""Letters of each of a caller's own words; a record is for counting, and thousands of them wait in memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """What is asked of a model."""

    model: str
    version: str
    """A number, a channel, or "" for `stable`."""
    inputs: Callable[[], Arrays]
    """Reads what was sent, which may take its time; raises `InputMismatch`."""
    examples: int
    """How many, as the caller says; `inputs` raises where that isn't so."""
    outputs: tuple[str, ...] = ()
    """Those that are wanted; none for all."""
    id: str = ""
    """The caller's own name for it."""


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a model answers."""

    version: int
    outputs: dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Inferred:
    """A question as the log tells it: who asked what of which version, and how it went; nothing of what was in it."""

    at: float
    """POSIX seconds, when it came."""
    caller: str
    id: str
    model: str
    asked: str
    """The version or the channel as the caller named it."""
    version: int
    """That answered; 0 if none did."""
    examples: int
    waited: float
    """Seconds until its turn came, and until its version was loaded."""
    ran: float
    """Seconds in the model."""
    outcome: str
    """`answered`, or an error's code."""

    @property
    def answered(self) -> bool:
        """Whether its answer was made."""
        return self.outcome == ANSWERED


class Inference:
    """Answers questions.

    Args:
        served: the versions that answer.
        clock: says when.
        threads: how many answers are made at a time; 0 for as many as this machine has processors.
        waiting: how many questions may be here at a time.
        told: hears of each, after it was answered or refused; must not wait for anything.
    """

    def __init__(
        self, served: ServedModels, clock: Clock, threads: int, waiting: int, told: Callable[[Inferred], None]
    ) -> None:
        self.served = served
        self._clock = clock
        self._pool = ThreadPoolExecutor(threads or os.cpu_count() or 1, "inference")
        self._most = waiting
        self.open = 0
        """Questions that are being answered, or wait."""
        self._told = told

    async def ask(self, caller: str, question: Question) -> Answer:
        """Answer a question.

        Raises:
            NotFound: there is no such model, version or channel.
            InputMismatch: the inputs aren't what the model takes, or it has no such output.
            Unavailable: too many wait already.
            ModelUnusable: the version doesn't load, or the runtime gave up.
        """
        run = _Run(time.perf_counter())
        at, outcome = self._clock.now(), ANSWERED
        try:
            return await self._ask(question, run)
        except UmbelError as error:
            outcome = error.code
            raise
        except BaseException as error:
            outcome = "cancelled" if isinstance(error, asyncio.CancelledError) else UmbelError.code
            raise
        finally:
            asked = (question.id[:_LOGGED], question.model[:_LOGGED], question.version[:_LOGGED])
            self._told(Inferred(at, caller, *asked, run.version, question.examples, run.waited, run.ran, outcome))

    async def _ask(self, question: Question, run: _Run) -> Answer:
        if self.open >= self._most:
            raise Unavailable("too many questions wait already; ask again later")
        self.open += 1
        try:
            answering = await self.served.answering(question.model, question.version)
            run.version = answering.version
            _require_outputs(answering.loaded, question)
            if question.examples <= answering.loaded.quick:
                return run.through(answering, question)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, run.through, answering, question)
        finally:
            self.open -= 1

    def close(self) -> None:
        """Make no more answers; those under way are waited for."""
        self._pool.shutdown(cancel_futures=True)


class _Run:
    """One question on its way, and what it took."""

    def __init__(self, came: float) -> None:
        self._came = came
        self.version = 0
        self.waited = 0.0
        self.ran = 0.0

    def through(self, answering: Answering, question: Question) -> Answer:
        """Have the model answer."""
        self.waited = time.perf_counter() - self._came
        inputs = question.inputs()
        began = time.perf_counter()
        outputs = answering.loaded.session(inputs)
        self.ran = time.perf_counter() - began
        return Answer(answering.version, {name: outputs[name] for name in question.outputs or outputs})


def _require_outputs(loaded: Loaded, question: Question) -> None:
    known = [spec.name for spec in loaded.manifest.outputs]
    unknown = [name for name in question.outputs if name not in known]
    if unknown:
        raise InputMismatch(f"model {question.model!r} has no output {unknown[0][:80]!r}; it has {known}")
