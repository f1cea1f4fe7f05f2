"""Files by content, in five areas that never mix.

* `bundles`: manifests, graphs, weights, golden examples; devices may fetch what the registry has published of them.
* `spool`: sealed reports, from their first byte until their round is over; never fetchable.
* `state`: what strategies remember between rounds; never fetchable.
* `holdout`: the server's own examples, on which it judges candidates; never fetchable.
* `deltas`: shorter ways from one bundle file to another; devices may fetch them, and all of them can be made again.

A blob appears under its name whole or not at all: written aside, synced, renamed, and the folder synced.
"""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from umbel.digests import Digest, digest_of, digest_of_file, parse_digest, verify_digest
from umbel.errors import DigestMismatch, MalformedMessage, NotFound
from umbel.file_delta import FileDelta
from umbel_server.files import flush
from umbel_server.store import OnStep, ignore_step

AREAS: Final = ("bundles", "spool", "state", "holdout", "deltas")
_ASIDE: Final = "aside-"


class Blobs:
    """A folder of blobs; one process at a time may write to it.

    Args:
        root: the folder.
        on_step: told each durable step before it happens.
        durable: False leaves it to the operating system when bytes reach the medium; for simulations only.
    """

    def __init__(self, root: Path, on_step: OnStep = ignore_step, *, durable: bool = True) -> None:
        self._root = root
        self._on_step = on_step
        self._sync = flush if durable else _leave_to_the_system
        for area in AREAS:
            (root / area).mkdir(parents=True, exist_ok=True, mode=0o700)
            for unfinished in (root / area).glob(f"{_ASIDE}*"):
                unfinished.unlink()
        for unfinished in root.glob(f"{_ASIDE}*"):
            shutil.rmtree(unfinished)

    @contextmanager
    def drafts(self) -> Iterator[Path]:
        """A folder for files that come in and aren't verified yet; gone after the block, or at the next start."""
        with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=self._root) as folder:
            yield Path(folder)

    @property
    def spool(self) -> Path:
        """The folder of sealed reports."""
        return self._root / "spool"

    # Bundles.

    def put_bundle_file(self, data: bytes) -> Digest:
        """Keep one file of a bundle; durable when it returns."""
        return self._put("bundles", data)

    def bundle_path(self, digest: Digest) -> Path:
        """Where one file of a bundle lies; raises `NotFound`."""
        path = self._root / "bundles" / digest
        if not path.is_file():
            raise NotFound(f"no bundle file has the digest {digest}; check in for the newest release")
        return path

    # Deltas, by what they lead from and to: a file's name tells all of them apart from its size.

    def delta_aside(self) -> Path:
        """Where a delta may be written; gone at the next start unless it is settled."""
        return self._root / "deltas" / f"{_ASIDE}{secrets.token_hex(8)}"

    def settle_delta(self, aside: Path, delta: FileDelta) -> None:
        """Keep a delta that was written aside; not synced, since it can be made again."""
        self._on_step("put delta")
        aside.replace(self.delta_path(delta.base, delta.target, delta.digest))

    def delta_path(self, base: Digest, target: Digest, digest: Digest) -> Path:
        """Where a delta lies, if it does."""
        return self._root / "deltas" / f"{base}.{target}.{digest}"

    def drop_delta(self, delta: FileDelta) -> None:
        """Forget a delta."""
        self.delta_path(delta.base, delta.target, delta.digest).unlink(missing_ok=True)

    def deltas(self) -> list[FileDelta]:
        """All deltas that are kept, oldest first; whatever else lies there, or was cut off by a crash, goes."""
        found = []
        for path in sorted((self._root / "deltas").iterdir(), key=lambda path: path.stat().st_mtime_ns):
            try:
                base, target, digest = map(parse_digest, path.name.split("."))
            except (ValueError, MalformedMessage):
                path.unlink()
                continue
            if digest_of_file(path) == digest:
                found.append(FileDelta(base, target, digest, path.stat().st_size))
            else:
                path.unlink()
        return found

    # What strategies remember, by the task whose it is.

    def put_state(self, task: str, data: bytes) -> Digest | None:
        """Keep a strategy's state; durable when it returns. `None` for a strategy that remembers nothing."""
        return self._put("state", data, f"{task}.") if data else None

    def state(self, task: str, digest: Digest | None) -> bytes:
        """Read a strategy's state, verified; nothing for `None`.

        Raises:
            NotFound: it isn't there.
            DigestMismatch: the file has been changed.
        """
        if digest is None:
            return b""
        data = _read(self._root / "state" / f"{task}.{digest}")
        verify_digest(data, digest)
        return data

    def keep_states(self, task: str, *wanted: Digest | None) -> None:
        """Delete the states of a task that nothing needs any more."""
        for path in (self._root / "state").iterdir():
            owner, _, digest = path.name.rpartition(".")
            if owner == task and digest not in wanted:
                path.unlink(missing_ok=True)

    # The server's own held-out examples.

    def put_holdout(self, data: bytes) -> Digest:
        """Keep held-out examples; durable when it returns."""
        return self._put("holdout", data)

    def holdout(self, digest: str) -> bytes | None:
        """Read held-out examples by their digest; `None` for an empty one.

        Raises:
            NotFound: they aren't there.
            DigestMismatch: the file has been changed.
        """
        if not digest:
            return None
        data = _read(self._root / "holdout" / parse_digest(digest))
        verify_digest(data, Digest(digest))
        return data

    # The spool. Names are (report id, digest of the sealed bytes): a device that seals anew starts a new file.

    def partial_path(self, report_id: str, digest: Digest) -> Path:
        """Where an upload grows."""
        return self.spool / f"{report_id}.{digest}.part"

    def report_path(self, report_id: str, digest: Digest) -> Path:
        """Where a report lies once all of it is here."""
        return self.spool / f"{report_id}.{digest}"

    def settle_report(self, report_id: str, digest: Digest) -> None:
        """Make a whole upload durable under its final name.

        Raises:
            DigestMismatch: other bytes came than were announced; they are dropped.
        """
        partial = self.partial_path(report_id, digest)
        if self.report_path(report_id, digest).is_file():
            # Settled by an earlier try, which failed before its commit.
            return
        if digest_of_file(partial) != digest:
            partial.unlink()
            raise DigestMismatch("the report's bytes changed on their way; send it again from its first byte")
        self._on_step("spool report")
        self._sync(partial)
        partial.replace(self.report_path(report_id, digest))
        self._sync(self.spool)

    def held(self, report_id: str, digest: Digest) -> int:
        """How many bytes of an upload are here already."""
        for path in (self.report_path(report_id, digest), self.partial_path(report_id, digest)):
            if path.is_file():
                return path.stat().st_size
        return 0

    def read_report(self, report_id: str, digest: Digest) -> bytes:
        """Read an accepted report; raises `NotFound`."""
        return _read(self.report_path(report_id, digest))

    def drop_report(self, report_id: str, digest: Digest) -> None:
        """Forget a report or an upload."""
        self.drop_partial(report_id, digest)
        self.report_path(report_id, digest).unlink(missing_ok=True)

    def drop_partial(self, report_id: str, digest: Digest) -> None:
        """Forget an upload, but not a report that is all here."""
        self.partial_path(report_id, digest).unlink(missing_ok=True)

    def sweep_spool(self, reports: set[tuple[str, Digest]], *, drop_partial: bool) -> None:
        """Delete the reports that no open round counts, and, if asked to, uploads that nobody will finish."""
        wanted = {self.report_path(*report).name for report in reports}
        for path in self.spool.iterdir():
            is_partial = path.suffix == ".part"
            if path.name not in wanted and (drop_partial or not is_partial):
                path.unlink(missing_ok=True)

    def _put(self, area: str, data: bytes, prefix: str = "") -> Digest:
        digest = digest_of(data)
        path = self._root / area / f"{prefix}{digest}"
        if path.is_file():
            return digest
        self._on_step(f"put {area}")
        aside = path.with_name(f"{_ASIDE}{secrets.token_hex(8)}")
        try:
            aside.write_bytes(data)
            self._sync(aside)
            aside.replace(path)
        except OSError:
            # Each new try would otherwise take what room is left.
            aside.unlink(missing_ok=True)
            raise
        self._sync(path.parent)
        return digest


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotFound(f"{path.name} is missing from {path.parent.name}; restore it from a backup") from None


def _leave_to_the_system(path: Path) -> None:
    del path
