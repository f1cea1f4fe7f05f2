"""What every translator of a lowered graph needs."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx


def not_in_place(target: Any) -> Any:
    """The pure form of an operator that writes into its first argument: `add_` becomes `add`."""
    name = getattr(getattr(target, "overloadpacket", None), "__name__", "")
    if not name.endswith("_"):
        return None
    return getattr(getattr(torch.ops.aten, name[:-1], None), target._overloadname, None)


def attribute_of(graph: fx.GraphModule, path: str) -> np.ndarray[Any, Any]:
    """A constant that the trace holds."""
    value: Any = graph
    for part in path.split("."):
        value = getattr(value, part)
    return np.asarray(value.detach().numpy())
