"""The server's side: a real coordinator (and helper), built from a folder, killed and built again.

Devices reach it through `call` and `stream`: bytes in, bytes out, through the very handlers that gRPC would call, with
the same limits and the same errors. Only the transport is missing.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn

import structlog
from google.protobuf.message import Message

from umbel.clock import Clock
from umbel.digests import Digest
from umbel.errors import OutOfBounds, UmbelError, Unreachable, from_code
from umbel.identity import DeviceId
from umbel.messages import parse
from umbel_server.app import Parts, build
from umbel_server.beat import Beat
from umbel_server.closing import collect
from umbel_server.folder import Folder
from umbel_server.gateway import DeviceGateway
from umbel_server.rpc import MAX_MESSAGE_BYTES, Requests
from umbel_server.settings import Settings
from umbel_server.surroundings import Surroundings
from umbel_server.task import Task
from umbel_simulations.fleet.entropy import Told
from umbel_simulations.fleet.faults import Plug, ProcessKilled
from umbel_simulations.fleet.helper_house import HelperHouse
from umbel_simulations.fleet.virtual_time import at_once
from umbel_simulations.scenario import Scenario

MODEL: Final = "simulated"
POPULATION: Final = "simulated"
OPERATOR: Final = "operator:simulation"
SECOND: Final = "operator:second"
BEAT: Final = Beat(tick=5.0, flush=30.0, steer=60.0, look=6 * 3600.0, witness=6 * 3600.0)
"""Slower than in production, where it costs nothing to look twice a second."""
CALM: Final = replace(BEAT, flush=300.0, steer=3600.0)
"""Where there is no rollout to steer."""
_SHORTEST_SECONDS: Final = 30.0


class House:
    """A coordinator that may die.

    Args:
        folder: where it keeps everything.
        scenario: what to run.
        clock: virtual.
        counts: is told of crashes.
        failures: tracebacks of what went wrong inside: there must be none.
    """

    def __init__(
        self, folder: Path, scenario: Scenario, clock: Clock, counts: Counter[str], failures: list[str]
    ) -> None:
        self._folder, self._scenario, self._clock = folder, scenario, clock
        self._counts = counts
        self._background: set[asyncio.Task[Any]] = set()
        self._dies_combining: list[float] = []
        """For how many seconds it stays away, each time that is still to come."""
        self._down_seconds = 5.0
        self.generation = 0
        self.outages = 0
        """How many there are at this moment: it runs, and nobody gets through."""
        self.slow_bundles: set[Digest] = set()
        """Versions whose graphs take a multiple of the usual time."""
        self.failures = failures
        Folder.create(folder, (), clock.now())
        part = scenario.population
        idle = part.check_in_hours * 3600.0
        self._settings = Settings(
            state=folder,
            durable=False,
            pace_shortest_seconds=min(_SHORTEST_SECONDS, idle),
            pace_idle_seconds=idle,
            pace_steering=scenario.server.pace_steering,
            adaptive_deadlines=scenario.server.adaptive_deadline,
        )
        self.helper: HelperHouse | None = None
        if scenario.task.privacy.on:
            self.helper = HelperHouse(folder / "helper.sqlite", scenario, clock, Folder(folder).signer(), counts)
        self._build()

    def task(self) -> Task:
        """The scenario's task; versions reach devices by rollouts only, so that these have the say."""
        return replace(self._scenario.server_task(population=POPULATION, model=MODEL), channel="")

    # Its life.

    def now(self) -> float:
        """The date."""
        return self._clock.now()

    def start(self) -> None:
        """Let its rounds go on."""
        self._rounds = asyncio.create_task(self.parts.coordinator.run())
        self._rounds.add_done_callback(partial(self._rounds_ended, self.generation))

    async def stop(self) -> None:
        """End it in order, and all that was still on its way."""
        for task in (self._rounds, *self._background):
            task.cancel()
        await asyncio.gather(self._rounds, *self._background, return_exceptions=True)

    def close(self) -> None:
        """Let go of its files."""
        self.parts.store.close()
        if self.helper is not None:
            self.helper.close()

    @property
    def is_up(self) -> bool:
        """Whether there is a process that could answer."""
        return not self._plug.is_pulled

    @property
    def reachable(self) -> bool:
        """Whether anybody gets through to it."""
        return not self.outages

    def kill(self, steps: int, down_seconds: float) -> None:
        """Have it die at a durable step, so many from now, and come back after `down_seconds`."""
        self._down_seconds = down_seconds
        self._plug.pull_in(steps)

    def kill_combining(self, down_seconds: float) -> None:
        """Have it die when it has combined a sum, before it could write it down: the next one that isn't taken yet."""
        self._dies_combining.append(down_seconds)

    def spared(self) -> AbstractContextManager[None]:
        """While in here it isn't killed; it is right after, if that is due."""
        return self._plug.held()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Something that goes on by itself, such as a message that comes twice."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _build(self) -> None:
        self._plug = Plug()
        around = Surroundings(
            offload=self._offload,
            chance=Told(self._scenario.seed, f"coordinator/{self.generation}"),
            on_step=self._plug,
            beat=BEAT if self._scenario.rollouts else CALM,
            helper=self.helper,
        )
        self.parts: Parts = build(self._settings, self._clock, around)
        self._methods = DeviceGateway(self.parts.coordinator, self.parts.access).service()

    async def _offload(self, function: Callable[..., Any], *arguments: Any) -> Any:
        result = await at_once(function, *arguments)
        if self._dies_combining and function is collect:
            self._down_seconds = self._dies_combining.pop(0)
            self._plug.pull()
        return result

    def _rounds_ended(self, generation: int, task: asyncio.Task[None]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, ProcessKilled):
            self._died(generation)
        elif error is not None:
            self.failures.append("".join(traceback.format_exception(error)))

    def _died(self, dead: int) -> None:
        """Notice that a process is gone, once, and have another one started later."""
        if dead != self.generation:
            # More than one of its tasks came to the step at which it died, some when the next one was up already.
            return
        self.generation += 1
        self._counts["coordinator killed"] += 1
        self._rounds.cancel()
        self.spawn(self._come_back())

    async def _come_back(self) -> None:
        await asyncio.sleep(self._down_seconds)
        self.parts.store.close()
        self._build()
        self.start()

    # What devices call.

    async def call(self, method: str, device: DeviceId, sent: bytes) -> bytes:
        """One message for one message.

        Raises:
            UmbelError: as it would come out of a gRPC call.
        """
        self._require_up()
        generation = self.generation
        try:
            function: Any = self._methods.methods[method]
            message: Message = await function(self._caller(device), parse(_request(method, self._methods), sent))
            return _bounded(message)
        except ProcessKilled:
            self._died(generation)
            raise Unreachable("the coordinator died during the call") from None
        except Exception as error:
            raise self._as_sent(method, error) from error

    async def stream(self, method: str, device: DeviceId, sent: bytes | Requests) -> AsyncGenerator[bytes, None]:
        """Messages for one message, or for many; errors as in `call`."""
        self._require_up()
        generation = self.generation
        request: Any = sent
        kind = _request(method, self._methods)
        request = parse(kind, sent) if isinstance(sent, bytes) else _parsed(kind, sent)
        try:
            function: Any = self._methods.methods[method]
            async for message in function(self._caller(device), request):
                yield _bounded(message)
                self.require_same(generation)
        except ProcessKilled:
            self._died(generation)
            raise Unreachable("the coordinator died during the call") from None
        except Exception as error:
            raise self._as_sent(method, error) from error

    def require_same(self, generation: int) -> None:
        """Raise `Unreachable` unless the process that began a conversation is the one that is there now."""
        if generation != self.generation or not self.reachable:
            raise Unreachable("the connection to the coordinator broke")

    def _caller(self, device: DeviceId) -> Any:
        return self.parts.access.known(device, POPULATION)

    def _require_up(self) -> None:
        if not self.is_up or not self.reachable:
            raise Unreachable("nobody answers at the coordinator's address")

    def _as_sent(self, method: str, error: Exception) -> UmbelError:
        if not isinstance(error, UmbelError):
            self.failures.append(f"{method}: " + "".join(traceback.format_exception(error)))
            return UmbelError("the coordinator failed inside; its log tells more. Try again later")
        return from_code(error.code, str(error)[:1000])


def _request(method: str, service: Any) -> type[Message]:
    kind: type[Message] = service.descriptor.methods_by_name[method].input_type._concrete_class
    return kind


async def _parsed(kind: type[Message], sent: AsyncIterator[bytes]) -> AsyncIterator[Message]:
    async for data in sent:
        yield parse(kind, data)


def _bounded(message: Message) -> bytes:
    data = message.SerializeToString()
    if len(data) > MAX_MESSAGE_BYTES:
        raise OutOfBounds(f"a message of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    return data


@contextmanager
def listening() -> Iterator[list[str]]:
    """Keep the product's log out of a simulation, but for what is an error there: that is gathered."""
    heard: list[str] = []

    def hear(logger: object, level: str, event: MutableMapping[str, Any]) -> NoReturn:
        error = event.get("exc_info")
        found = sys.exc_info()[1] if error is True else error
        words = "".join(traceback.format_exception(found)) if isinstance(found, BaseException) else ""
        heard.append(f"{event.get('event')}: {words}")
        raise structlog.DropEvent

    before = structlog.get_config()
    wrapper = structlog.make_filtering_bound_logger(logging.ERROR)
    structlog.configure(wrapper_class=wrapper, processors=[hear], cache_logger_on_first_use=False)
    try:
        yield heard
    finally:
        structlog.configure(**before)
