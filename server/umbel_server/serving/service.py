"""The whole of serving for one coordinator: what there is to ask for, who follows it, and what is written down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from umbel.clock import Clock
from umbel.runtime.onnx import OnnxRuntime
from umbel_server import heads
from umbel_server.registry import Registry
from umbel_server.releases import ReleaseDesk
from umbel_server.rollout_spec import Audience
from umbel_server.serving.catalogue import Catalogue, Offered
from umbel_server.serving.inference import Inference, Inferred
from umbel_server.serving.log import InferenceLog
from umbel_server.serving.served import ServedModels
from umbel_server.settings import Settings
from umbel_server.store import Store


class ModelService:
    """Released models, for programs to ask.

    Args:
        settings: how many questions at a time, and how long records are kept.
        store: knows what channels stand at.
        registry: knows where bundles lie.
        desk: knows what is signed.
        clock: says when.
        folder: for records of questions.
    """

    def __init__(
        self, settings: Settings, store: Store, registry: Registry, desk: ReleaseDesk, clock: Clock, folder: Path
    ) -> None:
        self._log = InferenceLog(folder, settings.inference_log_days) if settings.inference_log_days else None
        self.served = ServedModels(
            lambda: catalogue(store, desk), registry.bundle, OnnxRuntime(), asyncio.to_thread, clock
        )
        threads, waiting = settings.inference_threads, settings.inference_waiting
        self.inference = Inference(self.served, clock, threads, waiting, self._tell)
        self._following: asyncio.Task[None] | None = None
        self._told: list[Callable[[Inferred], None]] = [self._log.put] if self._log else []

    @property
    def dropped(self) -> int:
        """Records of questions that were never written."""
        return self._log.dropped if self._log else 0

    def tell(self, who: Callable[[Inferred], None]) -> None:
        """Have somebody else hear of each question too."""
        self._told.append(who)

    def start(self) -> None:
        """Load what channels stand at, and keep up with it; nobody else has to wait for that."""
        self._following = asyncio.create_task(self.served.follow(), name="serving")

    async def stop(self) -> None:
        """Once nobody can ask any more: end what follows releases, and write what was asked."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await asyncio.to_thread(self.inference.close)
        if self._log is not None:
            await asyncio.to_thread(self._log.close)

    def _tell(self, record: Inferred) -> None:
        for told in self._told:
            told(record)


def catalogue(store: Store, desk: ReleaseDesk) -> Catalogue:
    """What there is to ask for, now: released, and signed."""
    with store.reading() as connection:
        stand = heads.read(connection)
    channels: dict[str, dict[str, int]] = {}
    for model, channel, _ in stand.numbers:
        channels.setdefault(model, {})[channel] = stand.of(Audience(model, channel))
    return Catalogue({model: Offered.of(desk.listed(model), of_model) for model, of_model in channels.items()})
