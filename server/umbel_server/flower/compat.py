"""Every touch of flwr that isn't its public interface, and its import made quiet, in one place.

Importing flwr puts handlers on two loggers, sets an environment variable and lets typer warn; library use sends no
telemetry, and is told so once more. All of that is undone here. What is private and used: the process-wide
`TaskIdentity`, which `Message` reads when it is created, and the message id, for which there is no setter (flwr's own
grids write it the same way).
"""

from __future__ import annotations

import gc
import logging
import os
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
from numpy.typing import NDArray


@contextmanager
def _environment(**wanted: str) -> Iterator[None]:
    """Set variables for a while; whatever else is set meanwhile is undone as well."""
    before = dict(os.environ)
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)


with warnings.catch_warnings(), _environment(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1"):
    warnings.simplefilter("ignore")
    from flwr.app import Array, Message, Metadata, RecordDict
    from flwr.app.exception import AppExitException
    from flwr.common.constant import SType
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

for _name in ("flwr", "flwr-telemetry"):
    _logger = logging.getLogger(_name)
    for _handler in list(_logger.handlers):
        _logger.removeHandler(_handler)
    # Flower tells each step of each round, and warns of settings that are meant; what goes wrong is raised.
    _logger.setLevel(logging.ERROR)

__all__ = [
    "AppExitException",
    "LazyArray",
    "Run",
    "identify_task",
    "quick_collections",
    "reply_without_request",
    "set_message_id",
]

_FROZEN_BY_PYTHON = 1_000
"""More objects than Python itself begins with as frozen ones: 375 in 3.12, none in others."""
_RUN_ID = 1
"""Flower's run ids tell its tenants apart; there is one tenant here."""


class LazyArray(Array):
    """An array that is made when a strategy asks for it, so that a cohort's replies needn't lie in memory at once."""

    def __init__(self, shape: tuple[int, ...], make: Callable[[], NDArray[np.float32]]) -> None:
        super().__init__(dtype="float32", shape=shape, stype=SType.NUMPY, data=b"")
        self.__dict__["_make"] = make

    def numpy(self) -> NDArray[np.float32]:
        """A fresh array: some strategies write into what they get."""
        made: NDArray[np.float32] = self.__dict__["_make"]()
        return made


def reply_without_request(content: RecordDict, node_id: int) -> Message:
    """A train reply as a strategy takes it, to no message in particular."""
    metadata = Metadata(_RUN_ID, "", node_id, 1, "", "", 0.0, 1.0, "train")
    return Message(metadata=metadata, content=content)  # type: ignore[call-overload, no-any-return]


def identify_task() -> None:
    """Let `Message(...)` be created in this process; a value that somebody else has set stays."""
    for name in ("run_id", "node_id", "task_id"):
        if getattr(TaskIdentity, f"_{name}", None) is None:
            setattr(TaskIdentity, name, _RUN_ID)


@contextmanager
def quick_collections() -> Iterator[None]:
    """Let garbage be looked for among new objects only: some strategies collect once or more for each reply.

    In a coordinator of a few hundred thousand objects each such search would hold every thread up for a while. What
    somebody else has frozen stays so.
    """
    if _others_freeze():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@cache
def _others_freeze() -> bool:
    """Asked once: Python counts frozen objects one by one, and a million take longer than a strategy's step."""
    return gc.get_freeze_count() > _FROZEN_BY_PYTHON


def set_message_id(message: Message) -> str:
    """Give a message an id of its own, and return that."""
    message_id = uuid.uuid4().hex
    message.metadata.__dict__["_message_id"] = message_id
    return message_id
