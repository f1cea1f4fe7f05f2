"""The values of one visit: what a device offers, and what it is told."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np

from umbel.digests import Digest
from umbel.errors import OutOfBounds
from umbel.file_delta import FileDelta
from umbel.offer import SignedOffer
from umbel.plan import Plan
from umbel.release import STABLE, SignedRelease
from umbel.sealing import Sealing, SignedDescriptor

PROTOCOL: Final = 1


class Event(Enum):
    """What happens in a session, one letter each: a session's events in order are its *shape*.

    After Bonawitz et al. 2019 (table 1), who print the shapes of a fleet's sessions to see where it loses them.
    """

    CHECKED_IN = "-"
    FETCHED = "v"
    TRAINING_STARTED = "["
    TRAINING_FINISHED = "]"
    REPORT_STARTED = "+"
    REPORT_ACCEPTED = "^"
    REPORT_REFUSED = "#"
    INTERRUPTED = "!"
    FAILED = "*"


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """How one session went, as the device tells it at its next visit."""

    task: str
    round: int
    shape: str
    error: str = ""


class Outcome(Enum):
    """What a device did with a release."""

    ADOPTED = "adopted"
    KEPT_OWN = "kept-own"
    FAILED = "failed"
    COMMITTED = "committed"
    """After an adoption: it has proved itself."""
    REVERTED = "reverted"
    """After an adoption: it didn't, and the one before answers again."""


@dataclass(frozen=True, slots=True)
class ReleaseOutcome:
    """A device's answer to one release."""

    model: str
    number: int
    outcome: Outcome
    reason: str = ""
    execution: str = ""
    """Of the offer that it answers; empty for a release that came without one."""
    accuracy_change: float | None = None
    """Share of right answers on the held-back examples, new minus old."""
    latency_ratio: float | None = None
    """95th percentile of the time of an answer, new over old."""


@dataclass(frozen=True, slots=True)
class Health:
    """What a device measures of the release that answers, in use; None: not known."""

    accuracy: float | None = None
    """On its held-back examples (or minus the mean loss, where that is what it measures)."""
    latency_seconds: float | None = None
    """95th percentile of the time of an answer."""
    memory_mb: float | None = None
    """The most that its process has had, MB of 10^6 bytes."""


@dataclass(frozen=True, slots=True)
class CheckIn:
    """A device's offer to take part, or (without `offers_work`) its question for the newest release."""

    population: str
    runtimes: tuple[str, ...]
    suites: tuple[str, ...]
    held_bundles: tuple[Digest, ...] = ()
    offers_work: bool = True
    training_examples: int = 0
    held_back_examples: int = 0
    sessions: tuple[SessionRecord, ...] = ()
    outcomes: tuple[ReleaseOutcome, ...] = ()
    channel: str = STABLE
    sdk: str = ""
    protocol: int = PROTOCOL
    release: int = 0
    """Number of the release that answers now; 0 for none."""
    health: Health = Health()


@dataclass(frozen=True, slots=True)
class RetryWindow:
    """Come back between `earliest` and `latest` seconds from now (pace steering, Bonawitz et al. 2019, 2.3)."""

    earliest: float
    latest: float

    def __post_init__(self) -> None:
        if not 0 <= self.earliest <= self.latest < float("inf"):
            raise OutOfBounds(f"a retry window from {self.earliest} to {self.latest} seconds makes no sense")

    def draw(self, chance: np.random.Generator, now: float) -> float:
        """An instant inside the window, uniformly, so that devices told the same thing don't come as a herd."""
        return now + float(chance.uniform(self.earliest, self.latest))


@dataclass(frozen=True, slots=True)
class Retry:
    """Nothing to do now; come back inside the window."""

    window: RetryWindow
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A task to do now."""

    session_id: str
    task: str
    round: int
    plan: Plan
    base: SignedRelease
    sealing: Sealing
    upload_token: bytes
    deadline: float
    """POSIX seconds: a report that begins later is refused."""
    if_accepted: RetryWindow
    if_rejected: RetryWindow
    private_round: SignedDescriptor | None = None
    """Both aggregators' agreement on a private round; None: the leader opens each update by itself."""

    def __repr__(self) -> str:
        return f"Assignment(task={self.task!r}, round={self.round}, session_id={self.session_id!r})"


Reply = Assignment | Retry


@dataclass(frozen=True, slots=True)
class CheckInReply:
    """What a check-in is answered with: work or a window, and what the device may move to.

    A device that pinned a release listing believes `offer` only; one that pinned just a key follows `newest`.
    """

    reply: Reply
    newest: SignedRelease | None = None
    offer: SignedOffer | None = None
    deltas: tuple[FileDelta, ...] = ()
    """Shorter ways to files of the bundles above; unsigned hints."""


@dataclass(frozen=True, slots=True)
class ReportBegin:
    """The question before an upload: is this report still wanted, and how much of it is there already?"""

    session_id: str
    report_id: str
    upload_token: bytes
    sealed_size: int
    sealed_digest: Digest

    def __repr__(self) -> str:
        return f"ReportBegin(session_id={self.session_id!r}, report_id={self.report_id!r}, {self.sealed_size} bytes)"


@dataclass(frozen=True, slots=True)
class Enrolment:
    """What a device learns when it enrols; it pins both keys."""

    certificate_chain: bytes
    population: str
    release_key: bytes
    server_authority: bytes
    device_address: str
    release_root: bytes = b""
    """TUF root metadata; empty where the release key alone is trusted."""
