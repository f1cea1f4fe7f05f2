"""What a visit works with, as one value, and what it remembers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from umbel.bundle import Bundle
from umbel.clock import Clock
from umbel.descriptor import TWO_AGGREGATORS
from umbel.errors import InputMismatch, Interrupted, RuntimeFailure
from umbel.holding import locked
from umbel.identity import DeviceId
from umbel.runtime import Runtime
from umbel.sealing import SEALED
from umbel_client.channel import Channel, Traffic
from umbel_client.enrolment import Identity, IdentityKeeper
from umbel_client.examples import ExampleStore, Split
from umbel_client.files import Disk, read_any, within
from umbel_client.idle import IdlePolicy
from umbel_client.listing import Listing
from umbel_client.personal import PersonalSettings
from umbel_client.predictor import require_labels
from umbel_client.private import Pinned, Pinning, PrivacyPolicy
from umbel_client.shelf import Shelf
from umbel_client.state import DeviceState, Known, load_known, save_known, state_from_bytes, state_to_bytes
from umbel_client.status import StatusSource
from umbel_client.usable import usable

if TYPE_CHECKING:
    from umbel_client.http_mirror import Mirror

T = TypeVar("T")


class Offload(Protocol):
    """Runs heavy work away from the event loop: `asyncio.to_thread`, or at once in a simulation."""

    def __call__(self, work: Callable[[], Any], /) -> Awaitable[Any]:
        """Run `work` and give its result."""


class Memory:
    """The device's state and the releases it knows, saved at each change that a next step builds on.

    Raises:
        MalformedMessage: the file of known releases is damaged.
    """

    known: Known

    def __init__(self, home: Path, disk: Disk) -> None:
        self._state_file = within(home, "state.json")
        self._known_file = within(home, "known.json")
        self._disk = disk
        self.state = self._saved = DeviceState()
        self._content = b""
        """Of the file, when it was last read or written."""
        self.refresh()

    def note(self, state: DeviceState) -> None:
        """Remember `state` from now on, and on disk from the next `put` on: a visit ends with one."""
        self.state = state

    def put(self, state: DeviceState, *, durable: bool = False) -> None:
        """Remember `state` from now on, also when the process ends here; or, durable, the machine."""
        if state != self._saved:
            content = state_to_bytes(state)
            self._disk.write(self._state_file, content, durable=durable)
            self._saved, self._content = state, content
        self.state = state

    def keep(self, state: DeviceState) -> None:
        """`put` where the disk takes it, else `note`: a visit that is over stays so."""
        try:
            self.put(state)
        except OSError:
            self.note(state)

    def know(self, known: Known) -> None:
        """Know these releases from now on, through any power cut."""
        if known != self.known:
            save_known(self._known_file, known, self._disk)
            self.known = known

    def refresh(self) -> None:
        """Take over what another process wrote meanwhile."""
        try:
            content = read_any(self._state_file) or b""
        except OSError:
            content = b""
        if content != self._content:
            self._content, self._saved = content, state_from_bytes(content)
        self.state = self._saved
        self.known = load_known(self._known_file)


@dataclass(frozen=True, slots=True)
class Kit:
    """Everything that the steps of a visit share."""

    home: Path
    identities: IdentityKeeper
    device: DeviceId
    channel: Channel
    runtime: Runtime
    clock: Clock
    shelf: Shelf
    examples: ExampleStore
    policy: IdlePolicy
    status: StatusSource
    personal: PersonalSettings
    memory: Memory
    disk: Disk
    offload: Offload
    pinning: Pinning
    privacy: PrivacyPolicy = field(default_factory=PrivacyPolicy)
    mirror: Mirror | None = None
    """Asked before the coordinator for all that proves itself: metadata by signatures, files by digests."""
    listing: Listing | None = None
    """What the device believes of releases beyond the release key; None where it pinned that key alone."""
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def identity(self) -> Identity:
        """Who this device is now."""
        return self.identities.current

    @property
    def traffic(self) -> Traffic:
        """What has crossed the channel and come from the mirror so far."""
        told, mirrored = self.channel.traffic, self.mirror.came if self.mirror else 0
        return Traffic(told.up, told.down + mirrored)

    @property
    def pinned(self) -> Pinned | None:
        """The helper that this device trusts, if it has one."""
        return self.pinning.current

    @property
    def suites(self) -> tuple[str, ...]:
        """How it seals reports: with a helper as shares only, without one to the coordinator."""
        return (TWO_AGGREGATORS,) if self.pinned else (SEALED,)

    def against_going_on(self) -> tuple[str, ...]:
        """What stands against working right now; asked from the training thread, at each step."""
        if self.stopping.is_set():
            return ("the app asked to stop",)
        return self.policy.interruptions(self.status.read(), self.clock.now())

    def require_free(self) -> None:
        """Raise `Interrupted` if something stands against working right now; asked before each file."""
        against = self.against_going_on()
        if against:
            raise Interrupted(f"put off: {'; '.join(against)}")

    def learning(self, bundle: Bundle, work: Callable[[Split], T]) -> T:
        """The result of `work` on the examples that a model can use; the rest, if any, is left out and counted.

        They may have come before the model did, or hold numbers that its graphs alone know to be too large.

        Raises:
            InputMismatch, RuntimeFailure: as `work` does, or for labels that the model doesn't have: it can use all of
                the examples, or none.
        """
        found, left_out = self.examples.split(self.clock.now()), 0
        try:
            for part in (found.training, found.held_back):
                require_labels(bundle.manifest, part.targets)
            result = work(found)
        except (InputMismatch, RuntimeFailure):
            kept = usable(found, bundle, self.runtime, self.require_free)
            left_out = found.count - kept.count
            if left_out in (0, found.count):
                raise
            result = work(kept)
        self.memory.note(replace(self.memory.state, left_out=left_out))
        return result

    async def work(self, task: Callable[[], T]) -> T:
        """Run heavy work off the event loop and book its time; a cancelled visit stops it within a step, and waits.

        Raises:
            Interrupted: examples were deleted meanwhile; what was learnt from them is thrown away.
        """
        began, forgotten = self.clock.now(), self.examples.forgotten()
        working = asyncio.ensure_future(self.offload(task))
        try:
            result: T = await asyncio.shield(working)
        except asyncio.CancelledError:
            self.stopping.set()
            # It still writes here: the next visit may not begin before, nor may whoever deletes this home.
            await asyncio.wait([working])
            if not working.cancelled():
                working.exception()  # heard: asyncio would write of one that nobody asked for
            raise
        finally:
            now = self.clock.now()
            self.memory.put(self.memory.state.spent(now, seconds=now - began))
        if self.examples.forgotten() != forgotten:
            raise Interrupted("examples were deleted during the work; what was learnt from them was thrown away")
        return result


@contextlib.contextmanager
def only_visitor(home: Path) -> Iterator[None]:
    """Hold the home for one visit; raises `WrongState` if somebody visits from it already."""
    refusal = f"somebody is on a visit from {home} already; try again once that is over"
    with within(home, "lock").open("ab") as file, locked(file.fileno(), refusal):
        yield
