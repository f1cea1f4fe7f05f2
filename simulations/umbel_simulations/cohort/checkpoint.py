"""Where a run of the cohort engine stands, on disk: killed at any moment, it goes on as if it hadn't been."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from umbel.digests import Digest
from umbel.errors import BadInput, MalformedMessage
from umbel.weights import Shapes, Weights
from umbel_simulations.outcome import RoundOutcome

FILE: Final = "cohort.checkpoint"
_WEIGHTS, _MEMORY, _SCENARIO, _ROUNDS, _SESSIONS = "weights", "memory", "scenario", "rounds", "sessions"
_LOG: Final = TypeAdapter(tuple[RoundOutcome, ...])
_COUNTS: Final = TypeAdapter(dict[str, int])


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What a run needs to go on."""

    scenario: Digest
    """Of the scenario with its seed: what the checkpoint belongs to."""
    weights: Weights
    memory: bytes
    """The algorithm's."""
    rounds: tuple[RoundOutcome, ...]
    sessions: Mapping[str, int]
    """By a client's name: how often it has trained."""

    def write(self, folder: Path) -> None:
        """Replace what stands in the folder, at one stroke."""
        arrays: dict[str, NDArray[Any]] = {
            _WEIGHTS: self.weights.to_vector(),
            _MEMORY: np.frombuffer(self.memory, np.uint8),
        }
        told = {_ROUNDS: _LOG.dump_json(self.rounds), _SESSIONS: _COUNTS.dump_json(dict(self.sessions))}
        metadata = {_SCENARIO: str(self.scenario), **{name: text.decode() for name, text in told.items()}}
        draft = folder / (FILE + ".new")
        with draft.open("wb") as file:
            file.write(safetensors.numpy.save(arrays, metadata))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(folder / FILE)


def read(folder: Path, scenario: Digest, shapes: Shapes) -> Checkpoint | None:
    """The checkpoint in a folder, if there is one.

    Raises:
        BadInput: it is of another scenario, or of another seed.
        MalformedMessage: it can't be read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata()
            weights, memory = file.get_tensor(_WEIGHTS), file.get_tensor(_MEMORY).tobytes()
        rounds, sessions = _LOG.validate_json(metadata[_ROUNDS]), _COUNTS.validate_json(metadata[_SESSIONS])
        owner = metadata[_SCENARIO]
    except (safetensors.SafetensorError, KeyError, TypeError, ValidationError) as error:
        raise MalformedMessage(f"{path} is no checkpoint ({error}); delete it to begin anew") from error
    if owner != str(scenario):
        raise BadInput(f"{path} is of another scenario or seed; choose another folder, or delete it")
    return Checkpoint(scenario, Weights.from_vector(weights, shapes), memory, rounds, sessions)
