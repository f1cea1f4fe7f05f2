"""What is authentic and newest: releases as The Update Framework lists them (TUF 1.0, by python-tuf's own client).

    root (pinned at enrolment) -> timestamp -> snapshot -> targets -> the model's own role -> release

python-tuf asks for files while it verifies; here it is only ever shown files that were fetched already. Where one is
missing it stops, the file is fetched, and it begins again from what it had kept. So the whole conversation is ordinary
asynchronous code under one deadline, over any transport, and the trust stays python-tuf's.

Metadata that is past its date stops a device from *updating*. It never stops it from answering.
"""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from umbel.errors import (
    DigestMismatch,
    Expired,
    MalformedMessage,
    NotAuthentic,
    NotFound,
    OutOfBounds,
    RollbackRefused,
    SignatureInvalid,
    Unreachable,
)
from umbel.listing import ISSUED_AT, ListedRelease, listed_from_target, target_path

if TYPE_CHECKING:
    from tuf.api.metadata import TargetFile
    from tuf.ngclient import Updater, UpdaterConfig

Fetch = Callable[[str, int], Awaitable[bytes]]
"""(file name, most bytes) -> the file's bytes; raises `NotFound`, `OutOfBounds` or `Unreachable`."""

DEADLINE_SECONDS: Final = 60.0
_MOST_FILES: Final = 300
_LAST_INSTANT: Final = datetime.datetime(9999, 1, 1, tzinfo=datetime.UTC).timestamp()
_NOWHERE: Final = "tuf:///"


class Listing:
    """The releases that a coordinator's TUF metadata lists, as far as this device has verified them.

    Args:
        folder: where verified metadata is kept; made when it doesn't exist.
        root: the first trusted root metadata, pinned at enrolment.
        seconds: for everything that one call fetches, all files together; a slow mirror can't hold a device.
    """

    def __init__(self, folder: Path, root: bytes, seconds: float = DEADLINE_SECONDS) -> None:
        self._folder = folder
        self._root = root
        self._seconds = seconds
        folder.mkdir(parents=True, exist_ok=True)

    async def refresh(self, fetch: Fetch, now: float) -> None:
        """Bring the metadata up to date.

        Args:
            fetch: reads a metadata file from the coordinator, or from any mirror: it needn't be trusted.
            now: POSIX seconds; an instant that was proven to be past already takes its place if it is later.

        Raises:
            Expired: the newest metadata to be had is past its date: a mirror, or the coordinator, stands still.
            RollbackRefused: older metadata than was seen before.
            SignatureInvalid: signed by other keys, or by too few.
            DigestMismatch, OutOfBounds, NotFound, MalformedMessage: files that aren't what the metadata promise.
            Unreachable: no answer, or not in time.
        """
        await self._run(fetch, now, lambda updater: updater.refresh())

    async def find(self, fetch: Fetch, now: float, model: str, number: int) -> ListedRelease:
        """A release as it is listed; refreshes first. Raises as `refresh`, and `NotFound` if it isn't listed."""
        path = target_path(model, number)
        target = await self.target(fetch, now, path)
        if target is None:
            raise NotFound(f"release {number} of {model!r} isn't listed; whoever offers it can't show that it is real")
        return listed_from_target(path, target.length, target.hashes, target.custom)

    async def target(self, fetch: Fetch, now: float, path: str) -> TargetFile | None:
        """Whatever is listed under a path, for tools; raises as `refresh`."""
        found: list[TargetFile | None] = []
        await self._run(fetch, now, lambda updater: found.append(updater.get_targetinfo(path)))
        return found[-1]

    def pin(self) -> None:
        """Keep the pinned root on disk and verify it, before anything is fetched; raises as `refresh`."""
        self._try({}, 0.0, lambda updater: None)

    @property
    def consistent(self) -> bool:
        """Whether targets are stored under names that begin with their hash."""
        return bool(json.loads((self._folder / "root.json").read_bytes())["signed"]["consistent_snapshot"])

    @property
    def time_floor(self) -> float:
        """An instant that is known to have passed, from signed metadata; 0 before the first."""
        return _issued_at(self._newest_timestamp())

    def _floor(self, files: Mapping[str, bytes | None]) -> float:
        """`time_floor`; that of the timestamp that is to be verified now, where it is a newer one that says less: its
        coordinator's clock was ahead, and was set right.
        """
        try:
            shown = json.loads(files["timestamp.json"] or b"")["signed"]
            if shown["version"] > self._newest_timestamp()["version"]:
                return min(self.time_floor, _issued_at(shown))
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # whatever it is, it is refused by those who verify it
        return self.time_floor

    def _newest_timestamp(self) -> dict[str, Any]:
        """The verified timestamp's content, while the key that signed it is still trusted: a key that was stolen and
        then replaced must not leave a date in the far future behind.
        """
        try:
            timestamp = json.loads((self._folder / "timestamp.json").read_bytes())
            trusted = json.loads((self._folder / "root.json").read_bytes())["signed"]["roles"]["timestamp"]["keyids"]
            by = {signature["keyid"] for signature in timestamp["signatures"]}
            signed = timestamp["signed"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return signed if by & set(trusted) and isinstance(signed, dict) else {}

    def _tidy(self) -> None:
        """Remove what python-tuf was writing when a visit was killed, once a later one has come to its end."""
        try:
            newest = (self._folder / "timestamp.json").stat().st_mtime_ns
            for left in self._folder.rglob("tmp*"):
                if left.stat().st_mtime_ns < newest:
                    left.unlink()
        except OSError:
            return

    async def _run(self, fetch: Fetch, now: float, step: Callable[[Updater], object]) -> None:
        self._tidy()
        try:
            async with asyncio.timeout(self._seconds):
                await self._until_done(fetch, now, step)
        except TimeoutError:
            raise Unreachable(f"release metadata took longer than {self._seconds:g} seconds; try again later") from None

    async def _until_done(self, fetch: Fetch, now: float, step: Callable[[Updater], object]) -> None:
        files: dict[str, bytes | None] = {}
        while len(files) < _MOST_FILES:
            missing = self._try(files, now, step)
            if missing is None:
                return
            name, limit = missing
            try:
                files[name] = await fetch(name, limit)
            except NotFound:
                files[name] = None
        raise OutOfBounds(f"more than {_MOST_FILES} metadata files in one refresh; something is wrong over there")

    def _try(
        self, files: Mapping[str, bytes | None], now: float, step: Callable[[Updater], object]
    ) -> tuple[str, int] | None:
        """Run one step over the files at hand; the name and size limit of the first that is missing, if any."""
        # Imported here: a device that never updates never pays for it.
        from tuf.ngclient import Updater

        from umbel_client.tuf_files import FilesAtHand, Missing

        # Read first: a new client begins by pointing back at the pinned root.
        instant = datetime.datetime.fromtimestamp(max(now, self._floor(files)), datetime.UTC)
        with _own_errors():
            try:
                updater = Updater(
                    str(self._folder),
                    _NOWHERE,
                    fetcher=FilesAtHand(_NOWHERE, files),
                    config=_config(),
                    bootstrap=self._root,
                )
                # Time is an argument here; python-tuf has no public way to hand it in.
                updater._trusted_set.reference_time = instant
                step(updater)
            except Missing as missing:
                return missing.name, missing.limit
        return None


def _issued_at(timestamp: Mapping[str, Any]) -> float:
    """When a timestamp says that it was made; 0 where it doesn't."""
    told = timestamp.get(ISSUED_AT)
    # Whoever steals the timestamp's key may write anything here: what is no instant must not keep a device from
    # learning, by the next root, that the key was replaced.
    if not isinstance(told, int | float) or not 0 <= told <= _LAST_INSTANT:
        return 0.0
    return float(told)


def _config() -> UpdaterConfig:
    from tuf.ngclient import UpdaterConfig

    return UpdaterConfig(timestamp_max_length=16_384, snapshot_max_length=500_000, targets_max_length=2_000_000)


@contextmanager
def _own_errors() -> Iterator[None]:
    """python-tuf's errors as Umbel's."""
    from tuf.api import exceptions

    from umbel_client.tuf_files import Missing

    try:
        yield
    except Missing:
        raise
    except exceptions.ExpiredMetadataError as error:
        raise Expired(f"release metadata is past its date ({error}); keep what you have, try again later") from error
    except exceptions.BadVersionNumberError as error:
        raise RollbackRefused(f"older release metadata than was seen before: {error}") from error
    except exceptions.UnsignedMetadataError as error:
        raise SignatureInvalid(f"release metadata isn't signed by those whom this device trusts: {error}") from error
    except exceptions.LengthOrHashMismatchError as error:
        raise DigestMismatch(f"release metadata isn't what was promised: {error}") from error
    except exceptions.DownloadLengthMismatchError as error:
        raise OutOfBounds(f"release metadata is longer than it may be: {error}") from error
    except exceptions.DownloadHTTPError as error:
        raise NotFound(f"release metadata is missing over there: {error}") from error
    except exceptions.DownloadError as error:
        raise Unreachable(f"release metadata didn't come: {error}") from error
    except exceptions.RepositoryError as error:
        raise NotAuthentic(f"release metadata can't be trusted: {error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise MalformedMessage(f"not release metadata: {error}") from error
