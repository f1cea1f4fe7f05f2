"""A version's quantised neighbour: what everybody on a channel has, plus an int8 delta. Made for a release.

    head's weights, version's weights -> int8 steps -> materialised weights -> golden answers, held-out data, verdict
                                                                            -> a version of its own, with its delta

From then on nothing is special about it: the materialised weights are listed, hashed, tested and gated like any others,
and who hasn't the base fetches them whole. Training goes on from the accepted versions, never from a quantised one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from umbel.bundle import Bundle, file_refs
from umbel.clock import Clock
from umbel.delta import is_worth_it
from umbel.digests import Digest, digest_of
from umbel.errors import WrongState
from umbel.manifest import WEIGHTS_FILE, Manifest
from umbel.quantised import quantise
from umbel.runtime import Runtime
from umbel.successor import successor
from umbel.weights import Weights
from umbel_server import audit, task_records
from umbel_server.blobs import Blobs
from umbel_server.examination import HeldOut, examine
from umbel_server.registry import Registry
from umbel_server.releases import ReleaseDesk
from umbel_server.rollout_spec import Audience
from umbel_server.store import Store
from umbel_server.surroundings import Offload
from umbel_server.validation import CandidateFacts, Refused, ValidationPolicy, judge_candidate
from umbel_server.versions import INT8_DELTA, Lineage, Version, VersionState, require_releasable


@dataclass(frozen=True, slots=True)
class _Made:
    """A quantised bundle, its delta, and what was found out about it."""

    manifest: Manifest
    files: Mapping[str, bytes] = field(repr=False)
    delta: bytes = field(repr=False)
    facts: CandidateFacts

    @property
    def full_size(self) -> int:
        """Bytes of the weights file."""
        return len(self.files[WEIGHTS_FILE])


class Quantising:
    """Makes quantised versions of one coordinator's models.

    Args:
        store: the truth.
        registry: where versions are.
        blobs: where their files go.
        desk: knows what devices have.
        runtime: answers golden and held-out examples.
        clock: what the date is.
        offload: where heavy work runs.
    """

    def __init__(
        self,
        store: Store,
        registry: Registry,
        blobs: Blobs,
        desk: ReleaseDesk,
        runtime: Runtime,
        clock: Clock,
        offload: Offload,
    ) -> None:
        self._store = store
        self._registry = registry
        self._blobs = blobs
        self._desk = desk
        self._runtime = runtime
        self._clock = clock
        self._offload = offload

    async def neighbour(self, audience: Audience, number: int, actor: str) -> Version:
        """The quantised neighbour of a version for an audience: made, judged and registered, or found again.

        Raises:
            NotFound: no such version, or nobody there has anything to start from.
            WrongState: not an accepted version; or its neighbour isn't small, or not good, enough to be released.
            WeightsMismatch: the devices have weights of another shape.
        """
        model = audience.model
        with self._store.reading() as connection:
            version = self._registry.version(connection, model, number)
            require_releasable(version)
            base = self._desk.head_version(connection, audience)
            tasks = [one.task for one in task_records.everything(connection) if one.task.model == model]
        if base.bundle == version.bundle:
            raise WrongState(f"everybody on {audience} has version {number} already; release it in full")
        policy = tasks[-1].validation if tasks else ValidationPolicy()
        bundles = self._registry.bundle(base.bundle), self._registry.bundle(version.bundle)
        made: _Made = await self._offload(_make, *bundles, self._runtime, self._blobs.holdout(policy.holdout))
        verdict = judge_candidate(made.facts, policy)
        if isinstance(verdict, Refused):
            raise WrongState(f"quantised, version {number} is not good enough: {verdict.reason}; release it in full")
        if not is_worth_it(len(made.delta), made.full_size):
            told = f"{len(made.delta)} bytes for {made.full_size}"
            raise WrongState(f"the int8 delta of version {number} is too large ({told}); release it in full")
        return self._register(version, base, made, actor)

    def _register(self, version: Version, base: Version, made: _Made, actor: str) -> Version:
        now, model = self._clock.now(), version.model
        self._registry.keep_successor(made.manifest, made.files)
        delta = self._blobs.put_bundle_file(made.delta)
        with self._store.transaction() as connection:
            known = self._registry.version_of(connection, model, made.manifest.digest)
            if known is not None and known.state is VersionState.QUANTISED:
                return known
            lineage = Lineage(
                registered_by=actor,
                step_norm=made.facts.step_norm,
                verdict=_verdict(version, made.facts),
                definition=_definition(base, self._registry.bundle(base.bundle), made, delta),
            )
            added = self._registry.add_version(
                connection, model, version.number, made.manifest, lineage, now, VersionState.QUANTISED, (delta,)
            )
            body = {"version": added.number, "of": version.number, "base": base.number, "delta": delta}
            audit.append(connection, now, actor, "version.quantise", model, body)
        return added


def _make(base: Bundle, wanted: Bundle, runtime: Runtime, held_out: bytes | None) -> _Made:
    frozen = {spec.name for spec in wanted.manifest.frozen}
    old, new = (bundle.paths[WEIGHTS_FILE].read_bytes() for bundle in (base, wanted))
    found = quantise(old, new, frozen)
    weights = Weights.from_bytes(found.weights)
    weights = weights.subset([name for name in weights if name not in frozen])
    examples = HeldOut.from_bytes(held_out, wanted.manifest) if held_out is not None else None
    facts = examine(wanted, weights, runtime, held_out=examples)
    manifest, files = successor(wanted, weights, runtime)
    # As the delta makes it, byte for byte, whoever once wrote the file that it came from.
    files = {**files, WEIGHTS_FILE: found.weights}
    manifest = replace(manifest, files={**manifest.files, **file_refs(files)})
    return _Made(manifest, files, found.delta, facts)


def _definition(base: Version, before: Bundle, made: _Made, delta: Digest) -> dict[str, Any]:
    return {
        "encoding": INT8_DELTA,
        "base_version": base.number,
        "base": before.manifest.files[WEIGHTS_FILE].digest,
        "target": digest_of(made.files[WEIGHTS_FILE]),
        "digest": delta,
        "size": len(made.delta),
    }


def _verdict(version: Version, facts: CandidateFacts) -> str:
    told = f"quantised version {version.number}, off by a norm of {facts.step_norm:.3g}"
    found = facts.held_out
    if found is None or "correct" not in found.candidate:
        return told
    new, old = (side["correct"] / max(side["examples"], 1.0) for side in (found.candidate, found.parent))
    return f"{told}; on held-out data {new:.2%} of the answers are right, version {version.number} has {old:.2%}"
