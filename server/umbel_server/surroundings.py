"""What a coordinator takes from the machine that it runs on; a simulation puts its own there."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from umbel.runtime import Runtime
from umbel.runtime.onnx import OnnxRuntime
from umbel_server.beat import Beat
from umbel_server.helper.port import HelperPort
from umbel_server.store import OnStep, ignore_step

Offload = Callable[..., Awaitable[Any]]


@dataclass(frozen=True)
class Surroundings:
    """Threads, chance, intervals, and whom to call."""

    offload: Offload = asyncio.to_thread
    """Where heavy work runs."""
    chance: Callable[[int], bytes] = secrets.token_bytes
    """Ids and tokens are made of it."""
    on_step: OnStep = ignore_step
    """Told each durable step before it happens."""
    beat: Beat = field(default_factory=Beat)
    runtime: Runtime = field(default_factory=OnnxRuntime)
    """Runs candidates on golden and held-out examples."""
    helper: HelperPort | None = None
    """Instead of the one that the settings name."""
