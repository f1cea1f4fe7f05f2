"""On which terms rounds are private: who runs the helper, and which ring a model of its size gets."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbel.clock import SystemClock
from umbel.descriptor import RoundDescriptor
from umbel.digests import digest_of
from umbel.errors import NotAllowed
from umbel.helper_card import HelperCard
from umbel.plan import Plan
from umbel_server.app import build
from umbel_server.folder import Folder
from umbel_server.privacy import propose
from umbel_server.privacy_settings import PrivacySettings
from umbel_server.round import Base, Round, RoundKey
from umbel_server.settings import Settings, load_settings
from umbel_server.task import Task

MILLION = 1_000_000


def settings(folder: Path, address: str, operator: str, **chosen: str) -> Settings:
    """A coordinator's settings, with a helper."""
    Folder.create(folder, (), SystemClock().now())
    (folder / "card.json").write_text(HelperCard(address, bytes(32), b"PEM", operator).to_text())
    return load_settings(folder, helper="card.json", **chosen)


@pytest.mark.parametrize(
    ("address", "operator", "says"),
    [
        ("helper.example.org:7446", "ACME IT", "split trust: the helper is run by ACME IT"),
        ("10.1.2.3:7446", "ACME IT", "split trust"),
        ("helper.example.org:7446", "", "development trust"),
        ("127.0.0.1:7446", "ACME IT", "development trust"),
        ("127.8.8.8:7446", "ACME IT", "development trust"),
        ("[::1]:7446", "ACME IT", "development trust"),
        ("0.0.0.0:7446", "ACME IT", "development trust"),
        ("localhost:7446", "ACME IT", "development trust"),
        ("helper.localhost:7446", "ACME IT", "development trust"),
    ],
)
def test_a_helper_is_another_partys_only_if_it_says_so_and_is_elsewhere(
    address: str, operator: str, says: str, tmp_path: Path
) -> None:
    found = settings(tmp_path / "state", address, operator)
    assert found.trust.words.startswith(says)
    assert any("one party runs leader and helper" in one for one in found.warnings) == ("development" in says)


def test_the_production_profile_refuses_development_trust(tmp_path: Path) -> None:
    one_party = settings(tmp_path / "one", "127.0.0.1:7446", "ACME IT", profile="production")
    with pytest.raises(NotAllowed, match="one party runs leader and helper"):
        build(one_party, SystemClock())
    two_parties = settings(tmp_path / "two", "helper.example.org:7446", "ACME IT", profile="production")
    build(two_parties, SystemClock()).store.close()


def proposed(size: int, **chosen: int) -> RoundDescriptor:
    task = Task("learn", "wrists", "model", Plan(clip_norm=1.0), privacy=PrivacySettings(**chosen))
    base = Base(1, 1, digest_of(b"a bundle"))
    held = Round(RoundKey("learn", 1), base, 200, 20, 200, 600.0, 0.0, 600.0, 600.0)
    return propose(task, held, ("loss",), size, (bytes(32), bytes([1]) * 32), 1.0)


def test_up_to_a_million_weights_the_ring_has_32_bits_and_above_16_and_a_rotation() -> None:
    for size, chosen, bits in (
        (100, {}, 32), (MILLION, {}, 32), (MILLION + 1, {}, 16), (10 * MILLION, {}, 16),
        (MILLION, {"ring_bits": 16}, 16), (10 * MILLION, {"ring_bits": 32}, 32),
    ):  # fmt: skip
        found = proposed(size, **chosen)
        assert (found.ring_bits, found.rotated) == (bits, bits == 16), size


def test_a_device_with_more_examples_weighs_more_in_a_wide_ring() -> None:
    assert proposed(100).max_weight > 1
