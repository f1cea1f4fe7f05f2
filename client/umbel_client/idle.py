"""May this device work now, and if not, why not? Judged on the device, before any byte is sent.

A policy is data with a version. The verdict is a pure function of the device's status, its history and the time, so
that `umbel-device why` and a simulation tell the same story as the agent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Final

from umbel.errors import MalformedMessage
from umbel_client.status import DeviceStatus

POLICY_VERSION: Final = 1
_DAY_MINUTES: Final = 1440
CONDITIONS: Final = ("idle", "power", "network", "temperature", "storage")


@dataclass(frozen=True, slots=True)
class History:
    """What the device did and has, as far as a policy cares."""

    training_examples: int = 0
    last_contribution: float | None = None
    """POSIX seconds of its last accepted training report."""
    bytes_today: int = 0
    seconds_today: float = 0.0


@dataclass(frozen=True, slots=True)
class Eligible:
    """The device may visit the coordinator."""

    offers_work: bool = True
    reasons: tuple[str, ...] = ()
    """Why it offers no work, if it doesn't: it then asks for the newest release only."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """The device leaves the network alone, for these reasons, in words."""

    reasons: tuple[str, ...]


Verdict = Eligible | Waiting


@dataclass(frozen=True, slots=True)
class IdlePolicy:
    """The conditions under which a device works for the fleet; the defaults suit a phone."""

    version: int = POLICY_VERSION
    require_idle: bool = True
    require_power: bool = True
    """Charging, or the battery at least at `min_battery`."""
    min_battery: float = 0.8
    require_unmetered: bool = True
    max_temperature: float | None = 60.0
    """Degrees Celsius; None asks nothing."""
    min_free_bytes: int = 200 << 20
    """0 asks nothing."""
    min_examples: int = 1
    min_seconds_between_contributions: float = 0.0
    quiet_hours: tuple[tuple[int, int], ...] = ()
    """Spans of local time in which to rest, in minutes since midnight; a span may pass midnight."""
    max_bytes_per_day: int = 0
    """Up and down together, by UTC day; 0 means no such limit."""
    max_seconds_per_day: float = 0.0
    """Of training and testing, by UTC day; 0 means no such limit."""
    allow_unknown: tuple[str, ...] = ()
    """Conditions (of `CONDITIONS`) that count as met when the machine can't tell."""

    def verdict(self, status: DeviceStatus, history: History, now: float) -> Verdict:
        """May the device visit at `now` (POSIX seconds), and offer work?"""
        if self.version != POLICY_VERSION:
            return Waiting((f"policy version {self.version} is not known here; update umbel",))
        held = (*self.interruptions(status, now), *self._spent(history))
        if held:
            return Waiting(held)
        idle_hands = tuple(self._without_work(history, now))
        return Eligible(offers_work=not idle_hands, reasons=idle_hands)

    def interruptions(self, status: DeviceStatus, now: float) -> tuple[str, ...]:
        """What stands against working right now: asked before a visit, and again at each training step."""
        return tuple(self._against(status, now))

    def _against(self, status: DeviceStatus, now: float) -> Iterator[str]:
        if self.require_idle:
            yield from self._no(status.idle, "idle", "the device is in use")
        if self.require_power:
            yield from self._power(status)
        if self.require_unmetered:
            unmetered = None if status.metered is None else not status.metered
            yield from self._no(unmetered, "network", "the network is metered")
        if self.max_temperature is not None:
            cool = None if status.temperature is None else status.temperature <= self.max_temperature
            if cool is not True:
                words = f"it is too hot: {status.temperature} °C, the limit is {self.max_temperature} °C"
                yield from self._no(cool, "temperature", words)
        if self.min_free_bytes:
            room = None if status.free_bytes is None else status.free_bytes >= self.min_free_bytes
            if room is not True:
                free, needed = _megabytes(status.free_bytes), _megabytes(self.min_free_bytes)
                yield from self._no(room, "storage", f"storage is short: {free} free, {needed} needed")
        minute = int(now / 60 + status.utc_offset_minutes) % _DAY_MINUTES
        for start, end in self.quiet_hours:
            if (start <= minute < end) if start <= end else (minute >= start or minute < end):
                yield f"quiet hours: from {_clock(start)} to {_clock(end)}, local time"

    def _power(self, status: DeviceStatus) -> Iterator[str]:
        if status.charging or (status.battery is not None and status.battery >= self.min_battery):
            return
        met = None if status.charging is None and status.battery is None else False
        charge = "unknown" if status.battery is None else f"{status.battery:.0%}"
        yield from self._no(met, "power", f"on battery: charge {charge}, {self.min_battery:.0%} needed")

    def _no(self, met: bool | None, condition: str, words: str) -> Iterator[str]:
        if met is None:
            if condition not in self.allow_unknown:
                yield f'{condition} is unknown on this machine; a policy with "{condition}" in allow_unknown takes that'
        elif not met:
            yield words

    def _spent(self, history: History) -> Iterator[str]:
        if self.max_bytes_per_day and history.bytes_today >= self.max_bytes_per_day:
            yield f"today's budget of {_megabytes(self.max_bytes_per_day)} is spent"
        if self.max_seconds_per_day and history.seconds_today >= self.max_seconds_per_day:
            yield f"today's budget of {self.max_seconds_per_day:g} seconds of work is spent"

    def _without_work(self, history: History, now: float) -> Iterator[str]:
        if history.training_examples < self.min_examples:
            yield f"{history.training_examples} training examples, {self.min_examples} needed"
        if history.last_contribution is not None:
            left = history.last_contribution + self.min_seconds_between_contributions - now
            # More than the whole wait is left only where the clock was ahead when it contributed.
            if 0 < left <= self.min_seconds_between_contributions:
                yield f"contributed lately; again in {left:.0f} seconds"

    @classmethod
    def from_tree(cls, tree: object) -> IdlePolicy:
        """Read a policy; fields that are left out keep their defaults.

        A policy of an unknown version is taken as it is: its verdict is always `Waiting`.

        Raises:
            MalformedMessage: not a policy, or of this version with a field that it doesn't have.
        """
        if not isinstance(tree, dict) or not _is_count(tree.get("version")):
            raise MalformedMessage("an idle policy needs a `version`, and is an object of names and values")
        if tree["version"] != POLICY_VERSION:
            return cls(version=tree["version"])
        return cls(**{name: _checked(name, value) for name, value in tree.items()})


ALWAYS: Final = IdlePolicy(
    require_idle=False, require_power=False, require_unmetered=False, max_temperature=None, min_free_bytes=0
)
"""For machines that do nothing else: simulations, demos, dedicated boxes."""

_DEFAULTS: Final = {field.name: field.default for field in fields(IdlePolicy)}


def _checked(name: str, value: Any) -> Any:
    default = _DEFAULTS.get(name)
    if name not in _DEFAULTS:
        raise MalformedMessage(f"an idle policy has no {name!r}; it has {', '.join(_DEFAULTS)}")
    if name == "quiet_hours":
        return _spans(value)
    if name == "allow_unknown":
        if not isinstance(value, list) or not set(value) <= set(CONDITIONS):
            raise MalformedMessage(f"allow_unknown is a list of some of {', '.join(CONDITIONS)}")
        return tuple(value)
    if isinstance(default, bool):
        good = isinstance(value, bool)
    elif name == "max_temperature" and value is None:
        good = True
    else:
        good = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    if not good:
        raise MalformedMessage(f"{name} in an idle policy is {value!r}; its default is {default!r}")
    return value


def _spans(value: Any) -> tuple[tuple[int, int], ...]:
    try:
        spans = tuple((start, end) for start, end in value)
    except (TypeError, ValueError) as error:
        raise MalformedMessage("quiet_hours is a list of [start, end] in minutes since midnight") from error
    for minute in (minute for span in spans for minute in span):
        if not _is_count(minute) or minute > _DAY_MINUTES:
            raise MalformedMessage(f"quiet_hours has {minute!r}; give minutes since midnight, 0 to {_DAY_MINUTES}")
    return spans


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _clock(minute: int) -> str:
    return f"{minute // 60:02d}:{minute % 60:02d}"


def _megabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:.0f} MB"
