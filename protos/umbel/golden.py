"""Golden examples: a few inputs and the answers that the maker of a version got for them.

They travel in every bundle, so that a machine finds out whether its own runtime answers as the maker's did before
it trusts a version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import safetensors
import safetensors.numpy

from umbel.errors import MalformedMessage

if TYPE_CHECKING:
    from numpy.typing import NDArray

_INPUT: Final = "input."
_OUTPUT: Final = "output."


@dataclass(frozen=True, slots=True, eq=False)
class GoldenExamples:
    """Inputs by name and the outputs they gave by name; the first dimension of each is the batch."""

    inputs: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]

    def to_bytes(self) -> bytes:
        """As a safetensors file; equal examples have equal bytes."""
        tensors = {_INPUT + name: array for name, array in self.inputs.items()}
        tensors |= {_OUTPUT + name: array for name, array in self.outputs.items()}
        return safetensors.numpy.save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})

    @classmethod
    def from_bytes(cls, data: bytes) -> GoldenExamples:
        """Undo `to_bytes`.

        Raises:
            MalformedMessage: not a safetensors file, or arrays that are neither inputs nor outputs.
        """
        try:
            tensors = safetensors.numpy.load(data)
        except (safetensors.SafetensorError, ValueError, KeyError) as error:
            raise MalformedMessage(f"golden examples are not a safetensors file: {error}") from error
        inputs = {name.removeprefix(_INPUT): a for name, a in tensors.items() if name.startswith(_INPUT)}
        outputs = {name.removeprefix(_OUTPUT): a for name, a in tensors.items() if name.startswith(_OUTPUT)}
        if len(inputs) + len(outputs) != len(tensors) or not inputs or not outputs:
            raise MalformedMessage(f"golden examples need inputs and outputs, found {sorted(tensors)[:20]}")
        return cls(inputs, outputs)
