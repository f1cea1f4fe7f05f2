"""Attacks on who gets a release now: each by its name. What is authentic is attacked in test_release_attacks.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.rollouts.fleet import AUTHOR, MODEL, DirectChannel, Fleet, fleet_of
from umbel.digests import digest_of
from umbel.errors import Expired, NotAllowed, RollbackRefused, SignatureInvalid
from umbel.offer import Offer, SignedOffer, sign_offer, verify_offer
from umbel_client.offered import believe, verify_offered

NOW = 1_790_000_000.0


@pytest.fixture
async def fleet(tmp_path: Path) -> Fleet:
    return await fleet_of(tmp_path, 2)


def offer_to(fleet: Fleet, index: int = 0, **changes: Any) -> Offer:
    """A fresh offer of the next release to a device."""
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    listed = fleet.coordinator.rollouts.desk.listed(MODEL)[number]  # type: ignore[union-attr]
    now = fleet.clock.now()
    offer = Offer("f" * 32, fleet.id_of(index), MODEL, number, listed.bundle, now, now + 3600.0)
    return replace(offer, **changes)


def signed(fleet: Fleet, offer: Offer) -> SignedOffer:
    return fleet.signer.sign_offer(offer)


def considered(fleet: Fleet, offer: SignedOffer, index: int = 0) -> Offer:
    kit = fleet.devices[index].kit
    return verify_offered(kit, offer)


def test_an_honest_offer_is_believed(fleet: Fleet) -> None:
    offer = offer_to(fleet)
    assert considered(fleet, signed(fleet, offer)) == offer


def test_a_foreign_devices_offer_is_refused(fleet: Fleet) -> None:
    with pytest.raises(NotAllowed, match="an offer for device"):
        considered(fleet, signed(fleet, offer_to(fleet, index=1)), index=0)


def test_an_offer_signed_by_another_key_is_refused(fleet: Fleet) -> None:
    with pytest.raises(SignatureInvalid):
        considered(fleet, sign_offer(offer_to(fleet), Ed25519PrivateKey.generate()))


def test_a_changed_offer_is_refused(fleet: Fleet) -> None:
    honest = signed(fleet, offer_to(fleet))
    with pytest.raises(SignatureInvalid):
        considered(fleet, replace(honest, statement=honest.statement + b"\x20\x07"))


def test_a_release_signature_is_no_offer(fleet: Fleet) -> None:
    """The same key signs both; a label keeps one from passing as the other."""
    from umbel.release import sign_statement

    offer = offer_to(fleet)
    key = Ed25519PrivateKey.generate()
    other = sign_statement(signed(fleet, offer).statement, key)
    with pytest.raises(SignatureInvalid):
        verify_offer(
            SignedOffer(other.statement, other.key_id, other.signature),
            key.public_key().public_bytes_raw(),
            offer.device,
            fleet.clock.now(),
        )


def test_an_offer_that_was_held_back_until_it_expired_is_refused(fleet: Fleet) -> None:
    offer = signed(fleet, offer_to(fleet))
    fleet.clock.instant += 3601.0
    with pytest.raises(Expired):
        considered(fleet, offer)


async def test_an_offer_expires_by_the_listings_time_when_the_clock_is_set_back(fleet: Fleet) -> None:
    offer, kit = signed(fleet, offer_to(fleet)), fleet.devices[0].kit
    fleet.clock.instant += 20 * 3600.0
    fleet.steer()
    assert kit.listing is not None
    await kit.listing.refresh(kit.channel.read_listing, fleet.clock.now())
    fleet.clock.instant -= 400 * 86_400.0
    with pytest.raises(Expired):
        await believe(kit, kit.listing, offer)


async def test_an_offer_that_was_followed_is_not_followed_again(fleet: Fleet) -> None:
    device, channel = fleet.devices[0], cast("DirectChannel", fleet.devices[0].kit.channel)
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    await device.wake()
    taken = channel.last
    assert taken.HasField("offer")
    before = device.kit.shelf.slots
    channel.replay = taken
    await device.wake()
    assert "played back" in device.kit.memory.state.last_error or device.kit.shelf.slots.active == before.active
    with pytest.raises(RollbackRefused):
        considered(fleet, SignedOffer(taken.offer.offer, taken.offer.key_id, taken.offer.signature))


async def test_an_offer_that_was_turned_down_cannot_be_played_back(fleet: Fleet) -> None:
    """Nothing but the execution tells: the release is newer than what answers, and the offer hasn't expired."""
    device, channel = fleet.devices[0], cast("DirectChannel", fleet.devices[0].kit.channel)
    before = fleet.releases()
    fleet.verbs.publish(MODEL, fleet.broken_version(), "stable", AUTHOR)
    await device.wake()
    assert channel.last.HasField("offer") and fleet.releases() == before
    taken = channel.last.offer
    with pytest.raises(RollbackRefused, match="followed before"):
        considered(fleet, SignedOffer(taken.offer, taken.key_id, taken.signature))


def test_an_offer_of_another_model_is_refused(fleet: Fleet) -> None:
    with pytest.raises(NotAllowed, match="an offer of model"):
        considered(fleet, signed(fleet, offer_to(fleet, model="another")))


async def test_an_offer_of_a_release_of_another_channel_is_refused(fleet: Fleet) -> None:
    """Listed, newer, signed: and meant for devices that follow the other channel."""
    offer, kit = offer_to(fleet), fleet.devices[0].kit
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "beta", AUTHOR)
    listed = fleet.coordinator.rollouts.desk.listed(MODEL)[number]  # type: ignore[union-attr]
    assert kit.listing is not None
    with pytest.raises(NotAllowed, match="channel 'beta'"):
        await believe(kit, kit.listing, signed(fleet, replace(offer, number=number, bundle=listed.bundle)))


def test_an_offer_of_an_older_release_is_refused(fleet: Fleet) -> None:
    held = fleet.releases()[0]
    with pytest.raises(RollbackRefused):
        considered(fleet, signed(fleet, offer_to(fleet, number=held - 1 or held)))


async def test_stolen_offer_keys_cannot_inject_what_is_not_listed(fleet: Fleet) -> None:
    """Whoever owns the coordinator's online keys offers a bundle of their own under a number that is listed."""
    kit = fleet.devices[0].kit
    assert kit.listing is not None
    evil = offer_to(fleet, bundle=digest_of(b"evil"))
    with pytest.raises(SignatureInvalid, match="another content"):
        await believe(kit, kit.listing, signed(fleet, evil))


async def test_a_frozen_listing_stops_updating_and_never_answering(fleet: Fleet) -> None:
    device, channel = fleet.devices[0], cast("DirectChannel", fleet.devices[0].kit.channel)
    channel.lies = {path.name: path.read_bytes() for path in (fleet.folder / "listing").glob("*.json")}
    before = fleet.releases()[0]
    fleet.clock.instant += 2 * 86_400.0
    fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    visit = await device.wake()
    assert visit.error is None
    assert device.kit.shelf.slots.active is not None and device.kit.shelf.slots.active.number == before
    assert "expired" in device.kit.memory.state.last_error
    assert device.answers_with


async def test_a_device_that_pinned_a_listing_follows_no_bare_release(fleet: Fleet) -> None:
    from umbel.visit import CheckInReply, Retry, RetryWindow

    device = fleet.devices[0]
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    with fleet.coordinator.store.reading() as connection:
        [bare] = [it.signed for it in fleet.coordinator.registry.releases(connection, MODEL) if it.number == number]
    reply = CheckInReply(Retry(RetryWindow(0.0, 1.0)), newest=bare)
    before = fleet.releases()
    assert await device._consider(reply) is None
    assert fleet.releases() == before


@pytest.mark.parametrize("way", ["tampered", "truncated", "endless"])
async def test_tampered_truncated_and_endless_content_is_never_used(fleet: Fleet, way: str) -> None:
    """The listing is honest, the bytes of the files aren't: what answers goes on answering, and the reason is told."""
    device, channel = fleet.devices[0], cast("DirectChannel", fleet.devices[0].kit.channel)
    before = fleet.releases()[0]
    channel.spoil = {
        "tampered": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        "truncated": lambda data: data[:-1],
        "endless": lambda data: data + b" " * 1_000_000,
    }[way]
    number = fleet.verbs.publish(MODEL, fleet.good_version(), "stable", AUTHOR)
    visit = await device.wake()
    assert fleet.releases()[0] == before and device.answers_with
    told = str(visit.error) if visit.error else f"{visit.release.reason if visit.release else ''}"
    assert {"tampered": "digest", "truncated": "ended after", "endless": "sends more"}[way] in told
    channel.spoil = lambda data: data
    for _ in range(2):
        await fleet.visits()
    assert fleet.releases()[0] == number, "once the way is honest again, it is taken"
