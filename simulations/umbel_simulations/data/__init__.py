"""Real data, as federations: who has which examples.

`load` gives the federation that a scenario names; `federation.py` says what one is, `partition.py` cuts data anew, and
each other module reads one data set.
"""

from __future__ import annotations

from umbel_simulations.data.federation import ClientData, Federation, join
from umbel_simulations.data.load import load

__all__ = ["ClientData", "Federation", "join", "load"]
