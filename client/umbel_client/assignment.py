"""An assignment, from its base to its acknowledgement: fetch, train, seal, report. Left anywhere, it goes on there."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

from umbel.bundle import Bundle
from umbel.descriptor import RoundDescriptor
from umbel.errors import Conflict, NotAllowed, RoundClosed, UmbelError, Unavailable
from umbel.messages import update_to_bytes
from umbel.plan import Kind
from umbel.release import Release
from umbel.sealing import SignedDescriptor, seal
from umbel.update import Update
from umbel.visit import Event, RetryWindow
from umbel_client.backoff import is_transient
from umbel_client.examples import Split
from umbel_client.fetching import fetch_bundle
from umbel_client.kit import Kit
from umbel_client.private import require_sealing, seal_privately, verify_round
from umbel_client.session import Session, SessionFolder
from umbel_client.trainer import Stopped, run
from umbel_client.trust import Trust


@dataclass(frozen=True, slots=True)
class Ended:
    """How a session ended, and when to come back."""

    session: Session
    window: RetryWindow
    error: UmbelError | None = None


class Assignments:
    """Carries one session to its end, from wherever it stands."""

    def __init__(self, kit: Kit, folder: SessionFolder) -> None:
        self._kit = kit
        self._folder = folder

    def left_open(self) -> Session | None:
        """The session that the last visit left; None if there is none, or its deadline passed while it was away."""
        session = self._folder.load()
        if session is None:
            return None
        session = session.after(Event.INTERRUPTED)
        # A report that was on its way may count already, its acknowledgement lost: that is worth the question.
        if self._kit.clock.now() >= session.assignment.deadline and not session.may_count:
            self._end(session, session.assignment.if_rejected, RoundClosed("its deadline passed"))
            return None
        return session

    async def carry_out(self, session: Session) -> Ended:
        """Do what is left to do.

        Raises:
            Unavailable: the coordinator can't be reached, or the device is needed; the session stays open.
            UmbelError: the same report may yet be taken before the deadline; the session stays open.
        """
        try:
            session, sealed = await self._sealed(session)
            return await self._report(session, sealed)
        except Unavailable:
            raise
        except UmbelError as error:
            # Saved as it was before the failing step; what the coordinator hears of is the failure itself.
            session = self._folder.load() or session
            if session.may_count and is_transient(error) and self._kit.clock.now() < session.assignment.deadline:
                raise
            event = Event.REPORT_REFUSED if isinstance(error, Conflict) else Event.FAILED
            return self._end(session.after(event), session.assignment.if_rejected, error)

    async def _sealed(self, session: Session) -> tuple[Session, bytes]:
        kept = self._folder.sealed(session)
        if kept is not None:
            return session, kept
        require_sealing(session.assignment, self._kit.pinned)
        await self._renew_at_helper()
        release = Trust(self._kit.identity.release_key).verify_base(session.assignment.base)
        bundle = await fetch_bundle(self._kit, release, session.deltas)
        self._kit.memory.put(self._kit.memory.state.with_base(release.bundle))
        if session.assignment.private_round is not None:
            # Before the work, not after it.
            self._verified(session, session.assignment.private_round, release)
        session = session.after(Event.FETCHED, Event.TRAINING_STARTED)
        self._folder.save(session)
        sealed = await self._kit.work(lambda: self._train(session, bundle, release))
        session = session.after(Event.TRAINING_FINISHED)
        return self._folder.keep_sealed(session, sealed), sealed

    def _train(self, session: Session, bundle: Bundle, release: Release) -> bytes:
        revision = self._kit.examples.revision()
        update = self._kit.learning(bundle, lambda split: self._learnt(session, bundle, split, revision))
        return self._seal(session, update, release)

    def _learnt(self, session: Session, bundle: Bundle, split: Split, revision: int) -> Update:
        kit, job = self._kit, session.job(self._kit.device)
        progress = self._folder.progress(revision, split.count)
        try:
            return run(job, bundle, split, kit.runtime, kit.clock, kit.against_going_on, progress)
        except Stopped as stopped:
            if kit.examples.revision() == revision:
                self._folder.keep_progress(stopped.progress, revision, split.count)
            raise

    def _seal(self, session: Session, update: Update, release: Release) -> bytes:
        kit, assignment = self._kit, session.assignment
        signed, pinned = assignment.private_round, kit.pinned
        if signed is None or pinned is None:
            return seal(update_to_bytes(update), assignment.sealing, session.binding(release.bundle))
        descriptor = self._verified(session, signed, release)
        return seal_privately(descriptor, signed, assignment, session.report_id, update, pinned, kit.device)

    def _verified(self, session: Session, signed: SignedDescriptor, release: Release) -> RoundDescriptor:
        kit, pinned = self._kit, self._kit.pinned
        if pinned is None:
            raise NotAllowed("the round is private and this device has pinned no helper; enrol it at one")
        keys = (kit.identity.release_key, pinned.card.identity)
        population = kit.identity.population
        return verify_round(signed, session.assignment, release.bundle, population, keys, kit.privacy, kit.clock.now())

    async def _renew_at_helper(self) -> None:
        """Keep the certificate at the helper fresh; a helper that is away is asked again at the next visit."""
        kit, pinned = self._kit, self._kit.pinned
        if pinned is None or kit.clock.now() < pinned.renew_after:
            return
        from umbel_client.participation import renew_at_helper

        with contextlib.suppress(Unavailable):
            kit.pinning.keep(await renew_at_helper(pinned, kit.identity.population, kit.clock.now()))

    async def _report(self, session: Session, sealed: bytes) -> Ended:
        session = session.after(Event.REPORT_STARTED)
        self._folder.save(session)
        window = await self._kit.channel.report(session.question(sealed), sealed)
        state, now = self._kit.memory.state, self._kit.clock.now()
        if session.assignment.plan.kind is Kind.TRAIN:
            state = replace(state, last_contribution=now)
        self._kit.memory.note(replace(state, contributions=state.contributions + 1))
        return self._end(session.after(Event.REPORT_ACCEPTED), window)

    def _end(self, session: Session, window: RetryWindow, error: UmbelError | None = None) -> Ended:
        # First what will be told, then what it was about: dying in between tells it twice, never not at all.
        self._kit.memory.put(self._kit.memory.state.with_session(session.record(error)))
        self._folder.clear()
        self._kit.shelf.tidy()
        return Ended(session, window, error)
