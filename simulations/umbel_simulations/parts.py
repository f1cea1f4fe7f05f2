"""What the parts of a scenario have in common: strict reading, and kinds of numbers.

The parts are plain frozen dataclasses. Bounds stand in their types and meanings under their fields, so that reading,
the published schema and the reference page all come from one place.
"""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import ConfigDict, Field

STRICT: Final = ConfigDict(
    extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False, defer_build=True
)
"""No unknown keys, no conversions, no infinities."""

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]
Epochs = Annotated[int, Field(ge=1, le=10_000)]
"""A client's order of examples in each of them lies in memory at once."""
Decades = Annotated[float, Field(ge=0, le=12)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
