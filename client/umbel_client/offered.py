"""From an offer to a release that may be believed: signed for this device, in time, not followed before, and listed.

The offer says *who now*; the listing says *what is real*. Both must agree on the bundle. Whoever holds only the key
that signs offers can so hurry, delay or go back among listed releases, above the number that this device has now.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from umbel.errors import NotAllowed, RollbackRefused, SignatureInvalid, UmbelError
from umbel.listing import ListedRelease
from umbel.offer import Offer, SignedOffer, verify_offer
from umbel.release import Release
from umbel_client.kit import Kit
from umbel_client.listing import Listing


@dataclass(frozen=True, slots=True)
class Offered:
    """A believed offer, and the release that it means."""

    offer: Offer
    listed: ListedRelease

    @property
    def release(self) -> Release:
        """As the rest of the device knows releases."""
        listed = self.listed
        return Release(
            model=listed.model,
            number=listed.number,
            version=listed.version,
            channel=listed.channel,
            bundle=listed.bundle,
            manifest_size=listed.manifest_size,
            issued_at=self.offer.issued_at,
        )


async def believe(kit: Kit, listing: Listing, signed: SignedOffer) -> Offered:
    """The listed release that an offer means.

    Raises:
        SignatureInvalid, MalformedMessage, NotAllowed, Expired: the offer may not be followed.
        RollbackRefused: followed before, or not newer than what answers now.
        NotAuthentic, NotFound, OutOfBounds: what it names can't be shown to be real.
        Unreachable: the listing couldn't be read in time.
    """
    offer = verify_offered(kit, signed)
    listed = await find_listed(kit, listing, offer.model, offer.number)
    # By the time that the listing shows once it is up to date, where this device's clock runs behind.
    verify_offered(kit, signed, listing.time_floor)
    if listed.bundle != offer.bundle:
        raise SignatureInvalid(f"release {offer.number} is listed with another content than the offer names")
    if listed.channel != kit.identity.channel:
        raise NotAllowed(f"a release of channel {listed.channel!r}; this device follows {kit.identity.channel!r}")
    return Offered(offer, listed)


async def find_listed(kit: Kit, listing: Listing, model: str, number: int) -> ListedRelease:
    """A release as the mirror lists it; as the coordinator does where a mirror stands still, lies or is silent.

    Raises:
        NotAuthentic, NotFound, OutOfBounds, MalformedMessage: it can't be shown to be real.
        Unreachable: the listing couldn't be read in time.
    """
    now = kit.clock.now()
    if kit.mirror is not None:
        with suppress(UmbelError):
            return await listing.find(kit.mirror.read_listing, now, model, number)
    return await listing.find(kit.channel.read_listing, now, model, number)


def verify_offered(kit: Kit, signed: SignedOffer, time_floor: float = 0.0) -> Offer:
    """All that can be checked of an offer without the network; raises as `believe`.

    Args:
        kit: the device's.
        signed: the offer.
        time_floor: POSIX seconds; an instant that is known to have passed.
    """
    now = max(kit.clock.now(), time_floor)
    offer = verify_offer(signed, kit.identity.release_key, kit.device, now)
    if offer.execution in kit.memory.state.executions:
        raise RollbackRefused(f"offer {offer.execution} was followed before; somebody plays it back")
    known, active = kit.memory.known.model, kit.shelf.slots.active
    if known and offer.model != known:
        raise NotAllowed(f"an offer of model {offer.model!r}; this device answers with {known!r}")
    if active is not None and offer.number <= active.number:
        raise RollbackRefused(f"an offer of release {offer.number}; {active.number} answers here already")
    return offer
