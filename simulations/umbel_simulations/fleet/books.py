"""What really happened, written down beside the product: what its own books are compared with at the end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

from umbel.identity import DeviceId


class Books:
    """Counts by the hour, and who reported what.

    Args:
        now: virtual seconds since the run began.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.check_ins: Counter[int] = Counter()
        self.sessions: Counter[int] = Counter()
        self.reports: Counter[int] = Counter()
        self.faults: Counter[str] = Counter()
        self.senders: defaultdict[str, set[DeviceId]] = defaultdict(set)
        """Session -> devices that have sent a report for it."""
        self.acknowledgements: set[str] = set()
        """Sessions whose devices were told that their report counts."""

    @property
    def hour(self) -> int:
        """Of the run, from 0."""
        return int(self._now() // 3600)

    def checked_in(self) -> None:
        """A device calls."""
        self.check_ins[self.hour] += 1

    def assigned(self) -> None:
        """A device got something to do."""
        self.sessions[self.hour] += 1

    def sent(self, session: str, device: DeviceId) -> None:
        """A device begins to report."""
        self.senders[session].add(device)

    def acknowledged(self, session: str) -> None:
        """A device hears that its report counts."""
        if session not in self.acknowledgements:
            self.reports[self.hour] += 1
        self.acknowledgements.add(session)
