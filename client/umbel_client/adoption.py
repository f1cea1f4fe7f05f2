"""The newest release: verify, fetch, prove on golden examples, test on this device's data, take over or turn down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from umbel.bundle import Bundle
from umbel.errors import (
    BundleInvalid,
    DigestMismatch,
    MalformedMessage,
    NotAllowed,
    NotAuthentic,
    RuntimeFailure,
    UmbelError,
    Unavailable,
)
from umbel.fields import as_text
from umbel.file_delta import FileDelta
from umbel.offer import SignedOffer
from umbel.release import Release, SignedRelease
from umbel.self_check import verify_golden
from umbel.visit import Outcome, ReleaseOutcome
from umbel.weights import Weights
from umbel_client.examples import Split
from umbel_client.fetching import fetch_bundle
from umbel_client.kit import Kit
from umbel_client.listing import Listing
from umbel_client.offered import Offered, believe, find_listed, verify_offered
from umbel_client.personal import Comparison, judge_release
from umbel_client.predictor import Answering
from umbel_client.slots import TRIES, Personal, Slot, Slots, Trial
from umbel_client.state import Known, Scores
from umbel_client.trust import Trust

Deltas = tuple[FileDelta, ...]


class Adoption:
    """Takes releases over.

    Args:
        kit: what the visit works with.
        switched: told when the slots have changed, so that the predictor follows.
    """

    def __init__(self, kit: Kit, switched: Callable[[], object]) -> None:
        self._kit = kit
        self._switched = switched
        self.refusal = ""
        """Why the last offer couldn't be believed, in words."""

    async def consider(
        self, signed: SignedRelease, *, serving_well: bool, deltas: Deltas = ()
    ) -> ReleaseOutcome | None:
        """Take a release over or turn it down; None if it was judged before and nothing has changed since.

        Args:
            signed: as the coordinator sent it.
            serving_well: False if what the slots hold doesn't load, so that even a known release is wanted again.
            deltas: unsigned hints of shorter ways to its files.

        Raises:
            NotAuthentic, NotAllowed: it may not be believed; nothing was fetched.
            Unavailable: the way there broke, or the device is needed; it is considered again at the next visit.
        """
        release = self._believed(signed)
        memory = self._kit.memory
        revision = self._kit.examples.revision()
        known = release.number <= memory.state.judged
        if known and serving_well and revision == memory.state.judged_examples:
            return None
        try:
            outcome = await self._judge(release, deltas)
        except Unavailable:
            raise
        except UmbelError as error:
            outcome = ReleaseOutcome(release.model, release.number, Outcome.FAILED, f"{error.code}: {error}")
            if isinstance(error, DigestMismatch):
                # Other bytes may come next time: told, but not settled.
                memory.put(memory.state.with_outcome(outcome, self._kit.clock.now()))
                return outcome
        state = memory.state if known else memory.state.with_outcome(outcome, self._kit.clock.now())
        memory.put(replace(state, judged=release.number, judged_examples=revision))
        return outcome

    async def follow(self, listing: Listing, signed: SignedOffer, deltas: Deltas = ()) -> ReleaseOutcome | None:
        """Follow an offer: take the release over on trial, or turn it down; the answer goes up with the next visit.

        None if nothing can be said yet: the listing is out of date, signed by too few, or doesn't hold what is offered;
        what answers goes on answering.

        Raises:
            Unavailable: the way there broke, or the device is needed; it is considered again at the next visit.
        """
        memory, self.refusal = self._kit.memory, ""
        try:
            offer = verify_offered(self._kit, signed)
        except (NotAuthentic, NotAllowed, MalformedMessage) as error:
            self.refusal = as_text(f"{error.code}: {error}")
            return None
        # Needed elsewhere since it checked in: the offer stays open, and comes again at the next visit.
        self._kit.require_free()
        try:
            offered = await self._offered(listing, signed)
            if offered is None:
                return None
            self._kit.memory.know(replace(memory.known, model=offer.model))
            outcome = await self._try(offered, deltas)
        except Unavailable:
            raise
        except UmbelError as error:
            outcome = ReleaseOutcome(offer.model, offer.number, Outcome.FAILED, f"{error.code}: {error}")
        outcome = replace(outcome, execution=offer.execution)
        state = memory.state.with_outcome(outcome, self._kit.clock.now()).with_execution(offer.execution)
        revision = self._kit.examples.revision()
        memory.put(replace(state, judged=offer.number, judged_examples=revision, attempt=("", 0)))
        return outcome

    async def _offered(self, listing: Listing, signed: SignedOffer) -> Offered | None:
        """What an offer means; None, and a refusal, where that can't be shown now: no fault of the release's."""
        try:
            return await believe(self._kit, listing, signed)
        except Unavailable:
            raise
        except UmbelError as error:
            self.refusal = as_text(f"{error.code}: {error}")
            return None

    async def reconsider(self, listing: Listing, *, serving_well: bool) -> None:
        """Make the active release this device's own anew, once there are other examples than it was tested with; or
        fetch it anew, where what the slots hold doesn't load.

        Raises:
            Unavailable: the way there broke, or the device is needed; it is considered again at the next visit.
        """
        active, memory = self._kit.shelf.slots.active, self._kit.memory
        revision = self._kit.examples.revision()
        if active is None or (serving_well and revision == memory.state.judged_examples):
            return
        self.refusal = ""
        try:
            await self._judge(await self._release_of(active, listing))
        except Unavailable:
            raise
        except UmbelError as error:
            self.refusal = as_text(f"{error.code}: {error}")
        self._switched()
        memory.put(replace(memory.state, judged_examples=revision))

    def prove(self, answering: Answering) -> None:
        """Commit a release whose trial is over, and note one that was given up, for the next check-in."""
        kit, slots = self._kit, self._kit.shelf.slots
        trial, active = slots.trial, slots.active
        if slots.reverted is not None:
            gone = slots.reverted
            told = ReleaseOutcome(gone.model, gone.number, Outcome.REVERTED, gone.reason, gone.execution)
            kit.memory.put(kit.memory.state.with_outcome(told, kit.clock.now()))
            kit.shelf.change(Slots.told)
        elif trial is not None and active is not None and answering.well:
            answering.healthy()
            now = kit.clock.now()
            if now < trial.since:
                kit.shelf.change(lambda slots: slots.tried_from(now))
            elif now - trial.since >= kit.personal.trial_seconds:
                done = ReleaseOutcome(active.model, active.number, Outcome.COMMITTED, execution=trial.execution)
                # As above, what will be told goes first: dying in between tells it twice, never not at all.
                kit.memory.put(kit.memory.state.with_outcome(done, now))
                kit.shelf.change(Slots.commit)

    async def _release_of(self, slot: Slot, listing: Listing) -> Release:
        """An adopted release; its manifest may be gone from the shelf."""
        shelf = self._kit.shelf
        if shelf.holds(slot.bundle):
            size = shelf.path(slot.bundle).stat().st_size
        else:
            size = (await find_listed(self._kit, listing, slot.model, slot.number)).manifest_size
        return Release(slot.model, slot.number, slot.version, self._kit.identity.channel, slot.bundle, size, 0.0)

    async def _try(self, offered: Offered, deltas: Deltas) -> ReleaseOutcome:
        """Judge a release, unless it has failed here before, or has taken the process down at each try."""
        memory, offer = self._kit.memory, offered.offer
        if offered.listed.bundle in self._kit.shelf.slots.blocked:
            raise BundleInvalid("this content failed on this device before and is blocked here")
        execution, tries = memory.state.attempt
        tries = tries + 1 if execution == offer.execution else 1
        if tries > TRIES:
            raise RuntimeFailure(f"testing it took this device's process down {TRIES} times")
        # Durable: a release may take the whole machine down.
        memory.put(replace(memory.state, attempt=(offer.execution, tries)), durable=True)
        active = self._kit.shelf.slots.active
        taken_back = active is not None and offered.listed.takes_back(active.number)
        trial = Trial(offer.execution, self._kit.clock.now())
        try:
            return await self._judge(offered.release, deltas, trial=trial, taken_back=taken_back)
        except (Unavailable, asyncio.CancelledError):
            # A broken way, or somebody who needs the device, says nothing about the release: that was no try.
            memory.put(replace(memory.state, attempt=(offer.execution, tries - 1)))
            raise

    def _believed(self, signed: SignedRelease) -> Release:
        known, identity = self._kit.memory.known, self._kit.identity
        trust = Trust(identity.release_key, identity.channel, known.model, known.seen)
        release = trust.verify_newest(signed)
        trust = trust.remember(release)
        self._kit.memory.know(Known(trust.model, trust.seen))
        return release

    async def _judge(
        self, release: Release, deltas: Deltas = (), *, trial: Trial | None = None, taken_back: bool = False
    ) -> ReleaseOutcome:
        """Test a release here, and switch to it unless it is worse; what is taken back is replaced at any rate."""
        kit = self._kit
        bundle = await fetch_bundle(kit, release, deltas)
        slots = kit.shelf.slots

        def test() -> Comparison:
            verify_golden(kit.runtime, bundle)
            return kit.learning(bundle, judged)

        def judged(split: Split) -> Comparison:
            present = self._present(slots)
            return judge_release(
                bundle, present, split, kit.personal, kit.runtime, kit.clock, kit.device, kit.against_going_on
            )

        tested = await kit.work(test)
        self._remember_scores(release, tested)
        outcome = ReleaseOutcome(
            release.model,
            release.number,
            Outcome.ADOPTED,
            accuracy_change=tested.accuracy_change,
            latency_ratio=tested.latency_ratio,
        )
        if tested.worse_than_present(kit.personal.margin) and not taken_back:
            reason = f"{tested.best:.4f} against {tested.present:.4f} on {tested.examples} held-back examples"
            return replace(outcome, outcome=Outcome.KEPT_OWN, reason=reason)
        self._switch(release, bundle, tested, trial)
        return outcome

    def _present(self, slots: Slots) -> tuple[Bundle, Weights] | None:
        if slots.active is None:
            return None
        try:
            bundle = self._kit.shelf.bundle(slots.active.bundle, self._kit.runtime.name)
            own = slots.personal
            return bundle, self._kit.shelf.personal_weights(own.weights) if own else bundle.shared_weights()
        except UmbelError:
            # What can't be read can't serve either: anything that runs is better.
            return None

    def _switch(self, release: Release, bundle: Bundle, tested: Comparison, trial: Trial | None) -> None:
        personal = None
        if tested.personal_wins and tested.tuned_weights is not None:
            weights = self._kit.shelf.put_personal(tested.tuned_weights)
            personal = Personal(release.bundle, weights)
        self._kit.shelf.change(lambda now: now.adopt(Slot.of(release), personal, trial))
        self._switched()
        self._kit.shelf.tidy()

    def _remember_scores(self, release: Release, tested: Comparison) -> None:
        kept_own = tested.worse_than_present(self._kit.personal.margin)
        scores = Scores(
            release=release.number,
            global_=tested.release,
            personal=tested.tuned,
            serving=tested.present if kept_own else tested.best,
            examples=tested.examples,
        )
        self._kit.memory.put(replace(self._kit.memory.state, scores=scores))
