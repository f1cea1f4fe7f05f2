"""Versions and releases as values: what the registry keeps, and its form in the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any, Final

import sqlalchemy as sa

from umbel import fields
from umbel.digests import Digest
from umbel.errors import NotAllowed, WrongState
from umbel.file_delta import FileDelta
from umbel.release import SignedRelease
from umbel.update import Metrics
from umbel_server.json_text import from_text, to_text

TRAINING: Final = "training"
"""The channel on which every accepted version is released for rounds to start from; devices don't adopt from it."""
CANDIDATE: Final = "candidate"
"""The channel on which a candidate is released to the devices that measure it."""


class VersionState(Enum):
    """Where a version stands; see `docs/explanation/data-model.md`."""

    CANDIDATE = "candidate"
    ACCEPTED = "accepted"
    REFUSED = "refused"
    QUANTISED = "quantised"
    """Made for a release, of an accepted version: what devices have plus an int8 delta. No round starts from it."""


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a version came from."""

    task: str = ""
    """Empty for a version that an operator registered."""
    round: int = 0
    cohort: int = 0
    """How many devices' updates are in it."""
    weight: float = 0.0
    """How many examples those updates stand for."""
    strategy: str = ""
    plan: Mapping[str, object] = field(default_factory=dict)
    step_norm: float = 0.0
    """Norm of this version minus its parent."""
    verdict: str = ""
    registered_by: str = ""
    definition: Mapping[str, object] = field(default_factory=dict)
    """Of a quantised version: encoding, base_version, and the delta (base, target, digest, size)."""


@dataclass(frozen=True, slots=True)
class Version:
    """One model as it once was; only its state and what is measured of it ever change."""

    model: str
    number: int
    parent: int | None
    state: VersionState
    bundle: Digest
    manifest_size: int
    created_at: float
    lineage: Lineage
    metrics: Metrics = field(default_factory=dict)
    """Sums over the cohort that measured it last; empty until one has."""

    @property
    def accuracy(self) -> float | None:
        """The share of right answers on the devices' held-back examples, once measured."""
        return accuracy_of(self.metrics)


@dataclass(frozen=True, slots=True)
class PublishedRelease:
    """A release with the signature that devices check."""

    model: str
    number: int
    version: int
    channel: str
    issued_at: float
    signed: SignedRelease


FULL: Final = "full"
INT8_DELTA: Final = "int8-delta"
"""How a release's weights are defined: as they are, or as what devices have plus an int8 delta."""
RELEASABLE: Final = (VersionState.ACCEPTED, VersionState.QUANTISED)


def require_open(channel: str) -> None:
    """Raise `NotAllowed` for a channel that the coordinator keeps for its rounds; what is no name is malformed."""
    if fields.name(channel, "channel") in (TRAINING, CANDIDATE):
        raise NotAllowed(f"channel {channel!r} belongs to the rounds; choose another, such as 'stable'")


def require_releasable(version: Version) -> None:
    """Raise `WrongState` for a candidate, or a refused version."""
    if version.state not in RELEASABLE:
        told = f"version {version.number} of {version.model!r} is {version.state.value}"
        raise WrongState(f"{told}; only accepted ones go out")


def encoding_of(version: Version) -> str:
    """How the weights of a version are defined."""
    return str(version.lineage.definition.get("encoding", FULL))


def delta_of(lineage: Lineage) -> FileDelta | None:
    """The delta that defines a quantised version's weights."""
    told: Mapping[str, Any] = lineage.definition
    if not told:
        return None
    return FileDelta(Digest(told["base"]), Digest(told["target"]), Digest(told["digest"]), told["size"])


def accuracy_of(metrics: Metrics) -> float | None:
    """`correct` over `examples`, where both are known."""
    examples = metrics.get("examples", 0.0)
    return metrics["correct"] / examples if examples > 0 and "correct" in metrics else None


def version_to_row(version: Version) -> dict[str, object]:
    """A row of `versions`."""
    return {
        "model": version.model,
        "number": version.number,
        "parent": version.parent,
        "state": version.state.value,
        "bundle": version.bundle,
        "manifest_size": version.manifest_size,
        "created_at": version.created_at,
        "lineage_json": to_text(asdict(version.lineage)),
        "metrics_json": to_text(dict(version.metrics)),
    }


def version_from_row(row: sa.Row[tuple[object, ...]]) -> Version:
    """Undo `version_to_row`."""
    return Version(
        row.model,
        row.number,
        row.parent,
        VersionState(row.state),
        Digest(row.bundle),
        row.manifest_size,
        row.created_at,
        Lineage(**from_text(row.lineage_json)),
        from_text(row.metrics_json),
    )


def release_from_row(row: sa.Row[tuple[object, ...]]) -> PublishedRelease:
    """Read a row of `releases`."""
    signed = SignedRelease(row.statement, row.key_id, row.signature)
    return PublishedRelease(row.model, row.number, row.version, row.channel, row.issued_at, signed)
