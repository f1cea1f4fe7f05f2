"""The devices of all populations: who is enrolled, when each called last, what they tell of sessions and releases.

A visit changes memory only; `flush` writes many at once. What is lost with the process is statistics, never a right
and never a report.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

import sqlalchemy as sa

from umbel.clock import DAY
from umbel.errors import NotAllowed, NotFound
from umbel.identity import DeviceId
from umbel.visit import CheckIn, ReleaseOutcome
from umbel_server import health
from umbel_server.health import Told
from umbel_server.passing import may_pass
from umbel_server.store import Store
from umbel_server.tables import DEVICES, MODELS, OUTCOMES, SHAPES, TASKS

LATELY_SECONDS = DAY
"""A device that called within this time counts when rounds are paced."""
MOST_SHAPES = 1_000
"""Different shapes of sessions (and errors) that are counted of a task; further ones aren't."""


@dataclass(frozen=True, slots=True)
class DeviceRecord:
    """What is kept of one device."""

    id: DeviceId
    population: str
    enrolled_at: float
    last_seen: float | None = None
    revoked_at: float | None = None
    runtimes: tuple[str, ...] = ()
    sdk: str = ""
    visits: int = 0
    reports: int = 0


@dataclass(slots=True)
class _Seen:
    population: str
    last_seen: float
    runtimes: str = ""
    sdk: str = ""
    visits: int = 0
    reports: int = 0


@dataclass(slots=True)
class _News:
    """What `flush` has still to write."""

    devices: set[DeviceId] = field(default_factory=set)
    shapes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    outcomes: dict[tuple[str, int, DeviceId], tuple[ReleaseOutcome, float]] = field(default_factory=dict)
    health: dict[str, Told] = field(default_factory=dict)


class Fleet:
    """The devices, in memory and in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._seen: dict[DeviceId, _Seen] = {}
        self._news = _News()
        self._active: Counter[str] = Counter()
        self._lately: OrderedDict[DeviceId, str] = OrderedDict()
        self.learn()

    def learn(self) -> None:
        """Read the devices that aren't known here yet; where many were enrolled at once, their calls need no query."""
        query = sa.select(DEVICES.c.id, DEVICES.c.population, DEVICES.c.last_seen).order_by(DEVICES.c.last_seen)
        with self._store.reading() as connection:
            for row in connection.execute(query):
                device = DeviceId(row.id)
                if device in self._seen:
                    continue
                self._seen[device] = _Seen(row.population, row.last_seen or 0.0)
                if row.last_seen is not None:
                    self._called(device, row.population)

    def visit(self, device: DeviceId, check_in: CheckIn, now: float) -> None:
        """Note a visit.

        Raises:
            NotAllowed: the device isn't enrolled here, or in another population.
        """
        seen = self._find(device)
        if seen.population != check_in.population:
            raise NotAllowed(f"this device is of population {seen.population!r}, not {check_in.population!r}")
        seen.last_seen, seen.visits = now, seen.visits + 1
        seen.runtimes, seen.sdk = ",".join(check_in.runtimes), check_in.sdk
        self._news.devices.add(device)
        self._called(device, seen.population)
        for session in check_in.sessions:
            self._news.shapes[session.task, session.shape, session.error] += 1
        self._news.health[device] = Told.of(check_in, now, self._news.health.get(device))
        for outcome in check_in.outcomes:
            self._news.outcomes[outcome.model, outcome.number, device] = (outcome, now)

    def reported(self, device: DeviceId) -> None:
        """Note a report that counts."""
        if device in self._seen:
            self._seen[device].reports += 1
            self._news.devices.add(device)

    def active(self, population: str) -> int:
        """How many devices of a population have called lately; those who stay away leave it at a `flush`."""
        return self._active[population]

    def members(self, population: str, now: float) -> list[str]:
        """The ids of a population's devices that have called lately, here or at a process that wrote it down.

        Not from memory alone: a process that has just started knows nobody, and a wave of nobody passes its gate.
        """
        with self._store.reading() as connection:
            written = set(lately(connection, population, now))
            denied = revoked(connection)
        here = [(device, seen.last_seen) for device, seen in self._seen.items() if seen.population == population]
        return sorted((written | {device for device, last in here if abs(now - last) <= LATELY_SECONDS}) - denied)

    def flush(self, now: float) -> None:
        """Write what visits have told, in one transaction."""
        self._drop_absent(now)
        news, self._news = self._news, _News()
        if not (news.devices or news.shapes or news.outcomes):
            return
        try:
            with self._store.transaction() as connection:
                self._write_devices(connection, news.devices)
                _write_shapes(connection, news.shapes)
                _write_outcomes(connection, news.outcomes)
                health.write(connection, news.health)
        except sa.exc.DBAPIError as error:
            if may_pass(error):
                self._news = news  # devices won't tell it again
            raise
        for device in news.devices:
            self._seen[device].visits = self._seen[device].reports = 0

    def _called(self, device: DeviceId, population: str) -> None:
        """Count a device among those that have called lately, in their order: no call looks at the whole fleet."""
        if self._lately.pop(device, None) is None:
            self._active[population] += 1
        self._lately[device] = population

    def _drop_absent(self, now: float) -> None:
        while self._lately:
            device, population = next(iter(self._lately.items()))
            if abs(now - self._seen[device].last_seen) <= LATELY_SECONDS:
                return
            del self._lately[device]
            self._active[population] -= 1

    def _find(self, device: DeviceId) -> _Seen:
        if device not in self._seen:
            query = sa.select(DEVICES.c.population).where(DEVICES.c.id == device)
            with self._store.reading() as connection:
                population = connection.scalar(query)
            if population is None:
                raise NotAllowed("this device isn't enrolled here; enrol it again")
            self._seen[device] = _Seen(population, 0.0)
        return self._seen[device]

    def _write_devices(self, connection: sa.Connection, devices: Iterable[DeviceId]) -> None:
        rows = []
        for device in sorted(devices):
            seen = self._seen[device]
            told = {"last": seen.last_seen, "runs": seen.runtimes, "version": seen.sdk}
            # The counts are increments: what another process has counted stands.
            rows.append({"device": device, "visited": seen.visits, "reported": seen.reports} | told)
        if rows:
            changed = {
                "last_seen": sa.bindparam("last"),
                "runtimes": sa.bindparam("runs"),
                "sdk": sa.bindparam("version"),
                "visits": DEVICES.c.visits + sa.bindparam("visited"),
                "reports": DEVICES.c.reports + sa.bindparam("reported"),
            }
            connection.execute(DEVICES.update().where(DEVICES.c.id == sa.bindparam("device")).values(changed), rows)


def _write_shapes(connection: sa.Connection, shapes: Counter[tuple[str, str, str]]) -> None:
    # Only of tasks that exist, and no more than honest devices ever tell: what one makes up takes no room.
    written = sa.select(TASKS.c.name, sa.func.count(SHAPES.c.task)).outerjoin(SHAPES, SHAPES.c.task == TASKS.c.name)
    room = {row[0]: MOST_SHAPES - row[1] for row in connection.execute(written.group_by(TASKS.c.name))}
    for (task, shape, error), count in sorted(shapes.items()):
        this = (SHAPES.c.task == task) & (SHAPES.c.shape == shape) & (SHAPES.c.error == error)
        if connection.execute(SHAPES.update().where(this).values(count=SHAPES.c.count + count)).rowcount:
            continue
        if room.get(task, 0) > 0:
            connection.execute(SHAPES.insert().values(task=task, shape=shape, error=error, count=count))
            room[task] -= 1


def _write_outcomes(
    connection: sa.Connection, outcomes: dict[tuple[str, int, DeviceId], tuple[ReleaseOutcome, float]]
) -> None:
    # One device, one vote on each release, and only on releases that exist.
    limits = {row.name: row.next_release for row in connection.execute(sa.select(MODELS))}
    for (model, number, device), (outcome, at) in sorted(outcomes.items()):
        if not 1 <= number < limits.get(model, 0):
            continue
        this = (OUTCOMES.c.model == model) & (OUTCOMES.c.number == number) & (OUTCOMES.c.device == device)
        connection.execute(OUTCOMES.delete().where(this))
        told = {"outcome": outcome.outcome.value, "reason": outcome.reason, "at": at}
        connection.execute(OUTCOMES.insert().values(model=model, number=number, device=device, **told))


# Reading, for operators.


def devices(connection: sa.Connection, population: str = "", limit: int = 100, after: str = "") -> list[DeviceRecord]:
    """Devices in the order of their ids, those after `after`; of one population or of all."""
    query = sa.select(DEVICES).where(DEVICES.c.id > after).order_by(DEVICES.c.id).limit(limit)
    if population:
        query = query.where(DEVICES.c.population == population)
    return [_record(row) for row in connection.execute(query)]


def revoked(connection: sa.Connection) -> set[str]:
    """The devices that are refused: they can't come back, and what they told counts no more."""
    return set(connection.scalars(sa.select(DEVICES.c.id).where(DEVICES.c.revoked_at.is_not(None))))


def was_lately(now: float) -> sa.ColumnElement[bool]:
    """Whether a device has called lately, for a query; not where a clock that was ahead says when."""
    return DEVICES.c.last_seen.between(now - LATELY_SECONDS, now + LATELY_SECONDS)


def lately(connection: sa.Connection, population: str, now: float) -> list[DeviceId]:
    """Devices of a population that have called lately, as of the last `flush`, and aren't denied."""
    seen = (DEVICES.c.population == population) & was_lately(now)
    query = sa.select(DEVICES.c.id).where(seen, DEVICES.c.revoked_at.is_(None)).order_by(DEVICES.c.id)
    return [DeviceId(found) for found in connection.scalars(query)]


def device(connection: sa.Connection, device_id: str) -> DeviceRecord:
    """One device; raises `NotFound`."""
    row = connection.execute(sa.select(DEVICES).where(DEVICES.c.id == device_id)).first()
    if row is None:
        raise NotFound(f"no device {device_id[:80]!r}; `umbel devices list` tells who is enrolled")
    return _record(row)


def shapes(connection: sa.Connection, task: str = "") -> Counter[str]:
    """How often devices told each shape of a session; of one task or of all."""
    query = sa.select(SHAPES.c.shape, sa.func.sum(SHAPES.c.count)).group_by(SHAPES.c.shape)
    if task:
        query = query.where(SHAPES.c.task == task)
    return Counter({shape: int(count) for shape, count in connection.execute(query)})


def outcomes(connection: sa.Connection, model: str, number: int) -> Counter[str]:
    """How many devices met one release with each outcome."""
    this = (OUTCOMES.c.model == model) & (OUTCOMES.c.number == number)
    query = sa.select(OUTCOMES.c.outcome, sa.func.count()).where(this).group_by(OUTCOMES.c.outcome)
    return Counter({outcome: int(count) for outcome, count in connection.execute(query)})


def _record(row: sa.Row[tuple[object, ...]]) -> DeviceRecord:
    return DeviceRecord(
        DeviceId(row.id),
        row.population,
        row.enrolled_at,
        row.last_seen,
        row.revoked_at,
        tuple(row.runtimes.split(",")) if row.runtimes else (),
        row.sdk,
        row.visits,
        row.reports,
    )
