"""What a device knows about itself right now, and who tells it.

Two sources: `LinuxStatus` (in `linux.py`) asks the machine; `HostStatus` is told by the app that embeds the SDK, as
on Android and iOS, or by a file that another program keeps up to date.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

from umbel.errors import MalformedMessage, NotFound


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """Facts that the idle policy judges. `None` means that nobody could say, which no policy takes for a yes."""

    idle: bool | None = None
    """Nobody uses the machine, and it isn't busy with other work."""
    charging: bool | None = None
    """On mains; a machine without a battery always is."""
    battery: float | None = None
    """Charge from 0 to 1."""
    metered: bool | None = None
    """The network costs money by the byte."""
    temperature: float | None = None
    """Degrees Celsius of the hottest part that is measured."""
    free_bytes: int | None = None
    """Free storage where the device's home lies."""
    utc_offset_minutes: int = 0
    """Local time minus UTC, for quiet hours."""


class StatusSource(Protocol):
    """Tells the present status; asked before a visit and at each training step, so it must be cheap to ask."""

    def read(self) -> DeviceStatus:
        """The status now."""


class HostStatus:
    """A status that the host app feeds; before it says anything, nothing is known."""

    def __init__(self, status: DeviceStatus | None = None) -> None:
        self._status = status or DeviceStatus()

    def tell(self, **facts: Any) -> None:
        """Change some facts by name; the others stay as they were.

        Raises:
            MalformedMessage: a fact that doesn't exist, or of another type.
        """
        self._status = status_from_facts(facts, self._status)

    def read(self) -> DeviceStatus:
        """The status as it was last told."""
        return self._status


class FileStatus:
    """A status in a JSON file that another program writes; read again whenever the file has changed.

    A file that goes missing or makes no sense later on means that nothing is known, which holds the device back.

    Raises:
        NotFound: there is no such file to begin with.
        MalformedMessage: the file isn't a status to begin with.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        try:
            self._status = status_from_facts(_parse(path.read_bytes(), str(path)))
        except OSError as error:
            raise NotFound(f"no status file at {path} ({error.strerror}); write one first") from None

    def read(self) -> DeviceStatus:
        """The status in the file."""
        try:
            found = self._path.stat()
            stamp = (found.st_mtime_ns, found.st_ino)
            if stamp != self._stamp:
                self._stamp = stamp
                self._status = status_from_facts(_parse(self._path.read_bytes(), str(self._path)))
        except (OSError, MalformedMessage):
            self._status = DeviceStatus()
        return self._status


_KINDS: dict[str, tuple[type, ...]] = {
    "idle": (bool,), "charging": (bool,), "metered": (bool,), "battery": (int, float), "temperature": (int, float),
    "free_bytes": (int,), "utc_offset_minutes": (int,),
}  # fmt: skip


def status_from_facts(facts: Mapping[str, object], base: DeviceStatus | None = None) -> DeviceStatus:
    """A status with these facts; the others as in `base`, or unknown.

    Raises:
        MalformedMessage: a fact that doesn't exist, or of another type.
    """
    for name, value in facts.items():
        kinds = _KINDS.get(name)
        if kinds is None:
            known = ", ".join(field.name for field in fields(DeviceStatus))
            raise MalformedMessage(f"a device status has no {name!r}; it has {known}")
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise MalformedMessage(f"{name} in a device status is {value!r}; give {kinds[-1].__name__} or null")
    if facts.get("utc_offset_minutes", 0) is None:
        raise MalformedMessage("utc_offset_minutes in a device status must be a number of minutes")
    return replace(base or DeviceStatus(), **facts)  # type: ignore[arg-type]


def _parse(data: bytes, where: str) -> dict[str, object]:
    try:
        tree = json.loads(data)
    except ValueError as error:
        raise MalformedMessage(f"{where} isn't JSON: {error}") from error
    if not isinstance(tree, dict):
        raise MalformedMessage(f"{where} must hold a JSON object")
    return tree
