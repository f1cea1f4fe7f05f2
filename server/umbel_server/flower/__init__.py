"""Flower as the strategy engine; the only package that imports flwr, and that only when a strategy is run.

Two ways in. The coordinator calls `apply` once a round: a pure function from (state, model, cohort) to (model, state),
which it can checkpoint, repeat and refuse. A Flower user hands `umbel_server.flower.grid.DeviceGrid` to
`strategy.start` or to a `ServerApp`, as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from umbel_server.flower.spec import (
    CATALOGUE,
    StrategySpec,
    device_hyperparameters,
    least_reports,
    needed_metrics,
    needs_singles,
    require_strategy,
)

if TYPE_CHECKING:
    from umbel.weights import Weights
    from umbel_server.aggregation import Collected

__all__ = [
    "CATALOGUE",
    "StrategySpec",
    "apply",
    "device_hyperparameters",
    "least_reports",
    "needed_metrics",
    "needs_singles",
    "require_strategy",
]


def apply(
    spec: StrategySpec, state: bytes, current: Weights, collected: Collected, round_number: int
) -> tuple[Weights, bytes]:
    """Run one step of a Flower strategy; see `umbel_server.flower.engine.apply`."""
    # Loaded here because flwr takes a second and tens of megabytes, which only this needs.
    from umbel_server.flower import engine

    return engine.apply(spec, state, current, collected, round_number)
