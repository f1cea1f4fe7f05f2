"""What a task's rounds have cost in privacy, and whether another may be opened.

Each device decides itself when to call, so nothing is gained by sampling: a device is reckoned to be in every round, or
in the costliest `rounds_per_device` of them where the helper enforces such a cap. The discrete Gaussian keeps to the
Rényi bounds of the continuous one (Canonne, Kamath and Steinke 2020, proposition 5), which `dp-accounting` adds up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from umbel.descriptor import RoundDescriptor, noise_multiplier
from umbel.errors import BudgetSpent
from umbel_server.privacy import signal_to_noise
from umbel_server.privacy_settings import PrivacySettings


@dataclass(frozen=True, slots=True)
class PrivacyReport:
    """A task's ledger, for its operator."""

    private: bool
    trust: str
    rounds: int
    """Private rounds that were countersigned."""
    epsilon_spent: float
    """At the settings' delta; infinite where any round had no noise, 0 before the first."""
    epsilon_next: float
    """After one more round like the next one."""
    budget: float
    """0: none was set."""
    delta: float
    noise_multiplier: float
    signal_to_noise: float
    """At best, of the next round's sum at its goal; infinite without noise."""
    ring_bits: int
    bytes_per_weight: float
    clip_norm: float
    """Of the next round: the largest norm of one device's delta; 0 where only metrics are sent."""
    clip_quantile: float
    """Share of devices that is to stay unclipped, towards which the clip moves; 0: it stands still."""


def epsilon(multipliers: Sequence[float], settings: PrivacySettings) -> float:
    """What rounds with these noise multipliers cost a device that was in all of them; infinite if one had no noise."""
    cap = settings.rounds_per_device
    costliest = sorted(multipliers)[: cap or None]
    if not costliest:
        return 0.0
    if costliest[0] <= 0:
        return math.inf
    # Takes a second to load, and most tasks never need it.
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    for multiplier, rounds in Counter(costliest).items():
        accountant.compose(dp_accounting.GaussianDpEvent(multiplier), rounds)
    return float(accountant.get_epsilon(settings.delta))


def require_budget(past: Sequence[float], opening: RoundDescriptor, settings: PrivacySettings) -> None:
    """Raise `BudgetSpent` if this round would take a task beyond its budget."""
    if not settings.epsilon:
        return
    would_be = epsilon([*past, noise_multiplier(opening)], settings)
    if would_be > settings.epsilon:
        raise BudgetSpent(
            f"round {opening.round} would bring the task to epsilon {would_be:.3g}; {settings.epsilon:.3g} may be "
            "spent. It isn't opened; create a task with a larger budget, more noise or fewer rounds_per_device"
        )


def report(
    past: Sequence[float], opening: RoundDescriptor | None, settings: PrivacySettings, trust: str, goal: int
) -> PrivacyReport:
    """Put a ledger together; `opening` is what the next round would be, None for a task that isn't private."""
    if opening is None:
        return PrivacyReport(False, trust, 0, math.inf, math.inf, 0.0, settings.delta, 0.0, math.inf, 0, 0.0, 0.0, 0.0)
    numbers = opening.transform.numbers
    return PrivacyReport(
        private=True,
        trust=trust,
        rounds=len(past),
        epsilon_spent=epsilon(past, settings),
        epsilon_next=epsilon([*past, noise_multiplier(opening)], settings),
        budget=settings.epsilon,
        delta=settings.delta,
        noise_multiplier=noise_multiplier(opening),
        signal_to_noise=signal_to_noise(opening, goal),
        ring_bits=opening.ring_bits,
        bytes_per_weight=numbers * opening.ring_bits / 8 / opening.size if opening.size else 0.0,
        clip_norm=opening.clip_norm if opening.size else 0.0,
        clip_quantile=settings.clip_quantile,
    )
