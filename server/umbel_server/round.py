"""A round as a pure state machine: values in, values out; no IO, no clock.

    COLLECTING --goal met, or due with the minimum--> AGGREGATING --> VALIDATING --accepted--> COMPLETED(version)
         |                                                |                |
         +--deadline below the minimum, or stopped--> ABANDONED            +--refused--> FAILED(reason)

    a session (one device's part in it):  ASSIGNED --> REPORTED | EXPIRED | ABORTED | FAILED(kind)

Every method returns a new `Round` or raises a `Conflict` and leaves the old one standing, so that the coordinator can
write the difference into its store and tests can replay anything. A TRAIN round makes a candidate; an EVALUATE round
of the same number measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from umbel.clock import CLOCK_SLACK_SECONDS
from umbel.digests import Digest
from umbel.errors import AlreadyReported, NotFound, RoundClosed, WrongState
from umbel.identity import DeviceId
from umbel.plan import Kind
from umbel.update import Metrics

UPLOAD_GRACE_SECONDS: Final = 30.0
"""How long after its deadline a session's upload, begun in time, may still end."""


class RoundState(Enum):
    """Where a round stands."""

    COLLECTING = "collecting"
    AGGREGATING = "aggregating"
    VALIDATING = "validating"
    COMPLETED = "completed"
    ABANDONED = "abandoned"
    FAILED = "failed"

    @property
    def is_over(self) -> bool:
        """Whether nothing can happen to the round any more."""
        return self in (RoundState.COMPLETED, RoundState.ABANDONED, RoundState.FAILED)


class SessionState(Enum):
    """Where one device's part in a round stands."""

    ASSIGNED = "assigned"
    REPORTED = "reported"
    EXPIRED = "expired"
    ABORTED = "aborted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Session:
    """One device's part in a round."""

    id: str
    device: DeviceId
    token_digest: str
    """SHA-256 of the upload token, in hex: the store can't be used to report."""
    assigned_at: float
    deadline: float
    """A report that begins later is refused."""
    state: SessionState = SessionState.ASSIGNED
    detail: str = ""
    ended_at: float | None = None
    report_id: str | None = None
    sequence: int | None = None
    """Its report's place in the order of acceptance, from 0."""
    sealed_digest: Digest | None = None
    sealed_size: int = 0

    def ended(self, state: SessionState, detail: str, now: float) -> Session:
        """The same session, over."""
        return replace(self, state=state, detail=detail, ended_at=now)


@dataclass(frozen=True, slots=True)
class Base:
    """The version that a round's devices start from."""

    version: int
    release: int
    bundle: Digest


@dataclass(frozen=True, slots=True)
class RoundKey:
    """What names a round."""

    task: str
    number: int
    kind: Kind = Kind.TRAIN

    def __str__(self) -> str:
        return f"{self.task}/{self.number}/{self.kind.value}"


@dataclass(frozen=True, slots=True)
class Round:
    """One rendezvous of a cohort."""

    key: RoundKey
    base: Base
    goal: int
    minimum: int
    slots: int
    session_seconds: float
    """How long one session may take."""
    opened_at: float
    due: float
    """From here on the minimum is enough."""
    deadline: float
    """Here the round ends, one way or the other."""
    weights: int = 0
    """Numbers of one device's delta; 0 where only metrics are reported."""
    state: RoundState = RoundState.COLLECTING
    reason: str = ""
    sessions: Mapping[str, Session] = field(default_factory=dict)
    ended_at: float | None = None
    version: int | None = None
    """The version that it made: a candidate while VALIDATING, an accepted one when COMPLETED."""
    weight: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    """Sums over the cohort, as measured on the base."""

    def count(self, state: SessionState) -> int:
        """How many sessions stand there."""
        return sum(session.state is state for session in self.sessions.values())

    @property
    def reports(self) -> list[Session]:
        """The sessions whose reports count, in the order of acceptance."""
        reported = [session for session in self.sessions.values() if session.sequence is not None]
        return sorted(reported, key=lambda session: session.sequence or 0)

    @property
    def free_slots(self) -> int:
        """How many more devices may join now."""
        if self.state is not RoundState.COLLECTING:
            return 0
        return max(0, self.slots - self.count(SessionState.ASSIGNED) - self.count(SessionState.REPORTED))

    @property
    def bytes_up(self) -> int:
        """Sealed bytes of the reports that count."""
        return sum(session.sealed_size for session in self.sessions.values() if session.sequence is not None)

    @property
    def bytes_per_weight(self) -> float | None:
        """Sealed bytes of one report that counts, for each number of its delta; None before the first."""
        return bytes_per_weight(self.bytes_up, len(self.reports), self.weights)

    def session(self, session_id: str) -> Session:
        """One session; raises `NotFound`."""
        try:
            return self.sessions[session_id]
        except KeyError:
            raise NotFound(f"round {self.key} has no session {session_id!r}; check in again") from None

    def sessions_of(self, device: DeviceId) -> list[Session]:
        """All of one device's sessions in this round."""
        return [session for session in self.sessions.values() if session.device == device]

    # While it collects.

    def may_join(self, device: DeviceId) -> bool:
        """Whether a device may get a session: there is room, and it has neither reported nor been refused here.

        Its own open session doesn't stand in the way: `assign` puts the new one in its place.
        """
        own = self.sessions_of(device)
        if any(session.state in (SessionState.REPORTED, SessionState.FAILED) for session in own):
            return False
        is_open = any(session.state is SessionState.ASSIGNED for session in own)
        return self.state is RoundState.COLLECTING and (is_open or self.free_slots > 0)

    def assign(self, session_id: str, device: DeviceId, token_digest: str, now: float) -> Round:
        """Give a device a session; an open one of the same device is aborted in its favour.

        Raises:
            RoundClosed: no room, no longer collecting, or the device had its chance.
        """
        if now >= self.deadline or not self.may_join(device):
            raise RoundClosed(f"round {self.key} takes no further session of this device; come back later")
        if session_id in self.sessions:
            raise WrongState(f"session {session_id!r} exists already; draw another id")
        stale = [session for session in self.sessions_of(device) if session.state is SessionState.ASSIGNED]
        ended = [session.ended(SessionState.ABORTED, "superseded", now) for session in stale]
        deadline = min(self.deadline, now + self.session_seconds)
        return self._with(*ended, Session(session_id, device, token_digest, now, deadline))

    def admit(self, session_id: str, now: float) -> Session:
        """The session, if its report may still come: asked before a byte is uploaded.

        Raises:
            NotFound: no such session.
            RoundClosed: the round has what it needs, or the session is over.
        """
        session = self.session(session_id)
        if session.state is not SessionState.REPORTED:
            self._require_open(session)
            if now > session.deadline:
                raise RoundClosed(f"the session's deadline has passed; round {self.key} goes on without it")
        return session

    def receive(self, session_id: str, report_id: str, digest: Digest, size: int, now: float) -> Round:
        """Count one report; the same report again changes nothing.

        Raises:
            NotFound: no such session.
            AlreadyReported: another report of this session counts already.
            RoundClosed: the round has what it needs, or the session is over.
        """
        session = self.session(session_id)
        if session.state is SessionState.REPORTED:
            require_same_report(session, report_id)
            return self
        self._require_open(session)
        counted = replace(
            session.ended(SessionState.REPORTED, "", now),
            report_id=report_id,
            sequence=self.count(SessionState.REPORTED),
            sealed_digest=digest,
            sealed_size=size,
        )
        received = self._with(counted)
        if received.count(SessionState.REPORTED) >= self.goal:
            return received._closed("the goal is met", now)
        return received

    def fail(self, session_id: str, kind: str, now: float) -> Round:
        """End a session whose report couldn't be counted; the round goes on, and its slot is free."""
        session = self.session(session_id)
        self._require_open(session)
        return self._with(session.ended(SessionState.FAILED, kind, now))

    def abort(self, session_id: str, why: str, now: float) -> Round:
        """End a session from the server's side."""
        session = self.session(session_id)
        self._require_open(session)
        return self._with(session.ended(SessionState.ABORTED, why, now))

    def expire(self, now: float) -> Round:
        """End the sessions that have run out of time; the same round if there are none."""
        if self.state is not RoundState.COLLECTING:
            return self
        late = [
            session.ended(SessionState.EXPIRED, "", now)
            for session in self.sessions.values()
            if session.state is SessionState.ASSIGNED and now > session.deadline + UPLOAD_GRACE_SECONDS
        ]
        return self._with(*late) if late else self

    def close(self, now: float) -> Round:
        """Look at the time: the same round if it's early, else aggregating or abandoned."""
        reported = self.count(SessionState.REPORTED)
        was_ahead = now < self.opened_at - CLOCK_SLACK_SECONDS
        if self.state is not RoundState.COLLECTING or (now < self.due and not was_ahead):
            return self
        if reported >= self.minimum:
            return self._closed("it was due", now)
        if was_ahead:
            # Its deadline lies as far ahead, which may be years.
            return self.abandon("it was opened while this machine's clock was ahead", now)
        if now < self.deadline:
            return self
        return self.abandon(f"{reported} of at least {self.minimum} reports at the deadline", now)

    def abandon(self, reason: str, now: float) -> Round:
        """End a collecting round without a result.

        Raises:
            WrongState: it is past collecting.
        """
        if self.state is not RoundState.COLLECTING:
            raise WrongState(f"round {self.key} is {self.state.value}; only a collecting round can be abandoned")
        return replace(self._closed(reason, now), state=RoundState.ABANDONED, reason=reason, ended_at=now)

    # Once it has closed.

    def aggregated(self, weight: float, metrics: Metrics, version: int | None) -> Round:
        """The cohort's sum is known, and the candidate stands there to be judged.

        Raises:
            WrongState: it wasn't aggregating.
        """
        self._require(RoundState.AGGREGATING)
        return replace(self, state=RoundState.VALIDATING, weight=weight, metrics=metrics, version=version)

    def completed(self, version: int | None, now: float) -> Round:
        """Accepted: the round has made (or, to evaluate, measured) this version; `None` where a program took it.

        Raises:
            WrongState: it wasn't validating.
        """
        self._require(RoundState.VALIDATING)
        return replace(self, state=RoundState.COMPLETED, version=version, ended_at=now)

    def failed(self, reason: str, now: float) -> Round:
        """Refused, or nothing could be made of its reports.

        Raises:
            WrongState: it was neither aggregating nor validating.
        """
        self._require(RoundState.AGGREGATING, RoundState.VALIDATING)
        return replace(self, state=RoundState.FAILED, reason=reason, version=None, ended_at=now)

    def _closed(self, why: str, now: float) -> Round:
        aborted = [
            session.ended(SessionState.ABORTED, why, now)
            for session in self.sessions.values()
            if session.state is SessionState.ASSIGNED
        ]
        return replace(self._with(*aborted), state=RoundState.AGGREGATING)

    def _with(self, *sessions: Session) -> Round:
        return replace(self, sessions={**self.sessions, **{session.id: session for session in sessions}})

    def _require_open(self, session: Session) -> None:
        if self.state is not RoundState.COLLECTING:
            raise RoundClosed(f"round {self.key} is {self.state.value}; the report came too late")
        if session.state is not SessionState.ASSIGNED:
            why = f" ({session.detail})" if session.detail else ""
            raise RoundClosed(f"the session is {session.state.value}{why}; check in again")

    def _require(self, *states: RoundState) -> None:
        if self.state not in states:
            wanted = " or ".join(state.value for state in states)
            raise WrongState(f"round {self.key} is {self.state.value}, not {wanted}")


def require_same_report(session: Session, report_id: str) -> None:
    """Raise `AlreadyReported` unless this is the very report that counts for the session."""
    if session.report_id != report_id:
        raise AlreadyReported("another report of this session is counted already; nothing was added")


def bytes_per_weight(bytes_up: int, reports: int, weights: int) -> float | None:
    """Sealed bytes of one report for each number of its delta; None before the first report, and without a delta."""
    return bytes_up / reports / weights if reports and weights else None
