"""A device's own time: its clock, wrong or right, and the time that its work takes it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Set
from typing import Any, Final, TypeVar

from numpy.typing import NDArray

from umbel.bundle import Bundle
from umbel.clock import Clock
from umbel.digests import Digest, digest_of
from umbel.runtime import Arrays, EvaluateSession, InferSession, Runtime, TrainSession
from umbel.update import Metrics
from umbel.weights import Weights
from umbel_simulations.fleet.virtual_time import Ahead

T = TypeVar("T")
FORWARD: Final = 1 / 3
"""Work of judging or answering one example, as a share of that of training on it."""
SLOW: Final = 8.0


class DeviceTime:
    """A clock that moves on while the device works, though the work itself is done in one go.

    While it works the fleet's time is not looked at: what work does can depend only on when it began.
    """

    def __init__(self, clock: Clock, error: float) -> None:
        self._clock = clock
        self._error = error
        self._began: float | None = None
        self.spent = 0.0
        self.total = 0.0
        """Seconds of work since it was made."""

    def now(self) -> float:
        """What the device's own clock shows, in POSIX seconds."""
        return self.true() + self._error

    def true(self) -> float:
        """What time it really is."""
        return self._clock.now() if self._began is None else self._began + self.spent

    def begin(self) -> None:
        """Work begins."""
        self._began, self.spent = self._clock.now(), 0.0

    def spend(self, seconds: float) -> None:
        """Work has taken so long."""
        self.spent += seconds

    def end(self) -> float:
        """Work is over; returns what it took in all."""
        self._began = None
        self.total += self.spent
        return self.spent


class Working:
    """A device's `Offload`: work takes virtual time, and may really run on another thread meanwhile.

    Args:
        ahead: the threads.
        time: of this device.
        at_least: asked when work begins: seconds that it will take at least.
        sleep: waits in virtual time.
    """

    def __init__(
        self,
        ahead: Ahead,
        time: DeviceTime,
        at_least: Callable[[], float],
        sleep: Callable[[float], Awaitable[object]],
    ) -> None:
        self._ahead, self._time, self._at_least, self._sleep = ahead, time, at_least, sleep

    async def __call__(self, work: Callable[[], Any], /) -> Any:
        """Run `work` and give its result when its time is over."""
        least = self._at_least()
        self._time.begin()
        try:
            return await self._ahead(work, least)
        finally:
            await self._sleep(self._time.end() - least)


class SharedSessions:
    """A runtime whose sessions for answering serve all devices that hold the same weights.

    A session with its weights in it costs milliseconds to make; in a fleet thousands of devices hold the same.
    """

    def __init__(self, runtime: Runtime, keep: int = 64) -> None:
        self._runtime, self._keep = runtime, keep
        self._kept: OrderedDict[tuple[Digest, Digest], InferSession] = OrderedDict()
        self.name, self.evaluate, self.train = runtime.name, runtime.evaluate, runtime.train

    def infer(self, bundle: Bundle, weights: Weights) -> InferSession:
        """A session that was made before for the same bundle and weights, or a new one."""
        key = bundle.manifest.digest, digest_of(weights.to_bytes())
        session = self._kept.pop(key, None) or self._runtime.infer(bundle, weights)
        self._kept[key] = session
        while len(self._kept) > self._keep:
            self._kept.popitem(last=False)
        return session


class PacedRuntime:
    """A runtime on which each example costs time.

    Args:
        runtime: does the work.
        time: of the device.
        speed: examples that it trains on in a second.
        slow: bundles that take `SLOW` times as long.
    """

    def __init__(self, runtime: Runtime, time: DeviceTime, speed: float, slow: Set[Digest] = frozenset()) -> None:
        self._runtime, self._time, self._seconds, self._slow = runtime, time, 1.0 / speed, slow

    def _of(self, bundle: Bundle) -> float:
        return self._seconds * (SLOW if self._slow and bundle.manifest.digest in self._slow else 1.0)

    @property
    def name(self) -> str:
        """The real one's."""
        return self._runtime.name

    def infer(self, bundle: Bundle, weights: Weights) -> InferSession:
        """Answers that take time."""
        session, seconds = self._runtime.infer(bundle, weights), self._of(bundle)

        def answer(inputs: Arrays) -> dict[str, NDArray[Any]]:
            self._time.spend(_rows(inputs) * seconds * FORWARD)
            return session(inputs)

        return answer

    def evaluate(self, bundle: Bundle, weights: Weights) -> EvaluateSession:
        """Judging that takes time."""
        session, seconds = self._runtime.evaluate(bundle, weights), self._of(bundle)

        def judge(inputs: Arrays, targets: Arrays) -> Metrics:
            self._time.spend(_rows(inputs) * seconds * FORWARD)
            return session(inputs, targets)

        return judge

    def train(
        self,
        bundle: Bundle,
        weights: Weights,
        hyperparameters: Mapping[str, float] | None = None,
        slots: Weights | None = None,
    ) -> TrainSession:
        """Training that takes time."""
        return _PacedTraining(
            self._runtime.train(bundle, weights, hyperparameters, slots), self._time, self._of(bundle)
        )


class _PacedTraining:
    def __init__(self, session: TrainSession, time: DeviceTime, seconds: float) -> None:
        self._session, self._time, self._seconds = session, time, seconds

    def step(self, inputs: Arrays, targets: Arrays) -> float:
        """One step."""
        self._time.spend(_rows(inputs) * self._seconds)
        return self._session.step(inputs, targets)

    def weights(self) -> Weights:
        """As they are now."""
        return self._session.weights()

    def slots(self) -> Weights:
        """As they are now."""
        return self._session.slots()


def _rows(inputs: Arrays) -> int:
    return len(next(iter(inputs.values())))
