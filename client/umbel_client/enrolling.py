"""Keys of an enrolment that is under way: on the disk before anybody is shown a token.

Coordinator and helper let a token be redeemed again by the key that redeemed it, and by no other. A device whose answer
was lost (its power went, its disk was full, the helper wasn't there yet) so asks again, with the same words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

from umbel.digests import digest_of
from umbel_client.files import Disk, make_folder, read_any, within

_FILE: Final = "enrolling.json"


class PendingKeys:
    """The keys that were made for tokens in a home, until it is enrolled.

    Args:
        home: the device's folder; made when it doesn't exist.
        disk: how to write durably.
    """

    def __init__(self, home: Path, disk: Disk | None = None) -> None:
        make_folder(home, 0o700)
        self._file = within(home, _FILE)
        self._disk = disk or Disk()

    def key(self, token: str, make: Callable[[], str]) -> str:
        """The key that goes with a token: the one that was made for it before, or a new one; durable."""
        name, keys = digest_of(token.encode()), self._read()
        if name not in keys:
            keys[name] = make()
            self._disk.write(self._file, json.dumps(keys).encode())
        return keys[name]

    def done(self) -> None:
        """The device is enrolled, and its keys lie where they belong."""
        self._disk.remove(self._file)

    def _read(self) -> dict[str, str]:
        try:
            return {str(name): str(key) for name, key in json.loads(read_any(self._file) or b"{}").items()}
        except (ValueError, AttributeError):
            return {}
