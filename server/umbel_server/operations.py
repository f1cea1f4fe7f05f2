"""The operators' verbs: thin, each one transaction with its audit row. `actor` is who asked, from their certificate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from umbel.bundle import Bundle
from umbel.digests import Digest
from umbel.errors import AlreadyExists, BadInput, Conflict
from umbel.plan import Kind
from umbel_server import audit, drift_report, fleet, requests, task_records, views
from umbel_server.adaptive_clip import first_clip
from umbel_server.checkpoints import Witness
from umbel_server.drift_report import DriftReport
from umbel_server.drift_windows import Windows
from umbel_server.fleet import DeviceRecord, Fleet
from umbel_server.lineage import LineageStep, trace
from umbel_server.privacy_ledger import PrivacyReport
from umbel_server.registry import Model, require_model
from umbel_server.requests import ANY, Call, enter
from umbel_server.rollout_verbs import RolloutVerbs
from umbel_server.runner import Tools
from umbel_server.task import Task, TaskState
from umbel_server.task_records import TaskRecord
from umbel_server.versions import PublishedRelease, Version
from umbel_server.views import RoundSummary, StatusSummary


class Operations:
    """What operators may ask for; whether they may is checked before, by their roles."""

    def __init__(
        self,
        tools: Tools,
        devices: Fleet,
        take_up: Callable[[str], None],
        verbs: RolloutVerbs | None = None,
        witness: Witness | None = None,
    ) -> None:
        self._store = tools.store
        self._blobs = tools.blobs
        self._registry = tools.registry
        self._clock = tools.clock
        self._runtime = tools.runtime.name
        self._private = tools.private
        self._fleet = devices
        self._take_up = take_up
        self._verbs = verbs
        self._witness = witness

    # Models, versions, releases.

    def drafts(self) -> AbstractContextManager[Path]:
        """A folder for a bundle that comes in; gone after the block, or at the next start."""
        return self._blobs.drafts()

    def add_model(self, name: str, directory: Path, actor: str, call: Call = ANY) -> Version:
        """Register the bundle in a folder as version 1 of a new model.

        Raises:
            BundleInvalid, DigestMismatch, MalformedMessage: the bundle doesn't hold together.
            AlreadyExists: the name is taken.
        """
        return self._registry.add_model(name, Bundle.open(directory), actor, self._clock.now(), call)

    def add_version(self, model: str, parent: int, directory: Path, actor: str, call: Call = ANY) -> Version:
        """Register the bundle in a folder as the next version of a model, made elsewhere from `parent`.

        Raises:
            BundleInvalid, DigestMismatch, MalformedMessage: the bundle doesn't hold together.
            NotFound: no such parent.
            WeightsMismatch: it isn't of the same architecture.
        """
        return self._registry.add_next(model, parent, Bundle.open(directory), actor, self._clock.now(), call)

    def models(self) -> list[Model]:
        """All models, by name."""
        with self._store.reading() as connection:
            return self._registry.models(connection)

    def versions(self, model: str, limit: int = 100) -> list[Version]:
        """A model's versions, newest first; raises `NotFound`."""
        with self._store.reading() as connection:
            require_model(connection, model)
            return self._registry.versions(connection, model, limit)

    def version(self, model: str, number: int) -> Version:
        """One version; raises `NotFound`."""
        with self._store.reading() as connection:
            return self._registry.version(connection, model, number)

    def trace(self, model: str, number: int) -> list[LineageStep]:
        """A version, its parent, and so on back to the first, each from its data contract to its rollouts; raises
        `NotFound`.
        """
        with self._store.reading() as connection:
            return trace(connection, self._registry, model, number)

    def bundle(self, model: str, number: int) -> Bundle:
        """A version's bundle, where its files lie; raises `NotFound`."""
        return self._registry.bundle(self.version(model, number).bundle)

    def publish(self, model: str, number: int, channel: str, actor: str, call: Call = ANY) -> PublishedRelease:
        """Release an accepted version to everybody on a channel at once, an older one too.

        Raises:
            NotFound: no such version.
            WrongState: not an accepted one.
            NotAllowed: a channel that belongs to the rounds.
        """
        if self._verbs is None:
            return self._registry.publish(model, number, channel, actor, self._clock.now(), call)
        published = self._verbs.publish(model, number, channel, actor, call)
        with self._store.reading() as connection:
            return self._registry.published(connection, model, published)

    def releases(self, model: str = "", limit: int = 100) -> list[PublishedRelease]:
        """Releases, newest first; of one model or of all. Raises `NotFound`."""
        with self._store.reading() as connection:
            if model:
                require_model(connection, model)
            return self._registry.releases(connection, model, limit)

    def add_holdout(self, data: bytes, actor: str, call: Call = ANY) -> Digest:
        """Keep held-out examples, on which tasks may judge candidates (`ValidationPolicy.holdout` names them)."""
        digest = self._blobs.put_holdout(data)
        now, body = self._clock.now(), {"bytes": len(data)}
        with self._store.transaction() as connection:
            if enter(connection, call, actor, "holdout.add", digest, now) is None:
                audit.append(connection, now, actor, "holdout.add", digest, body, call.request_id)
        return digest

    # Tasks.

    def create_task(self, task: Task, actor: str, call: Call = ANY) -> TaskRecord:
        """Write a task down and begin its first round.

        Raises:
            AlreadyExists: the name is taken.
            NotFound: no such model, or no such held-out examples.
            Conflict: its population has another model, or its model is being trained by another task.
            BadInput: the model can't do what the task asks for.
            WrongState: the task's updates are private, and there is no helper.
        """
        now = self._clock.now()
        first = first_clip(task.privacy, task.plan)
        record = TaskRecord(replace(task, state=TaskState.RUNNING), now, clip_norm=first)
        self._blobs.holdout(task.validation.holdout)
        with self._store.transaction() as connection:
            if enter(connection, call, actor, "task.create", task.name, now) is not None:
                return task_records.get(connection, task.name)
            version = self._registry.newest_accepted(connection, task.model)
            self._require_fitting(task, version)
            if task.updates_private:
                self._private.require_possible(task, self._registry.bundle(version.bundle).manifest)
            _require_room(task_records.everything(connection), task)
            task_records.insert(connection, record)
            body = {"model": task.model, "rounds": task.rounds, "goal": task.goal, "strategy": task.strategy.name}
            audit.append(connection, now, actor, "task.create", task.name, body, call.request_id)
        self._take_up(task.name)
        return record

    def pause_task(self, name: str, actor: str, call: Call = ANY) -> TaskRecord:
        """Let the open round end, and begin no other; raises `NotFound` or `WrongState`."""
        return self._move(name, actor, "task.pause", Task.paused, call)

    def resume_task(self, name: str, actor: str, call: Call = ANY) -> TaskRecord:
        """Go on with a paused task; raises `NotFound` or `WrongState`."""
        return self._move(name, actor, "task.resume", Task.resumed, call)

    def stop_task(self, name: str, actor: str, call: Call = ANY) -> TaskRecord:
        """End a task for good; a round that still collects is abandoned. Raises `NotFound` or `WrongState`."""
        return self._move(name, actor, "task.stop", Task.done, call)

    def tasks(self) -> list[TaskRecord]:
        """All tasks, in the order in which they were made."""
        with self._store.reading() as connection:
            return task_records.everything(connection)

    def task(self, name: str) -> TaskRecord:
        """One task; raises `NotFound`."""
        with self._store.reading() as connection:
            return task_records.get(connection, name)

    def privacy(self, name: str) -> PrivacyReport:
        """What a task's rounds have cost in privacy, and what one more would cost; raises `NotFound`."""
        with self._store.reading() as connection:
            record = task_records.get(connection, name)
            version = self._registry.newest_accepted(connection, record.task.model)
        return self._private.ledger(record, self._registry.bundle(version.bundle).manifest)

    def drift(self, name: str, windows: Windows) -> DriftReport:
        """Whether a task's data have changed, or its model has got worse on them; raises `NotFound`.

        May take some tenths of a second.
        """
        with self._store.reading() as connection:
            record = task_records.get(connection, name)
            rounds = drift_report.gather(connection, self._registry, record.task, windows)
        return drift_report.report(rounds, windows)

    # Rounds, devices, audit.

    def revisions(self, kind: str, subjects: Collection[str]) -> Mapping[str, int]:
        """How far each of these things has changed; see `umbel_server.requests`."""
        with self._store.reading() as connection:
            return requests.revisions(connection, kind, subjects)

    def rounds(self, task: str = "", limit: int = 100) -> list[RoundSummary]:
        """Rounds, newest first; of one task or of all. Raises `NotFound`."""
        with self._store.reading() as connection:
            if task:
                task_records.get(connection, task)
            return [found.told(self._private.waits) for found in views.rounds(connection, task, limit)]

    def round(self, task: str, number: int) -> RoundSummary:
        """One round; raises `NotFound`."""
        with self._store.reading() as connection:
            return views.one_round(connection, task, number).told(self._private.waits)

    def devices(self, population: str = "", limit: int = 100, after: str = "") -> list[DeviceRecord]:
        """Devices in the order of their ids, those after `after`."""
        self._fleet.flush(self._clock.now())
        with self._store.reading() as connection:
            return fleet.devices(connection, population, limit, after)

    def device(self, device_id: str) -> DeviceRecord:
        """One device; raises `NotFound`."""
        self._fleet.flush(self._clock.now())
        with self._store.reading() as connection:
            return fleet.device(connection, device_id)

    def shapes(self, task: str = "") -> Counter[str]:
        """How often devices told each shape of a session."""
        self._fleet.flush(self._clock.now())
        with self._store.reading() as connection:
            return fleet.shapes(connection, task)

    def outcomes(self, model: str, number: int) -> Counter[str]:
        """How many devices met one release with each outcome."""
        self._fleet.flush(self._clock.now())
        with self._store.reading() as connection:
            return fleet.outcomes(connection, model, number)

    def audit_rows(self, limit: int = 100, before: int | None = None) -> list[audit.AuditRow]:
        """The newest audit rows, newest first."""
        with self._store.reading() as connection:
            return audit.rows(connection, limit, before)

    def verify_audit(self) -> int:
        """How many audit rows there are, all of them intact, and as witnesses saw them.

        Raises:
            DigestMismatch: naming what isn't: an edit, a deletion, a cut at the end, a rewriting.
        """
        if self._witness is not None:
            return self._witness.verify(self._store)
        with self._store.reading() as connection:
            return audit.verify(connection)

    def status(self) -> StatusSummary:
        """Where everything stands."""
        now = self._clock.now()
        self._fleet.flush(now)
        with self._store.reading() as connection:
            return views.status(connection, self._registry, now).told(self._private.waits)

    def _move(self, name: str, actor: str, action: str, moved: Callable[[Task], Task], call: Call) -> TaskRecord:
        now = self._clock.now()
        with self._store.transaction() as connection:
            record = task_records.get(connection, name)
            if enter(connection, call, actor, action, name, now) is not None:
                return record
            record = replace(record, task=moved(record.task))
            task_records.update(connection, record)
            audit.append(connection, now, actor, action, name, request_id=call.request_id)
        self._take_up(name)
        return record

    def _require_fitting(self, task: Task, version: Version) -> None:
        manifest = self._registry.bundle(version.bundle).manifest
        wanted = "train" if task.plan.kind is Kind.TRAIN else "evaluate"
        if not any(wanted in signatures for signatures in manifest.graphs.values()):
            raise BadInput(f"model {task.model!r} has no {wanted!r} graph; compile it with one")
        if task.plan.kind is Kind.TRAIN and self._runtime not in manifest.graphs:
            raise BadInput(
                f"model {task.model!r} has no graphs for {self._runtime!r}, on which new versions are tried before "
                f"they count; compile it for that too (--runtime {self._runtime},…): devices fetch only what they run"
            )
        unknown = set(task.plan_for(Kind.TRAIN).hyperparameters) - set(manifest.hyperparameters)
        if unknown and task.plan.kind is Kind.TRAIN:
            known = ", ".join(sorted(manifest.hyperparameters)) or "none"
            raise BadInput(f"model {task.model!r} has no hyper-parameters {sorted(unknown)}; it has {known}")


def _require_room(records: list[TaskRecord], task: Task) -> None:
    for other in (record.task for record in records):
        if other.name == task.name:
            raise AlreadyExists(f"a task {task.name!r} exists already; choose another name")
        if other.population == task.population and other.model != task.model:
            raise Conflict(
                f"population {task.population!r} has the model {other.model!r}; {task.model!r} needs one of its own"
            )
        both_train = other.plan.kind is Kind.TRAIN and task.plan.kind is Kind.TRAIN
        if both_train and other.model == task.model and other.state is not TaskState.DONE:
            raise Conflict(f"task {other.name!r} is training {task.model!r}; stop it first")
