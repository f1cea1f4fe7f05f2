"""From a cohort's sum to a candidate: the heavy, pure middle of closing a round.

Same parent, same strategy state and same reports give the same bytes, so a coordinator that died here does it again and
gets what it would have got.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from umbel.bundle import Bundle
from umbel.errors import UmbelError
from umbel.manifest import Manifest
from umbel.runtime import Runtime
from umbel.successor import successor
from umbel_server import flower
from umbel_server.aggregation import Collected
from umbel_server.examination import HeldOut, examine
from umbel_server.flower.spec import StrategySpec
from umbel_server.validation import CandidateFacts, Refused, ValidationPolicy, judge_candidate


@dataclass(frozen=True, slots=True)
class Parent:
    """What a candidate is made from."""

    bundle: Bundle
    strategy_state: bytes
    steps: int
    """Candidates of this task that were accepted before."""
    recent_norms: tuple[float, ...] = ()
    """Norms of those steps, newest last."""
    held_out: bytes | None = None
    """The server's own examples, if the task has any."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A new model that the server itself finds nothing against."""

    manifest: Manifest
    files: Mapping[str, bytes] = field(repr=False)
    strategy_state: bytes = field(repr=False)
    facts: CandidateFacts


def make_candidate(
    parent: Parent, collected: Collected, strategy: StrategySpec, policy: ValidationPolicy, runtime: Runtime
) -> Candidate | Refused:
    """Run the strategy, examine what comes out, and write its bundle; or say why not."""
    try:
        current = parent.bundle.shared_weights()
        weights, state = flower.apply(strategy, parent.strategy_state, current, collected, parent.steps + 1)
        held_out = None
        if parent.held_out is not None:
            held_out = HeldOut.from_bytes(parent.held_out, parent.bundle.manifest)
        facts = examine(parent.bundle, weights, runtime, recent_norms=parent.recent_norms, held_out=held_out)
        verdict = judge_candidate(facts, policy)
        if isinstance(verdict, Refused):
            return verdict
        manifest, files = successor(parent.bundle, weights, runtime)
    except UmbelError as error:
        return Refused(f"{error.code}: {error}")
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # A strategy is other people's code: what it trips over costs a round, never the task.
        return Refused(f"{strategy.name} failed with {type(error).__name__}: {error}")
    return Candidate(manifest, files, state, facts)
