"""What a Linux machine says about itself: psutil, /sys/class/power_supply and NetworkManager.

Whatever isn't there to be asked (no thermal sensor, no NetworkManager) stays unknown.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import psutil

from umbel.clock import Clock, is_recent
from umbel_client.status import DeviceStatus

POWER_SUPPLIES = Path("/sys/class/power_supply")
_QUICK_SECONDS = 2.0
_SLOW_SECONDS = 60.0


class LinuxStatus:
    """Reads the machine, at most every two seconds, and the network's cost at most once a minute.

    Args:
        home: the folder whose file system's free bytes count.
        clock: tells when a reading is too old.
        busy_share: the machine counts as in use when others take more of its processors than this (0 to 1).
        input_seconds: ... or when somebody typed at a terminal within so many seconds.
        power_supplies: where the kernel describes batteries and mains.
    """

    def __init__(
        self,
        home: Path,
        clock: Clock,
        *,
        busy_share: float = 0.3,
        input_seconds: float = 300.0,
        power_supplies: Path = POWER_SUPPLIES,
    ) -> None:
        self._home = home
        self._clock = clock
        self._busy_share = busy_share
        self._input_seconds = input_seconds
        self._power_supplies = power_supplies
        self._self = psutil.Process()
        self._last = _processor_seconds(self._self)
        self._status: DeviceStatus | None = None
        self._read_at = self._network_at = float("-inf")
        self._metered: bool | None = None

    def read(self) -> DeviceStatus:
        """The machine's status, two seconds old at most."""
        now = self._clock.now()
        if self._status is None or not is_recent(self._read_at, now, _QUICK_SECONDS):
            self._status = self._look(now)
            self._read_at = now
        return self._status

    def _look(self, now: float) -> DeviceStatus:
        if not is_recent(self._network_at, now, _SLOW_SECONDS):
            self._metered = metered_by_network_manager()
            self._network_at = now
        charging, battery = power(self._power_supplies)
        return DeviceStatus(
            idle=self._is_idle(now),
            charging=charging,
            battery=battery,
            metered=self._metered,
            temperature=_hottest(),
            free_bytes=psutil.disk_usage(str(self._home)).free,
            utc_offset_minutes=time.localtime(now).tm_gmtoff // 60,
        )

    def _is_idle(self, now: float) -> bool:
        if any(now - touched < self._input_seconds for touched in _terminals_touched()):
            return False
        before, self._last = self._last, _processor_seconds(self._self)
        total, busy, own = (new - old for new, old in zip(self._last, before, strict=True))
        # The first look has no span to compare with: the load average stands in for it.
        if total < 0.5:
            return os.getloadavg()[0] / (os.cpu_count() or 1) <= self._busy_share
        return (busy - own) / total <= self._busy_share


def power(supplies: Path) -> tuple[bool | None, float | None]:
    """Whether the machine is on mains, and its battery's charge (0 to 1; None without one)."""
    kinds: list[tuple[str, Path]] = []
    if supplies.is_dir():
        kinds = [(_text(folder / "type"), folder) for folder in sorted(supplies.iterdir())]
    system = [folder for kind, folder in kinds if kind == "Battery" and _text(folder / "scope") != "Device"]
    if not system:
        return True, None
    charges = [int(text) / 100 for folder in system if (text := _text(folder / "capacity")).isdigit()]
    mains = any(_text(folder / "online") == "1" for kind, folder in kinds if kind in ("Mains", "USB"))
    states = {_text(folder / "status") for folder in system}
    charging = mains or bool(states & {"Charging", "Full"})
    known = charging or bool(states & {"Discharging", "Not charging"})
    return (charging if known else None), (min(charges) if charges else None)


def metered_by_network_manager() -> bool | None:
    """NetworkManager's own judgement over all connected devices; None without NetworkManager."""
    program = shutil.which("nmcli")
    if program is None:
        return None
    try:
        answer = subprocess.run(  # noqa: S603 - a fixed command, found on PATH
            [program, "-g", "GENERAL.METERED", "device", "show"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return metered_of(answer.stdout)


def metered_of(answer: str) -> bool | None:
    """Read `nmcli`'s answer, one line a device: "yes", "no", "yes (guessed)", "unknown", ..."""
    words = {line.split()[0] for line in answer.splitlines() if line.strip()}
    if "yes" in words:
        return True
    return False if "no" in words else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _hottest() -> float | None:
    readings = [reading.current for group in psutil.sensors_temperatures().values() for reading in group]
    return max(readings, default=None)


def _terminals_touched() -> list[float]:
    touched = []
    for user in psutil.users():
        try:
            touched.append(Path("/dev", user.terminal or "").stat().st_atime if user.terminal else 0.0)
        except OSError:
            continue
    return touched


def _processor_seconds(own: psutil.Process) -> tuple[float, float, float]:
    """Seconds of all processors so far: in all, busy, and spent by this process."""
    times = psutil.cpu_times()
    total = sum(times)
    mine = own.cpu_times()
    return total, total - times.idle - getattr(times, "iowait", 0.0), mine.user + mine.system
