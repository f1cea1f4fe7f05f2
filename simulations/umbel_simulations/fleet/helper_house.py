"""The helper's side: a real helper on a store of its own, away at times, killed and built again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from umbel.clock import Clock
from umbel.cohort_sum import HelperAnswer
from umbel.errors import Unreachable
from umbel.helper_card import HelperCard
from umbel.participants import prove
from umbel.plan import Kind
from umbel.secure_sum import HelperItem
from umbel_client.private import Pinned, pin
from umbel_server.helper.core import Helper, HelperPolicy
from umbel_server.helper.local import LocalHelper
from umbel_server.helper.people import People
from umbel_server.helper.port import Prepared
from umbel_server.helper.records import Records
from umbel_server.signing import ReleaseSigner
from umbel_simulations.fleet.entropy import Told, signing_key
from umbel_simulations.scenario import Scenario

T = TypeVar("T")
SMALLEST_COHORT: Final = 5
"""What devices and helpers ask for by themselves; a scenario with smaller rounds says so by them."""
_CERTIFICATE_DAYS: Final = 366.0


class HelperHouse:
    """A `HelperPort` to a helper that may be away or die."""

    def __init__(
        self, path: Path, scenario: Scenario, clock: Clock, leader: ReleaseSigner, counts: Counter[str]
    ) -> None:
        self._counts = counts
        self._seed, self._clock, self._leader = scenario.seed, clock, leader.for_helper()
        self._records = Records(path)
        self._keys = signing_key(self._seed, "helper"), signing_key(self._seed, "helper's authority")
        self._policy = HelperPolicy(self._leader.public, minimum_cohort=smallest_cohort(scenario))
        self._generation = 0
        self._dies: list[float] = []
        """For how many seconds it stays away, each time that is still to come."""
        self._back_at = 0.0
        """When the last time is over, in POSIX seconds."""
        self.outages = 0
        """How many there are at this moment."""
        self._build()

    @property
    def identity(self) -> bytes:
        """The key that devices pin."""
        return self._port.identity

    def enrol(self, population: str, device: int) -> Pinned:
        """Make a device's key for reports, have it certified, and give what the device keeps."""
        key = signing_key(self._seed, f"participant/{device}")
        public = key.public_key().public_bytes_raw()
        certificate = self._people.enrol(self._people.new_token(population), population, public, prove(population, key))
        card = HelperCard("helper:1", self.identity, b"in this process", "the simulation")
        return pin(card, key, certificate, self._clock.now())

    def kill(self, down_seconds: float) -> None:
        """Have it die after an answer, before anybody gets it: the next one that isn't taken yet."""
        self._dies.append(down_seconds)

    def close(self) -> None:
        """Let go of the store."""
        self._records.close()

    # What the leader calls.

    def offer_key(self, task: str, number: int, kind: Kind) -> bytes:
        """See `HelperPort`."""
        return self._reach(lambda: self._port.offer_key(task, number, kind))

    def countersign(self, statement: bytes, leader_signature: bytes) -> bytes:
        """See `HelperPort`."""
        return self._reach(lambda: self._port.countersign(statement, leader_signature))

    def prepare(self, rd: bytes, items: Sequence[HelperItem]) -> Prepared:
        """See `HelperPort`."""
        return self._reach(lambda: self._port.prepare(rd, items))

    def commit(self, rd: bytes, ids: Sequence[bytes]) -> HelperAnswer:
        """See `HelperPort`."""
        return self._reach(lambda: self._port.commit(rd, ids))

    def _build(self) -> None:
        identity, authority = self._keys
        self._people = People(self._records, authority, self._clock, _CERTIFICATE_DAYS)
        entropy = Told(self._seed, f"helper/{self._generation}")
        helper = Helper(self._records, identity, self._people.authority, self._policy, self._clock, entropy)
        self._port = LocalHelper(helper, self._leader)

    def _reach(self, ask: Callable[[], T]) -> T:
        if self.outages or self._clock.now() < self._back_at:
            raise Unreachable("nobody answers at the helper's address")
        answer = ask()
        if self._dies:
            self._back_at = self._clock.now() + self._dies.pop(0)
            self._counts["helper killed"] += 1
            self._generation += 1
            self._build()
            raise Unreachable("the helper died before it could answer")
        return answer


def smallest_cohort(scenario: Scenario) -> int:
    """What devices and helper ask of every round."""
    return min(SMALLEST_COHORT, scenario.task.minimum)
