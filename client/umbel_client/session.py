"""The session that a device is in, on disk: what it was assigned, how far it came, what is sealed but not reported.

The sealed report is kept, byte for byte, until the coordinator has acknowledged it: every try sends the same bytes
under the same report id, so that none counts twice. A power cut may cost a session, which is one contribution of one
device; nothing here is worth waiting for the medium.
"""

from __future__ import annotations

import base64
import json
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import safetensors
import safetensors.numpy

from umbel.digests import Digest, digest_of, verify_digest
from umbel.errors import UmbelError
from umbel.file_delta import FileDelta
from umbel.messages import check_in_reply_from_message, check_in_reply_to_message, parse
from umbel.sealing import Binding
from umbel.v1 import device_pb2 as pb
from umbel.visit import Assignment, CheckInReply, Event, ReportBegin, SessionRecord
from umbel.weights import Weights
from umbel_client.files import Disk, make_folder, read_any, within
from umbel_client.trainer import Job, Progress

_LONGEST_SHAPE: Final = 64


@dataclass(frozen=True, slots=True)
class Session:
    """One session, from assignment to acknowledgement."""

    assignment: Assignment
    report_id: str
    shape: str = Event.CHECKED_IN.value
    sealed: Digest | None = None
    """Of the sealed report, once there is one."""
    deltas: tuple[FileDelta, ...] = ()
    """Shorter ways to its base's files, as hinted at the check-in."""

    @classmethod
    def begin(cls, assignment: Assignment, deltas: tuple[FileDelta, ...] = ()) -> Session:
        """A new session; its report id says nothing about the device."""
        return cls(assignment, secrets.token_hex(16), deltas=deltas)

    def after(self, *events: Event) -> Session:
        """With these events added to its shape."""
        return replace(self, shape=(self.shape + "".join(event.value for event in events))[:_LONGEST_SHAPE])

    @property
    def may_count(self) -> bool:
        """Whether its report has been on its way, so that the coordinator may have counted it."""
        return Event.REPORT_STARTED.value in self.shape

    def record(self, error: UmbelError | None = None) -> SessionRecord:
        """What is told about it at the next visit."""
        return SessionRecord(self.assignment.task, self.assignment.round, self.shape, error.code if error else "")

    def job(self, device: str) -> Job:
        """What the trainer is to do."""
        return Job(self.assignment.plan, self.assignment.task, self.assignment.round, device)

    def binding(self, base: Digest) -> Binding:
        """What its sealed report belongs to."""
        assigned = self.assignment
        return Binding(assigned.task, assigned.round, assigned.session_id, self.report_id, base)

    def question(self, sealed: bytes) -> ReportBegin:
        """The question before the upload."""
        return ReportBegin(
            self.assignment.session_id, self.report_id, self.assignment.upload_token, len(sealed), digest_of(sealed)
        )


class SessionFolder:
    """Where the one open session is kept."""

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._session = within(folder, "session.json")
        self._sealed = within(folder, "sealed.bin")
        self._progress = within(folder, "progress.safetensors")
        self._disk = disk
        make_folder(folder)

    def load(self) -> Session | None:
        """The open session; None if there is none, or what was kept of it can't be read any more."""
        try:
            content = read_any(self._session)
            if content is None:
                return None
            tree = json.loads(content)
            answer = check_in_reply_from_message(parse(pb.CheckInResponse, base64.b64decode(tree["assignment"])))
            if not isinstance(answer.reply, Assignment):
                return None
            return Session(answer.reply, tree["report_id"], tree["shape"], tree["sealed"], answer.deltas)
        except (OSError, ValueError, KeyError, TypeError, UmbelError):
            return None

    def save(self, session: Session) -> None:
        """Keep where the session stands."""
        message = check_in_reply_to_message(CheckInReply(session.assignment, deltas=session.deltas))
        tree = {
            "assignment": base64.b64encode(message.SerializeToString()).decode(),
            "report_id": session.report_id,
            "shape": session.shape,
            "sealed": session.sealed,
        }
        self._disk.write(self._session, json.dumps(tree).encode(), durable=False)

    def keep_sealed(self, session: Session, sealed: bytes) -> Session:
        """Keep the sealed report, then the session that knows of it."""
        self._disk.write(self._sealed, sealed, durable=False)
        session = replace(session, sealed=digest_of(sealed))
        self.save(session)
        self._disk.remove(self._progress)
        return session

    def sealed(self, session: Session) -> bytes | None:
        """The sealed report; None if there is none yet, or it was damaged."""
        if session.sealed is None:
            return None
        try:
            data = self._sealed.read_bytes()
            verify_digest(data, session.sealed)
        except (OSError, UmbelError):
            return None
        return data

    def keep_progress(self, progress: Progress, revision: int, count: int) -> None:
        """Keep a run that was stopped on the way, with the revision and number of the examples that it ran on."""
        tensors = {f"weights/{name}": array for name, array in progress.weights.arrays.items()}
        tensors |= {f"slots/{name}": array for name, array in progress.slots.arrays.items()}
        sums = np.array(
            [revision, count, progress.steps, progress.loss, progress.examples, progress.seconds], np.float64
        )
        self._disk.write(self._progress, safetensors.numpy.save({**tensors, "sums": sums}), durable=False)

    def progress(self, revision: int, count: int) -> Progress | None:
        """The run that was stopped on the way; None if there is none, or the examples have changed since."""
        try:
            tensors = safetensors.numpy.load(self._progress.read_bytes())
            *kept, steps, loss, examples, seconds = tensors["sums"].tolist()
        except (OSError, ValueError, KeyError, safetensors.SafetensorError):
            return None
        if kept != [revision, count]:
            return None
        return Progress(
            int(steps), _group(tensors, "weights/"), _group(tensors, "slots/"), loss, int(examples), seconds
        )

    def clear(self) -> None:
        """Let go of the session, and of everything that was derived from examples for it."""
        for path in (self._session, self._sealed, self._progress):
            if path.exists():
                self._disk.remove(path)


def _group(tensors: dict[str, np.ndarray], prefix: str) -> Weights:
    return Weights({name.removeprefix(prefix): a for name, a in tensors.items() if name.startswith(prefix)})
