"""What must hold at the end of every run, whatever was done to it: the product's books against what really happened."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import sqlalchemy as sa

from umbel.descriptor import descriptor_from_bytes, noise_multiplier
from umbel.errors import InvariantBroken
from umbel.identity import DeviceId
from umbel.plan import Kind, Plan
from umbel_server.privacy_ledger import PrivacyReport, epsilon
from umbel_server.round import Round, RoundKey, RoundState, SessionState
from umbel_server.round_records import load
from umbel_server.tables import PRIVATE_ROUNDS, ROUNDS
from umbel_simulations.data import ClientData
from umbel_simulations.fleet.books import Books
from umbel_simulations.fleet.homes import Packed
from umbel_simulations.fleet.house import MODEL, House
from umbel_simulations.fleet.member import Member
from umbel_simulations.fleet.rollouts import Played

_CLOSE: Final = 1e-6
_LINES: Final = 12
"""Of a traceback."""


class Audit:
    """Looks at a run that has ended.

    Args:
        house: the server, standing still.
        members: all devices, asleep.
        books: what really happened.
        clients: the federation's users.
        played: the rollouts.
    """

    def __init__(
        self,
        house: House,
        members: Mapping[DeviceId, Member],
        books: Books,
        clients: tuple[ClientData, ...],
        played: Iterable[Played],
    ) -> None:
        self._house, self._members, self._books, self._clients = house, members, books, clients
        self._played = tuple(played)
        self._task = house.task()
        self.rounds = tuple(_rounds(house))

    def require(self) -> tuple[str, ...]:
        """Check everything; returns what held, in words.

        Raises:
            InvariantBroken: naming each thing that doesn't hold.
        """
        checks: dict[str, Callable[[], Iterator[str]]] = {
            "every report that counts was sent, once, by the device whose it is": self._one_report_each,
            "every report that a device was thanked for counts": self._none_lost,
            "each round's sum is the sum of its counted reports": self._sums,
            "no round counts fewer reports than its minimum": self._minimum,
            "no device is left on a release that was rolled back": self._nobody_left,
            "no more privacy is spent than there was": self._privacy,
            "the audit log's chain is whole": self._chain,
            "nothing failed inside the coordinator": self._failures,
        }
        broken = [f"{words}: {found}" for words, check in checks.items() for found in check()]
        if broken:
            raise InvariantBroken("; ".join(broken[:5]) + (f"; and {len(broken) - 5} more" if broken[5:] else ""))
        return tuple(checks)

    def _one_report_each(self) -> Iterator[str]:
        for held in self.rounds:
            counted = [session for session in held.sessions.values() if session.sequence is not None]
            if len({session.device for session in counted}) != len(counted):
                yield f"round {held.key} counts a device twice"
            if sorted(session.sequence or 0 for session in counted) != list(range(len(counted))):
                yield f"round {held.key} numbers its reports wrongly"
            for session in counted:
                if session.state is not SessionState.REPORTED:
                    yield f"round {held.key} counts a session that is {session.state.value}"
                if session.device not in self._books.senders.get(session.id, ()):
                    yield f"round {held.key} counts a report that its device never sent"

    def _none_lost(self) -> Iterator[str]:
        counted = {one.id for held in self.rounds for one in held.sessions.values() if one.sequence is not None}
        lost = self._books.acknowledgements - counted
        if lost:
            yield f"{len(lost)} reports were acknowledged and don't count"

    def _sums(self) -> Iterator[str]:
        if self._task.updates_private:
            return
        for held in self.rounds:
            # One that failed may have had no sum.
            if held.state is not RoundState.COMPLETED and not (held.state is RoundState.FAILED and held.weight):
                continue
            plan = self._task.plan_for(held.key.kind)
            reported = [session.device for session in held.sessions.values() if session.sequence is not None]
            expected = sum(self._weight(device, plan) for device in reported)
            if abs(held.weight - expected) > _CLOSE * max(1.0, expected):
                yield f"round {held.key} weighs {held.weight:g}, its {len(reported)} reports weigh {expected:g}"

    def _weight(self, device: DeviceId, plan: Plan) -> float:
        member = self._members[device]
        client = self._clients[member.index % len(self._clients)]
        if plan.kind is Kind.EVALUATE:
            return min(float(client.held_back.count), plan.max_weight)
        count = min(client.training.count, plan.max_examples or client.training.count)
        batches = -(-count // plan.batch_size) * plan.epochs
        steps = min(batches, plan.max_steps or batches)
        return min(float(min(steps * plan.batch_size, count)), plan.max_weight)

    def _minimum(self) -> Iterator[str]:
        for held in self.rounds:
            reports = len(held.reports)
            if held.state is RoundState.COMPLETED and reports < held.minimum:
                yield f"round {held.key} was completed with {reports} of {held.minimum} reports"

    def _nobody_left(self) -> Iterator[str]:
        for played in self._played:
            if not played.is_cleared:
                continue
            left = [member for member in self._members.values() if release_of(member) in played.numbers]
            if left:
                yield f"{len(left)} devices still answer with release {played.release} of {played.name}"

    def _privacy(self) -> Iterator[str]:
        ledger = self.ledger()
        if ledger is not None and ledger.budget and ledger.epsilon_spent > ledger.budget * (1 + _CLOSE):
            yield f"epsilon {ledger.epsilon_spent:g} of {ledger.budget:g} is spent"

    def ledger(self) -> PrivacyReport | None:
        """What the task has cost in privacy; None where its updates aren't private."""
        if not self._task.updates_private:
            return None
        return self._house.parts.coordinator.operations.privacy(self._task.name)

    def epsilons(self) -> dict[int, float]:
        """What the task had cost in privacy after each private round, by number; nothing without noise."""
        if not self._task.updates_private or not self._task.privacy.noise_multiplier:
            return {}
        query = sa.select(PRIVATE_ROUNDS.c.number, PRIVATE_ROUNDS.c.statement)
        with self._house.parts.store.reading() as connection:
            rows = connection.execute(query.order_by(PRIVATE_ROUNDS.c.number)).all()
        past: list[float] = []
        found = {}
        for number, statement in rows:
            past.append(noise_multiplier(descriptor_from_bytes(statement)))
            found[int(number)] = epsilon(past, self._task.privacy)
        return found

    def _chain(self) -> Iterator[str]:
        if self._house.parts.coordinator.operations.verify_audit() < 1:
            yield "it is empty"

    def _failures(self) -> Iterator[str]:
        for failure in self._house.failures[:3]:
            yield "\n".join(failure.strip().splitlines()[-_LINES:])


def _rounds(house: House) -> Iterator[Round]:
    with house.parts.store.reading() as connection:
        query = sa.select(ROUNDS.c.task, ROUNDS.c.number, ROUNDS.c.kind).order_by(ROUNDS.c.number, ROUNDS.c.kind)
        for row in connection.execute(query).all():
            held = load(connection, RoundKey(row.task, row.number, Kind(row.kind)))
            if held is not None:
                yield held


def file_in_home(member: Member, name: str) -> dict[str, Any]:
    """A JSON file in a sleeping device's home; empty if it has none."""
    return json_in(member.home, name)


def json_in(home: Packed, name: str) -> dict[str, Any]:
    """A JSON file in a packed home; empty if it has none."""
    for path, content in home.files:
        if path == name:
            tree = json.loads(content)
            return tree if isinstance(tree, dict) else {}
    return {}


def release_of(member: Member) -> int:
    """The release that answers on a sleeping device; 0 for none."""
    active = file_in_home(member, "shelf/slots.json").get("active") or {}
    return int(active.get("number", 0)) if active.get("model") == MODEL else 0
