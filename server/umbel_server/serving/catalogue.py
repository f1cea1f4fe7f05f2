"""What there is to ask for: the released versions of each model, and what its channels stand at. Values, and no IO."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from umbel.errors import NotFound
from umbel.listing import ListedRelease

USUAL: Final = "stable"
"""The channel of whoever names neither a version nor a channel."""


@dataclass(frozen=True, slots=True)
class Offered:
    """One model."""

    versions: Mapping[int, ListedRelease]
    """Version -> a release of it that stands in the signed listing."""
    channels: Mapping[str, ListedRelease]
    """Channel -> what its devices get that no rollout takes; where populations differ, the newest of it."""

    @classmethod
    def of(cls, listed: Mapping[int, ListedRelease], heads: Mapping[str, int]) -> Offered:
        """Of a model's signed releases by number, and its channels' heads; what isn't signed isn't offered."""
        versions = {release.version: release for _, release in sorted(listed.items())}
        return cls(versions, {channel: listed[head] for channel, head in sorted(heads.items()) if head in listed})


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All models."""

    models: Mapping[str, Offered] = field(default_factory=dict)

    def model(self, name: str) -> Offered:
        """One model; raises `NotFound` where nothing was released by that name."""
        try:
            return self.models[name]
        except KeyError:
            raise NotFound(f"no model {name[:80]!r} is released here{_known(self.models)}") from None

    def find(self, name: str, version: str) -> ListedRelease:
        """The release that is meant by a version's number, by a channel's name, or by "", which means `stable`.

        Raises:
            NotFound: there is no such model, version or channel.
        """
        offered = self.model(name)
        if version.isascii() and version.isdecimal():
            found, kind = offered.versions.get(int(version[:18])), "version"
        else:
            found, kind = offered.channels.get(version or USUAL), "channel"
        if found is None:
            there = offered.versions if kind == "version" else offered.channels
            raise NotFound(f"model {name!r} has no released {kind} {(version or USUAL)[:80]!r}{_known(there)}")
        return found

    def heads(self) -> Iterable[ListedRelease]:
        """What channels stand at, of all models."""
        return (release for offered in self.models.values() for release in offered.channels.values())


def _known(there: Iterable[object]) -> str:
    names = sorted(map(str, there))
    return f"; there are {', '.join(names[:8])}" if names else ""
