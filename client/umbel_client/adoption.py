"""The newest release: verify, fetch, prove on golden examples, test on this device's data, take over or turn down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from umbel.bundle import Bundle
from umbel.errors import DigestMismatch, UmbelError, Unavailable
from umbel.golden import verify_golden
from umbel.release import Release, SignedRelease
from umbel.visit import Outcome, ReleaseOutcome
from umbel.weights import Weights
from umbel_client.fetching import fetch_bundle
from umbel_client.kit import Kit
from umbel_client.personal import Tested, judge_release
from umbel_client.shelf import Personal, Slot, Slots
from umbel_client.state import Known, Scores
from umbel_client.trust import Trust


class Adoption:
    """Takes releases over.

    Args:
        kit: what the visit works with.
        switched: told when the slots have changed, so that the predictor follows.
    """

    def __init__(self, kit: Kit, switched: Callable[[], object]) -> None:
        self._kit = kit
        self._switched = switched

    async def consider(self, signed: SignedRelease, *, serving_well: bool) -> ReleaseOutcome | None:
        """Take a release over or turn it down; None if it was judged before and nothing has changed since.

        Args:
            signed: as the coordinator sent it.
            serving_well: False if what the slots hold doesn't load, so that even a known release is wanted again.

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
            outcome = await self._judge(release)
        except Unavailable:
            raise
        except UmbelError as error:
            outcome = ReleaseOutcome(release.model, release.number, Outcome.FAILED, f"{error.code}: {error}")
            if isinstance(error, DigestMismatch):
                # Other bytes may come next time: told, but not settled.
                memory.put(memory.state.with_outcome(outcome))
                return outcome
        state = memory.state if known else memory.state.with_outcome(outcome)
        memory.put(replace(state, judged=release.number, judged_examples=revision))
        return outcome

    def _believed(self, signed: SignedRelease) -> Release:
        known, identity = self._kit.memory.known, self._kit.identity
        trust = Trust(identity.release_key, identity.channel, known.model, known.seen)
        release = trust.verify_newest(signed)
        trust = trust.remember(release)
        self._kit.memory.know(Known(trust.model, trust.seen))
        return release

    async def _judge(self, release: Release) -> ReleaseOutcome:
        kit = self._kit
        bundle = await fetch_bundle(kit.channel, kit.shelf, release, kit.runtime.name)
        slots = kit.shelf.slots

        def test() -> Tested:
            verify_golden(kit.runtime, bundle)
            return judge_release(
                bundle,
                self._present(slots),
                kit.split(),
                kit.personal,
                kit.runtime,
                kit.clock,
                kit.device,
                kit.against_going_on,
            )

        tested = await kit.work(test)
        self._remember_scores(release, tested)
        if tested.worse_than_present(kit.personal.margin):
            reason = f"{tested.best:.4f} against {tested.present:.4f} on {tested.examples} held-back examples"
            return ReleaseOutcome(release.model, release.number, Outcome.KEPT_OWN, reason)
        self._switch(slots, release, bundle, tested)
        return ReleaseOutcome(release.model, release.number, Outcome.ADOPTED)

    def _present(self, slots: Slots) -> tuple[Bundle, Weights] | None:
        if slots.active is None:
            return None
        try:
            bundle = self._kit.shelf.bundle(slots.active.bundle)
            own = slots.personal
            return bundle, self._kit.shelf.weights(own.weights) if own else bundle.shared_weights()
        except UmbelError:
            # What can't be read can't serve either: anything that runs is better.
            return None

    def _switch(self, slots: Slots, release: Release, bundle: Bundle, tested: Tested) -> None:
        personal = None
        if tested.personal_wins and tested.tuned_weights is not None:
            weights = self._kit.shelf.put(tested.tuned_weights.to_bytes())
            personal = Personal(bundle.manifest.digest, weights)
        self._kit.shelf.switch(slots.adopt(Slot.of(release), personal))
        self._switched()
        self._kit.shelf.tidy()

    def _remember_scores(self, release: Release, tested: Tested) -> None:
        kept_own = tested.worse_than_present(self._kit.personal.margin)
        scores = Scores(
            release=release.number,
            global_=tested.release,
            personal=tested.tuned,
            serving=tested.present if kept_own else tested.best,
            examples=tested.examples,
        )
        self._kit.memory.put(replace(self._kit.memory.state, scores=scores))
