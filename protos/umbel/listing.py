"""How a release stands in TUF metadata: its path, and the facts that its signers put beside it.

A target is a bundle's manifest, which names every file of the bundle by its digest: so the whole bundle, with its
materialised weights, is covered. Facts never change once signed; who gets a release when stands elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from umbel import fields
from umbel.digests import Digest, parse_digest
from umbel.errors import MalformedMessage
from umbel.manifest import MAX_MANIFEST_BYTES

ISSUED_AT: Final = "x-umbel-issued-at"
"""Field of the timestamp: when it was signed, in POSIX seconds; a device's clock is never behind it."""
CHECKPOINT: Final = "x-umbel-audit-checkpoint"
"""Field of the timestamp: the newest signed checkpoint of the audit log, so that the fleet witnesses it."""


@dataclass(frozen=True, slots=True)
class ListedRelease:
    """A release as its signers listed it: immutable facts."""

    model: str
    number: int
    version: int
    channel: str
    bundle: Digest
    """SHA-256 of the bundle's manifest."""
    manifest_size: int
    content_of: int = 0
    """The earlier release whose content this one has, if it is one to go back with; else 0."""
    from_number: int = 0
    """For a release to go back with: the newest release that it takes back; else 0."""

    def takes_back(self, number: int) -> bool:
        """Whether it takes this release back: all that came after its content, up to `from_number` (so both arms of an
        experiment). A device that has one of these has no choice.
        """
        return self.content_of < number <= self.from_number


def target_path(model: str, number: int) -> str:
    """Where a release is listed; the model's role may list nothing outside `models/<model>/`."""
    return f"models/{fields.name(model, 'model')}/{fields.count(number, 'release', least=1)}.json"


def facts_of(release: ListedRelease) -> dict[str, Any]:
    """What stands beside the target."""
    return {
        "model": release.model,
        "number": release.number,
        "version": release.version,
        "channel": release.channel,
        "content_of": release.content_of,
        "from_number": release.from_number,
    }


def listed_from_target(
    path: str, length: int, hashes: Mapping[str, str], facts: Mapping[str, Any] | None
) -> ListedRelease:
    """Read a verified target.

    Args:
        path: under which it was found.
        length: of the manifest, in bytes.
        hashes: of the manifest; SHA-256 must be among them.
        facts: what stands beside it.

    Raises:
        MalformedMessage: signed, but not a release, or one that stands under another's path.
        OutOfBounds: numbers that make no sense.
    """
    facts = facts or {}
    try:
        numbers = {name: _whole(facts[name]) for name in ("number", "version", "content_of", "from_number")}
        release = ListedRelease(
            model=fields.name(str(facts["model"]), "model"),
            channel=fields.name(str(facts["channel"]), "channel"),
            bundle=parse_digest(hashes["sha256"]),
            manifest_size=fields.count(length, "manifest size", least=1),
            **numbers,
        )
    except (KeyError, TypeError) as error:
        raise MalformedMessage(f"what is listed under {path} is no release: {error}") from error
    if target_path(release.model, release.number) != path or length > MAX_MANIFEST_BYTES or release.version < 1:
        raise MalformedMessage(f"what is listed under {path} calls itself release {release.number} of {release.model}")
    return release


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected a whole number, got {value!r:.80}")
    return fields.count(value, "a number of a release")
