"""A record of every question, in files by day: one JSON object a line, of who asked what of which version.

Records wait in memory for a thread that comes by now and then and writes them, and no answer waits for it. Where it
can't keep up, or the disk is full, records are dropped, and the file says how many.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from umbel.clock import DAY
from umbel_server.files import PRIVATE, make_private
from umbel_server.serving.inference import Inferred

BACKLOG: Final = 20_000
"""Records that may wait to be written: some megabytes."""
WRITE_SECONDS: Final = 0.5

_log = structlog.get_logger(__name__)


class InferenceLog:
    """Writes records into a folder.

    Args:
        folder: of nothing else; made when it isn't there.
        days: after which a file is deleted.
    """

    def __init__(self, folder: Path, days: float) -> None:
        make_private(folder)
        self._folder = folder
        self._days = days
        self._waiting: deque[Inferred] = deque()
        self.dropped = 0
        """Records that were never written, since the start."""
        self._untold = 0
        self._counting = threading.Lock()
        self._day = ""
        self._is_well = True
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._write_all, name="inference-log", daemon=True)
        self._thread.start()

    def put(self, record: Inferred) -> None:
        """Have a record written, if there is room for it; waits for nothing."""
        if len(self._waiting) < BACKLOG:
            self._waiting.append(record)
        else:
            self._drop(1)

    def close(self) -> None:
        """Write what waits, and end."""
        self._ending.set()
        self._thread.join()

    def _write_all(self) -> None:
        while not self._ending.wait(WRITE_SECONDS):
            self._write_waiting()
        self._write_waiting()

    def _write_waiting(self) -> None:
        records = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not records:
            return
        with self._counting:
            untold, self._untold = self._untold, 0
        try:
            self._write(records, untold)
            self._is_well = True
        except OSError as error:
            self._drop(len(records), untold)
            if self._is_well:
                _log.error("can't write records of questions; they are dropped and counted", reason=str(error))
            self._is_well = False

    def _drop(self, records: int, untold: int = 0) -> None:
        with self._counting:
            self.dropped += records
            self._untold += records + untold

    def _write(self, records: list[Inferred], dropped: int) -> None:
        lines = [json.dumps(asdict(record), separators=(",", ":")) for record in records]
        if dropped:
            lines.append(json.dumps({"at": records[-1].at, "dropped": dropped}, separators=(",", ":")))
        day = _day(records[-1].at)
        path = self._folder / f"{day}.jsonl"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, PRIVATE)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            # After a failure the last line may be half a one.
            file.write(("" if self._is_well else "\n") + "\n".join(lines) + "\n")
        if day != self._day:
            self._day = day
            self._delete_older_than(records[-1].at - self._days * DAY)

    def _delete_older_than(self, instant: float) -> None:
        for path in self._folder.glob("*.jsonl"):
            if path.stem < _day(instant):
                path.unlink(missing_ok=True)


def _day(instant: float) -> str:
    return datetime.fromtimestamp(instant, UTC).date().isoformat()
