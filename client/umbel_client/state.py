"""What a device remembers between visits, in two small files that are replaced whole.

Known releases are what an attacker would want forgotten: written durably, and a damaged file is refused aloud, never
taken for a new device's. The rest is history, budgets and windows: losing it costs nothing that matters, so it is
written the quick way, and a damaged file starts it anew. Models are in neither (`shelf.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

from umbel.clock import DAY
from umbel.digests import Digest, parse_digest
from umbel.errors import MalformedMessage
from umbel.fields import MAX_ENTRIES, as_text, known
from umbel.visit import Outcome, ReleaseOutcome, SessionRecord
from umbel_client.files import Disk, read_any
from umbel_client.idle import History
from umbel_client.trust import Seen

_BASES: Final = 2
_DECIDED: Final = 8
_KEPT: Final = 64
"""Sessions and outcomes kept for a coordinator that can't be reached; well below what a check-in may carry."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Accuracy (or negative mean loss) on held-back examples, as last measured; None before."""

    release: int = 0
    """Number of the release that was judged."""
    global_: float | None = None
    personal: float | None = None
    serving: float | None = None
    """Of whatever answers now."""
    examples: int = 0
    """Held-back examples that were judged on."""


@dataclass(frozen=True, slots=True)
class Known:
    """The releases that a device has trusted; see `trust.Trust`."""

    model: str = ""
    seen: Mapping[str, Seen] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fetched:
    """Bytes of bundles over a device's whole life: what came, and what needn't."""

    bytes: int = 0
    """Of files and deltas, as they came; messages round them not counted."""
    files: int = 0
    """Files that came whole."""
    deltas: int = 0
    """Files that were rebuilt from a delta and a file that was here."""
    spared_by_deltas: int = 0
    spared_by_reuse: int = 0
    """Of files that were here already when a new bundle listed them."""
    spared_by_runtime: int = 0
    """Of graphs for runtimes that this device doesn't run."""
    from_mirror: int = 0
    """Of `bytes`, those that a mirror gave."""

    def __add__(self, other: Fetched) -> Fetched:
        return Fetched(*(getattr(self, name) + getattr(other, name) for name in Fetched.__slots__))


@dataclass(frozen=True, slots=True)
class Decided:
    """What became of a release here, for the device's owner."""

    at: float
    """POSIX seconds."""
    release: int
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The history of a device."""

    judged: int = 0
    """Number of the newest release that was taken over or turned down."""
    judged_examples: int = -1
    """The example store's revision at the last test; another one makes a new test worth while."""
    scores: Scores = Scores()
    sessions: tuple[SessionRecord, ...] = ()
    outcomes: tuple[ReleaseOutcome, ...] = ()
    """Both wait for the next check-in."""
    decided: tuple[Decided, ...] = ()
    """What became of the last releases, newest last."""
    executions: tuple[str, ...] = ()
    """Offers that were taken or turned down, newest last; each is followed once."""
    attempt: tuple[str, int] = ("", 0)
    """The offer that is being tested, and how often its test was begun: one that kills the process is given up."""
    next_wake: float = 0.0
    failures: int = 0
    """Failed visits in a row."""
    last_contribution: float | None = None
    contributions: int = 0
    shapes: Mapping[str, int] = field(default_factory=dict)
    """How often each session shape occurred."""
    visits: int = 0
    day: int = 0
    """UTC day that the two budgets below belong to."""
    bytes_today: int = 0
    seconds_today: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    fetched: Fetched = Fetched()
    left_out: int = 0
    """Examples that the last work couldn't use, as its model has no room for their numbers."""
    bases: tuple[Digest, ...] = ()
    """Bundles that training started from, newest first: still on the shelf, they make the next one's fetch short."""
    last_error: str = ""

    @property
    def left_out_in_words(self) -> tuple[str, ...]:
        """Why the last work had fewer examples than there are; nothing if it had all."""
        return (f"examples left out, as their numbers aren't the model's: {self.left_out}",) if self.left_out else ()

    def history(self, training_examples: int, now: float) -> History:
        """What an idle policy wants to know."""
        today = int(now // DAY) == self.day
        return History(
            training_examples=training_examples,
            last_contribution=self.last_contribution,
            bytes_today=self.bytes_today if today else 0,
            seconds_today=self.seconds_today if today else 0.0,
        )

    def spent(self, now: float, *, up: int = 0, down: int = 0, seconds: float = 0.0) -> DeviceState:
        """With traffic and work booked on the day of `now`."""
        day = int(now // DAY)
        fresh = day != self.day
        return replace(
            self,
            day=day,
            bytes_today=(0 if fresh else self.bytes_today) + up + down,
            seconds_today=(0.0 if fresh else self.seconds_today) + seconds,
            bytes_up=self.bytes_up + up,
            bytes_down=self.bytes_down + down,
        )

    def with_session(self, record: SessionRecord) -> DeviceState:
        """With the record of a session that ended, for the next check-in."""
        record = replace(record, error=as_text(record.error))
        shapes = {**self.shapes, record.shape: self.shapes.get(record.shape, 0) + 1}
        return replace(self, sessions=(*self.sessions, record)[-_KEPT:], shapes=shapes)

    def with_outcome(self, outcome: ReleaseOutcome, now: float) -> DeviceState:
        """With a verdict on a release, for the next check-in and for the owner."""
        outcome = replace(outcome, reason=as_text(outcome.reason))
        decided = Decided(now, outcome.number, outcome.outcome.value, outcome.reason)
        return replace(
            self,
            outcomes=(*self.outcomes, outcome)[-_KEPT:],
            decided=(*self.decided, decided)[-_DECIDED:],
        )

    def with_execution(self, execution: str) -> DeviceState:
        """With an offer that is settled."""
        return replace(self, executions=(*self.executions, execution)[-_KEPT:])

    def with_base(self, bundle: Digest) -> DeviceState:
        """With the bundle that training starts from."""
        return replace(self, bases=tuple(dict.fromkeys((bundle, *self.bases)))[:_BASES])

    def told(self, sessions: int, outcomes: int) -> DeviceState:
        """After a check-in carried the oldest so many of each."""
        return replace(self, sessions=self.sessions[sessions:], outcomes=self.outcomes[outcomes:])


def state_from_bytes(data: bytes) -> DeviceState:
    """The history in a file; a new device's if it is damaged."""
    try:
        return _from_tree(json.loads(data))
    except (ValueError, KeyError, TypeError, AttributeError, MalformedMessage):
        return DeviceState()


def state_to_bytes(state: DeviceState) -> bytes:
    """The content of the history's file."""
    return json.dumps(_fields_of(state), default=_plain).encode()


def _plain(value: object) -> object:
    return value.value if isinstance(value, Outcome) else _fields_of(value)


def _fields_of(value: Any) -> dict[str, Any]:
    # `asdict` would copy all of it first, at every visit.
    return {name: getattr(value, name) for name in _NAMES[type(value)]}


_NAMES: Final = {
    kind: tuple(entry.name for entry in fields(kind))
    for kind in (DeviceState, Scores, SessionRecord, ReleaseOutcome, Decided, Fetched)
}


_NONE_KNOWN: Final = Known()


def load_known(path: Path) -> Known:
    """The known releases in a file; none when there is no file.

    Raises:
        MalformedMessage: the file is damaged.
    """
    try:
        content = read_any(path)
        if content is None:
            return _NONE_KNOWN
        tree = json.loads(content)
        seen = {key: Seen(int(entry["number"]), parse_digest(entry["bundle"])) for key, entry in tree["seen"].items()}
        return Known(str(tree["model"]), seen)
    except (ValueError, KeyError, TypeError, AttributeError, MalformedMessage) as error:
        raise MalformedMessage(
            f"{path} is damaged ({type(error).__name__}: {error}); remove it to start anew. The device then forgets "
            "which releases it has seen, so an old one could be played back to it once"
        ) from error


def save_known(path: Path, known: Known, disk: Disk) -> None:
    """Replace the file of known releases, durably."""
    disk.write(path, json.dumps(asdict(known)).encode())


def _from_tree(tree: dict[str, Any]) -> DeviceState:
    if len(tree["sessions"]) > MAX_ENTRIES or len(tree["outcomes"]) > MAX_ENTRIES:
        raise ValueError("too many entries")
    parts: dict[str, Any] = {
        "shapes": {str(shape): int(count) for shape, count in tree["shapes"].items()},
        "scores": Scores(**known(Scores, tree["scores"])),
        "bases": tuple(parse_digest(bundle) for bundle in tree.get("bases", ())),
        "fetched": Fetched(**known(Fetched, tree.get("fetched", {}))),
        "sessions": tuple(SessionRecord(**known(SessionRecord, entry)) for entry in tree["sessions"]),
        "decided": tuple(Decided(**known(Decided, entry)) for entry in tree.get("decided", ())),
        "attempt": (str(tree.get("attempt", ["", 0])[0]), int(tree.get("attempt", ["", 0])[1])),
        "executions": tuple(str(execution) for execution in tree.get("executions", ())),
        "outcomes": tuple(
            ReleaseOutcome(**known(ReleaseOutcome, {**entry, "outcome": Outcome(entry["outcome"])}))
            for entry in tree["outcomes"]
        ),
    }
    return DeviceState(**known(DeviceState, {**tree, **parts}))
