"""The device: it answers on its own, learns from what it sees, and visits its coordinator when nobody needs it.

device = Device.open(home)
device.predict(x)
device.learn_from(x, y)
visit = await device.wake()
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from numpy.typing import NDArray

from umbel.clock import Clock, SystemClock
from umbel.errors import Interrupted, RuntimeFailure, UmbelError, Unavailable, WrongState, unusable
from umbel.randomness import generator
from umbel.runtime import Runtime
from umbel.version import VERSION
from umbel.visit import (
    Assignment,
    CheckIn,
    CheckInReply,
    ReleaseOutcome,
    Retry,
    RetryWindow,
    SessionRecord,
)
from umbel_client import opening
from umbel_client.adoption import Adoption
from umbel_client.assignment import Assignments, Ended
from umbel_client.backoff import retry_window
from umbel_client.channel import Channel
from umbel_client.enrolment import Identity, IdentityKeeper, load_identity
from umbel_client.examples import INPUT, TARGET, Arrays, ExampleStore, as_arrays
from umbel_client.files import Disk, make_folder, within
from umbel_client.health import AnswerTimes, health_of
from umbel_client.idle import Eligible, IdlePolicy, Verdict, Waiting
from umbel_client.kit import Kit, Memory, Offload, only_visitor
from umbel_client.personal import PersonalSettings
from umbel_client.predictor import Answering, Outputs, Predictor
from umbel_client.private import Pinning, PrivacyPolicy
from umbel_client.session import Session, SessionFolder
from umbel_client.shelf import Shelf
from umbel_client.status import StatusSource
from umbel_client.visits import WAITING_WINDOW, Ending, Visit

if TYPE_CHECKING:
    from umbel_client.http_mirror import Mirror

T = TypeVar("T")


class Device:
    """One device; see `open`. `predict` and `learn_from` may be called from any thread, also during a visit."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._answering = Answering(kit.shelf, kit.runtime)
        self._sessions = SessionFolder(within(kit.home, "session"), kit.disk)
        self._adoption = Adoption(kit, self._answering.follow)
        self._assignments = Assignments(kit, self._sessions)
        self._times = AnswerTimes()

    @classmethod
    def open(
        cls,
        home: Path | str,
        *,
        identity: Identity | None = None,
        channel: Channel | None = None,
        runtime: Runtime | None = None,
        clock: Clock | None = None,
        examples: ExampleStore | None = None,
        status: StatusSource | None = None,
        policy: IdlePolicy | None = None,
        personal: PersonalSettings | None = None,
        shelf: Shelf | None = None,
        disk: Disk | None = None,
        offload: Offload = asyncio.to_thread,
        privacy: PrivacyPolicy | None = None,
        mirror: Mirror | None = None,
    ) -> Device:
        """Open the device that lives in a folder.

        Args:
            home: the folder; enrolled, unless `identity` is given.
            identity: who it is; None reads what enrolment left in `home`.
            channel: how to reach the coordinator; None means gRPC with mutual TLS.
            runtime, clock, status: None means ONNX Runtime with one thread, and what this Linux machine tells.
            examples, shelf: None means a SQLite file and a folder in `home`.
            policy, personal: when to work, and how to fine-tune; the defaults suit a phone.
            disk, offload: how to write durably, and where heavy work runs.
            privacy: what it asks of private rounds; a device whose home pins a helper joins no others.
            mirror: a web server that is asked before the coordinator; it needn't be trusted.

        Raises:
            NotFound: `home` isn't enrolled.
            MalformedMessage, OSError: a file in `home` is damaged, or `home` can't be read, or made.
        """
        home = Path(home)
        clock, disk = clock or SystemClock(), disk or Disk()
        identities = IdentityKeeper(home, identity or load_identity(home), disk)
        make_folder(home, 0o700)
        kit = Kit(
            home=home,
            identities=identities,
            device=identities.current.device_id,
            channel=channel or opening.grpc_channel(identities),
            runtime=runtime or opening.runtime_of(opening.RuntimeSettings()),
            clock=clock,
            shelf=shelf or Shelf(within(home, "shelf"), disk=disk),
            examples=examples or opening.examples_on_disk(home),
            policy=policy or IdlePolicy(),
            status=status or opening.linux_status(home, clock),
            personal=personal or PersonalSettings(),
            memory=Memory(home, disk),
            disk=disk,
            offload=offload,
            pinning=Pinning(home, disk),
            privacy=privacy or PrivacyPolicy(),
            mirror=mirror,
            listing=opening.release_listing(home, identities.current),
        )
        return cls(kit)

    # What an app uses.

    @property
    def id(self) -> str:
        """The device's id, derived from its key."""
        return self._kit.device

    @property
    def kit(self) -> Kit:
        """What this device works with, for those who show it."""
        return self._kit

    @property
    def predictor(self) -> Predictor:
        """What answers now; keep it only as long as you want the same weights to answer.

        Raises:
            WrongState: no release has been adopted yet.
        """
        if (predictor := self._answering.current) is None:
            it = "has no model yet" if self._kit.shelf.slots.active is None else "can't use its model now"
            raise WrongState(f"this device {it}; a visit (`await device.wake()`) brings what is released")
        return predictor

    @property
    def answers_with(self) -> str:
        """Which weights answer now, in words; empty when none do."""
        predictor = self._answering.current
        return predictor.source if predictor else ""

    def predict(self, x: Arrays | NDArray[Any]) -> Outputs:
        """The model's outputs by name, for a batch; see `Predictor`. No network."""
        return self._answered(lambda predictor: predictor(x))

    def probabilities(self, x: Arrays | NDArray[Any]) -> list[Mapping[str, float]]:
        """Label -> probability, most probable first, for each example of a batch; see `Predictor`."""
        return self._answered(lambda predictor: predictor.probabilities(x))

    def _answered(self, ask: Callable[[Predictor], T]) -> T:
        """An answer, timed; it shows that a release on trial can give one."""
        predictor, began = self.predictor, self._kit.clock.now()
        try:
            answer = ask(predictor)
        except RuntimeFailure:
            self._answering.failed()
            raise
        self._times.took(predictor, self._kit.clock.now() - began)
        with suppress(OSError):  # a full disk: proved by the next answer
            self._answering.healthy()
        return answer

    def learn_from(
        self, x: Arrays | NDArray[Any], y: Arrays | NDArray[Any], *, subject: str = "", held_back: bool | None = None
    ) -> int:
        """Keep examples to learn from at a later visit; they never leave this device.

        Args:
            x: inputs [n, ...]; an array, or arrays by name for a model with several inputs.
            y: targets [n, ...], likewise.
            subject: whom they are about, so that `forget` can find them.
            held_back: True to judge with them only, False to train with them only, None to let time decide.

        Returns:
            How many were kept.

        Raises:
            InputMismatch, NotFinite: not examples of this model, or of another form than those here; nothing was kept.
            Unavailable: the disk is full, or can't be written to; nothing was kept, try again later.
        """
        inputs, targets = as_arrays(x, INPUT), as_arrays(y, TARGET)
        predictor = self._answering.current
        if predictor is not None:
            predictor.require_examples(inputs, targets)
        return self._kit.examples.add(inputs, targets, at=self._kit.clock.now(), subject=subject, held_back=held_back)

    def forget(self, subject: str | None) -> int:
        """Delete a person's examples (None: everybody's) at once, and all that was derived from them here.

        The personal model and any report that wasn't sent yet go too; the released model answers until the next visit
        makes a new personal one of what is left. Returns how many examples went.
        """
        kit = self._kit
        if subject is not None and subject not in kit.examples.stats(kit.clock.now()).subjects:
            return 0
        # First what was derived: whoever dies in between finds the examples, and asks again.
        self._drop_derived()
        gone = kit.examples.forget(subject)
        # Once more, for what a visit has derived meanwhile.
        self._drop_derived()
        return gone

    def _drop_derived(self) -> None:
        self._kit.shelf.drop_personal()
        self._sessions.clear()
        self._answering.follow()

    def verdict(self) -> Verdict:
        """May this device work now, and if not, why not, in words."""
        kit, now = self._kit, self._kit.clock.now()
        history = kit.memory.state.history(kit.examples.stats(now).training, now)
        return kit.policy.verdict(kit.status.read(), history, now)

    def stop(self) -> None:
        """End a visit that is under way within one training step; it goes on at the next. From any thread."""
        self._kit.stopping.set()

    def rest(self) -> None:
        """Nothing is asked of it for now: before a long sleep, when its app leaves the screen, at its end.

        What was loaded hasn't taken this process down; unless an answer failed, a release on trial gets its tries back.
        """
        with suppress(OSError):  # a full disk: proved at the next visit
            self._answering.rests()

    close = rest  # for `with closing(device)`

    # One visit.

    async def wake(self) -> Visit:
        """One visit to the coordinator: everything that is due, or as much as conditions allow.

        Losing the process at any point is fine: the next visit goes on from there. Errors of the conversation, and a
        disk that is full, end the visit and stand in what it returns.

        Raises:
            WrongState: somebody is on a visit from this home, or enrolled it anew.
        """
        try:
            with only_visitor(self._kit.home):
                return await self._woken()
        except OSError as error:  # a disk that takes no lock takes nothing of a visit
            return self._fail(error)

    async def _woken(self) -> Visit:
        self._kit.identities.require_current()
        self._kit.stopping.clear()
        self._kit.memory.refresh()
        self._answering.follow()
        with suppress(OSError):  # a full disk: proved at the next visit
            self._adoption.prove(self._answering)
        before = self._kit.traffic
        try:
            verdict = self.verdict()
            if isinstance(verdict, Waiting):
                return self._leave(Ending.WAITED, WAITING_WINDOW, reasons=verdict.reasons)
            return await self._visit(verdict)
        except Interrupted as error:
            return self._leave(Ending.INTERRUPTED, retry_window(error, 1), error=error)
        except (UmbelError, OSError) as error:
            return self._fail(error)
        finally:
            self._book(before.up, before.down)
            await self._kit.channel.close()

    async def _visit(self, verdict: Eligible) -> Visit:
        await self._renew_certificate()
        session = self._assignments.left_open()
        if session is not None:
            return self._ended(await self._assignments.carry_out(session), None)
        answer = await self._check_in(verdict.offers_work)
        match answer.reply:
            case Assignment() as assignment:
                # On disk before anything else: a visit that breaks off here goes on with it at the next.
                session = Session.begin(assignment, answer.deltas)
                self._sessions.save(session)
                release = await self._consider(answer)
                return self._ended(await self._assignments.carry_out(session), release)
            case Retry(window, reason):
                release = await self._consider(answer)
                reasons = (*verdict.reasons, *filter(None, [reason]))
                return self._leave(Ending.RESTED, window, reasons=reasons, release=release)

    async def _consider(self, answer: CheckInReply) -> ReleaseOutcome | None:
        listing = self._kit.listing
        if listing is None:
            if answer.newest is None:
                return None
            return await self._adoption.consider(answer.newest, serving_well=self._answering.well, deltas=answer.deltas)
        if answer.offer is not None:
            return await self._adoption.follow(listing, answer.offer, answer.deltas)
        await self._adoption.reconsider(listing, serving_well=self._answering.well)
        return None

    async def _renew_certificate(self) -> None:
        identity = self._kit.identity
        if not identity.certificate_chain or not identity.renewal_due(self._kit.clock.now()):
            return
        self._kit.identities.renewed(await self._kit.channel.renew(identity.certificate_request()))
        await self._kit.channel.close()

    async def _check_in(self, offers_work: bool) -> CheckInReply:
        kit, state = self._kit, self._kit.memory.state
        held, slots = kit.examples.stats(kit.clock.now()), kit.shelf.slots
        reply = await kit.channel.check_in(
            CheckIn(
                population=kit.identity.population,
                runtimes=(kit.runtime.name,),
                suites=kit.suites,
                held_bundles=kit.shelf.held_bundles(slots, state.bases),
                offers_work=offers_work,
                training_examples=held.training,
                held_back_examples=held.held_back,
                sessions=state.sessions,
                outcomes=state.outcomes,
                channel=kit.identity.channel,
                sdk=f"umbel-python/{VERSION}",
                release=slots.active.number if slots.active else 0,
                health=health_of(kit, self._answering.current, self._times),
            )
        )
        if state.sessions or state.outcomes:
            # Told again should the process end before the next change is saved: twice, never not at all.
            kit.memory.note(state.told(len(state.sessions), len(state.outcomes)))
        return reply

    def _ended(self, ended: Ended, release: ReleaseOutcome | None) -> Visit:
        ending = Ending.CONTRIBUTED if ended.error is None else Ending.REFUSED
        record = ended.session.record(ended.error)
        return self._leave(ending, ended.window, release=release, session=record, error=ended.error)

    def _fail(self, error: UmbelError | OSError) -> Visit:
        told = error if isinstance(error, UmbelError) else Unavailable(f"{unusable(error)}; the next visit goes on")
        failures = self._kit.memory.state.failures + 1
        return self._leave(Ending.FAILED, retry_window(told, failures), error=told, failures=failures)

    def _leave(
        self,
        ending: Ending,
        window: RetryWindow,
        *,
        reasons: tuple[str, ...] = (),
        release: ReleaseOutcome | None = None,
        session: SessionRecord | None = None,
        error: UmbelError | None = None,
        failures: int = 0,
    ) -> Visit:
        kit, state, now = self._kit, self._kit.memory.state, self._kit.clock.now()
        due = window.draw(generator("wake", kit.device, state.visits), now)
        words = f"{error.code}: {error}" if error else self._adoption.refusal
        reasons += state.left_out_in_words if release or session else ()
        kit.memory.note(replace(state, next_wake=due, visits=state.visits + 1, failures=failures, last_error=words))
        return Visit(ending, now, due, reasons, release, session, error)

    def _book(self, up: int, down: int) -> None:
        """Book the visit's traffic, and save with it what was noted on the way."""
        traffic, now = self._kit.traffic, self._kit.clock.now()
        self._kit.memory.keep(self._kit.memory.state.spent(now, up=traffic.up - up, down=traffic.down - down))
