"""The versions that answer, loaded.

What channels stand at is loaded, held against its digests and its golden examples, and only then answers, in the place
of what answered before: whoever asks meanwhile neither waits nor loses anything. One that doesn't load leaves the one
before in its place. Other released versions are loaded for whoever asks for them, and a few of them kept.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from umbel.bundle import Bundle
from umbel.clock import Clock, is_recent
from umbel.digests import Digest
from umbel.errors import ModelUnusable, UmbelError, Unavailable
from umbel.listing import ListedRelease
from umbel.manifest import Manifest
from umbel.runtime import InferSession, Runtime
from umbel.runtime.precision import fastest
from umbel.self_check import verify_golden
from umbel_server.passing import tell
from umbel_server.serving.catalogue import USUAL, Catalogue
from umbel_server.surroundings import Offload

QUICK_SECONDS: Final = 0.0005
LOOK_SECONDS: Final = 1.0
AGAIN_SECONDS: Final = 60.0
"""After which one that didn't load is tried again."""
SPARE: Final = 4
"""Versions kept loaded beside those that channels stand at."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """A bundle that can be asked; several versions may have the same."""

    manifest: Manifest
    precision: str
    session: InferSession
    quick: int
    """So many examples are answered within `QUICK_SECONDS`, by a try when it was loaded."""


@dataclass(frozen=True, slots=True)
class Answering:
    """A version, and what answers for it."""

    version: int
    loaded: Loaded


@dataclass(frozen=True, slots=True)
class _Failure:
    error: UmbelError
    at: float


class ServedModels:
    """Which version answers, by model, and by version or channel.

    Args:
        look: what there is to ask for, now.
        bundle: where a version's bundle lies, by its digest.
        runtime: runs the graphs.
        offload: loads them, beside the event loop.
        clock: says when one that failed is tried again.
    """

    def __init__(
        self,
        look: Callable[[], Catalogue],
        bundle: Callable[[Digest], Bundle],
        runtime: Runtime,
        offload: Offload,
        clock: Clock,
    ) -> None:
        self._look = look
        self._bundle = bundle
        self._runtime = runtime
        self._offload = offload
        self._clock = clock
        self.catalogue = Catalogue()
        self.is_ready = False
        """Whether it is known what there is to ask for. One model that doesn't load takes no other out of service."""
        self._loaded: dict[Digest, Loaded] = {}
        self._failed: dict[Digest, _Failure] = {}
        self._loading: dict[Digest, asyncio.Task[Loaded]] = {}
        self.standing: dict[tuple[str, str], Answering] = {}
        """(model, channel) -> what answers for it: its head, or what was before where that doesn't load."""

    async def follow(self) -> None:
        """Keep up with releases, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Load what channels stand at by now; whatever fails, the rest goes on answering as it did."""
        try:
            self.catalogue = self._look()
        except Exception as error:  # noqa: BLE001 - a database that is away takes no answer away
            tell(_log, "can't read what is released", error)
            return
        for model, offered in self.catalogue.models.items():
            for channel, release in offered.channels.items():
                await self._stand(model, channel, release)
        self.standing = {
            (model, channel): answering
            for (model, channel), answering in self.standing.items()
            if model in self.catalogue.models and channel in self.catalogue.models[model].channels
        }
        self._let_go()
        self.is_ready = True

    async def answering(self, model: str, version: str) -> Answering:
        """What answers for a version or a channel; a version that isn't loaded yet is, first.

        Raises:
            NotFound: there is no such model, version or channel.
            ModelUnusable, Unavailable: it is there, but doesn't load, or the coordinator has only just begun to.
        """
        standing = self.standing.get((model, version or USUAL))
        if standing is None and not self.is_ready:
            raise Unavailable("the coordinator has just started and loads its models; ask again in a moment")
        release = self.catalogue.find(model, version)
        return standing or Answering(release.version, await self._get(release))

    def why_not(self, release: ListedRelease) -> str:
        """Why a version can't be asked; "" if it can."""
        failure = self._failed.get(release.bundle)
        return str(failure.error) if failure else ""

    async def _stand(self, model: str, channel: str, release: ListedRelease) -> None:
        try:
            now = Answering(release.version, await self._get(release))
        except UmbelError:
            return
        if self.standing.get((model, channel)) != now:
            _log.info("answers", model=model, channel=channel, version=now.version, precision=now.loaded.precision)
        self.standing[model, channel] = now

    async def _get(self, release: ListedRelease) -> Loaded:
        loaded = self._loaded.pop(release.bundle, None)
        if loaded is not None:
            self._loaded[release.bundle] = loaded  # the last that was used
            return loaded
        failure = self._failed.get(release.bundle)
        if failure is not None and is_recent(failure.at, self._clock.now(), AGAIN_SECONDS):
            raise failure.error.with_traceback(None)  # the same one for each who asks
        if release.bundle not in self._loading:
            self._loading[release.bundle] = asyncio.create_task(self._load(release))
        # Whoever waits may give up; the others who wait for the same, don't.
        return await asyncio.shield(self._loading[release.bundle])

    async def _load(self, release: ListedRelease) -> Loaded:
        try:
            loaded: Loaded = await self._offload(self._read, release)
        except Exception as error:
            refusal = _refusal(release, error)
            self._failed[release.bundle] = _Failure(refusal, self._clock.now())
            raise refusal from error
        finally:
            del self._loading[release.bundle]
        self._failed.pop(release.bundle, None)
        self._loaded[release.bundle] = loaded
        self._let_go()
        return loaded

    def _read(self, release: ListedRelease) -> Loaded:
        bundle = self._bundle(release.bundle)
        bundle.verify()
        verify_golden(self._runtime, bundle)
        session, precision = fastest(self._runtime, bundle, bundle.weights())
        return Loaded(bundle.manifest, precision, session, _quick(session, bundle))

    def _let_go(self) -> None:
        """Forget what nobody has asked for in a while; whoever asks it just now is answered all the same."""
        kept = {release.bundle for release in self.catalogue.heads()}
        spare = [digest for digest in self._loaded if digest not in kept]
        for digest in spare[:-SPARE]:
            del self._loaded[digest]


def _refusal(release: ListedRelease, error: Exception) -> UmbelError:
    """What to tell whoever asks for a version that didn't load; the log gets the rest."""
    told = f"version {release.version} of {release.model!r} doesn't load"
    if isinstance(error, UmbelError):
        _log.error("a version doesn't load", model=release.model, version=release.version, reason=str(error))
        return ModelUnusable(f"{told}: {error}")
    tell(_log, "a version doesn't load", error, model=release.model, version=release.version)
    return Unavailable(f"{told} just now; the coordinator's log tells more. Ask again later")


def _quick(session: InferSession, bundle: Bundle) -> int:
    """How many examples a session answers within `QUICK_SECONDS`: the better of two tries with the golden ones."""
    inputs, taken = bundle.golden().inputs, []
    for _ in range(2):
        began = time.perf_counter()
        session(inputs)
        taken.append(time.perf_counter() - began)
    return int(len(next(iter(inputs.values()))) * QUICK_SECONDS / min(taken))
