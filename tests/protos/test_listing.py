"""What is listed is a release only if it says so in full, under its own path, in numbers that make sense."""

from __future__ import annotations

from typing import Any

import pytest

from umbel.digests import digest_of
from umbel.errors import MalformedMessage, UmbelError
from umbel.listing import ListedRelease, facts_of, listed_from_target, target_path
from umbel.manifest import MAX_MANIFEST_BYTES

RELEASE = ListedRelease("watch", 7, 3, "stable", digest_of(b"manifest"), 1234, content_of=5, from_number=6)
HASHES = {"sha256": RELEASE.bundle}


def listed(path: str = "models/watch/7.json", length: int = 1234, **facts: Any) -> ListedRelease:
    return listed_from_target(path, length, HASHES, facts_of(RELEASE) | facts)


def test_a_release_comes_back_as_it_was_listed() -> None:
    assert target_path("watch", 7) == "models/watch/7.json"
    assert listed() == RELEASE


@pytest.mark.parametrize("path", ["models/watch/8.json", "models/phone/7.json", "7.json", ""])
def test_a_release_under_anothers_path_is_refused(path: str) -> None:
    with pytest.raises(MalformedMessage, match="calls itself"):
        listed(path)


def test_a_manifest_larger_than_any_is_refused() -> None:
    assert listed(length=MAX_MANIFEST_BYTES).manifest_size == MAX_MANIFEST_BYTES
    with pytest.raises(MalformedMessage):
        listed(length=MAX_MANIFEST_BYTES + 1)


@pytest.mark.parametrize("version", [0, True, -1, 1.0, "3", None, 1 << 70])
def test_a_version_that_is_no_number_of_a_version_is_refused(version: object) -> None:
    with pytest.raises(UmbelError):
        listed(version=version)


@pytest.mark.parametrize("missing", ["model", "number", "version", "channel", "content_of", "from_number"])
def test_a_release_without_one_of_its_facts_is_refused(missing: str) -> None:
    facts = {name: value for name, value in facts_of(RELEASE).items() if name != missing}
    with pytest.raises(MalformedMessage, match="no release"):
        listed_from_target("models/watch/7.json", 1234, HASHES, facts)


def test_a_release_without_its_digest_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="no release"):
        listed_from_target("models/watch/7.json", 1234, {"md5": "00"}, facts_of(RELEASE))
    with pytest.raises(MalformedMessage, match="no release"):
        listed_from_target("models/watch/7.json", 1234, HASHES, None)
