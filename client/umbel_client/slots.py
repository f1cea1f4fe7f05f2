"""The slots of a device's shelf: which release answers, on trial or committed, and what to go back to.

    adopt ──> on trial ──commit──> active, the last known good one
                 │ each load costs one of its tries, each proof of health gives them back
                 └─give up──> the last known good one answers again, the release is blocked

Values only; the shelf keeps them in one file that is replaced whole. A try is spent on disk *before* a release is
loaded: one that takes the process down with it runs out of tries and is gone at the third start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from umbel.digests import Digest, parse_digest
from umbel.fields import known
from umbel.release import Release

TRIES: Final = 3
_BLOCKED: Final = 16
"""How many bundles that failed here are remembered."""


@dataclass(frozen=True, slots=True)
class Slot:
    """An adopted release, by its bundle."""

    model: str
    number: int
    version: int
    bundle: Digest

    @classmethod
    def of(cls, release: Release) -> Slot:
        """The slot for a verified release."""
        return cls(release.model, release.number, release.version, release.bundle)


@dataclass(frozen=True, slots=True)
class Personal:
    """This device's own weights for a bundle."""

    bundle: Digest
    weights: Digest


@dataclass(frozen=True, slots=True)
class Trial:
    """The active release still has to prove itself."""

    execution: str
    """Of the offer that it came by."""
    since: float
    """POSIX seconds."""
    tries_left: int = TRIES


@dataclass(frozen=True, slots=True)
class Reverted:
    """A release that didn't prove itself; told at the next visit."""

    model: str
    number: int
    execution: str
    reason: str


@dataclass(frozen=True, slots=True)
class Slots:
    """What serves, and what served before."""

    active: Slot | None = None
    previous: Slot | None = None
    """The last known good one, other than the active one."""
    personal: Personal | None = None
    previous_personal: Personal | None = None
    trial: Trial | None = None
    """None: the active release is committed."""
    blocked: tuple[Digest, ...] = ()
    """Bundles that failed here, newest last."""
    reverted: Reverted | None = None

    @property
    def serving(self) -> tuple[Slot | None, Personal | None]:
        """What answers: two values of slots that agree here are the same to a predictor."""
        return self.active, self.personal

    def adopt(self, slot: Slot, personal: Personal | None, trial: Trial | None = None) -> Slots:
        """With `slot` active; what was active, once it has proved itself, becomes the one to go back to."""
        if self.active is not None and self.active.bundle == slot.bundle:
            kept = trial if self.active.number != slot.number else self.trial
            return replace(self, active=slot, personal=personal, trial=kept)
        good, own = self.active, self.personal
        if good is None or self.trial is not None:
            good, own = self.previous, self.previous_personal
        return replace(self, active=slot, personal=personal, previous=good, previous_personal=own, trial=trial)

    def loading(self) -> Slots:
        """One try less, before the active release is loaded; given up when none is left."""
        if self.trial is None:
            return self
        if self.trial.tries_left <= 0:
            return self.give_up(f"it took its process down {TRIES} times")
        return replace(self, trial=replace(self.trial, tries_left=self.trial.tries_left - 1))

    def healthy(self) -> Slots:
        """All tries back: it has answered."""
        return self if self.trial is None else replace(self, trial=replace(self.trial, tries_left=TRIES))

    def tried_from(self, now: float) -> Slots:
        """The trial begins now: the clock was ahead when it did, or has forgotten the date, and that proves nothing."""
        return self if self.trial is None else replace(self, trial=replace(self.trial, since=now))

    def commit(self) -> Slots:
        """The active release has proved itself."""
        return replace(self, trial=None)

    def give_up(self, reason: str) -> Slots:
        """Go back from a trial, block its bundle, and remember to tell."""
        if self.trial is None or self.active is None:
            return self
        told = Reverted(self.active.model, self.active.number, self.trial.execution, reason)
        blocked = (*self.blocked, self.active.bundle)[-_BLOCKED:]
        return replace(self.revert(), blocked=blocked, reverted=told)

    def revert(self) -> Slots:
        """With the last known good release active again."""
        return replace(
            self,
            active=self.previous,
            personal=self.previous_personal,
            previous=None,
            previous_personal=None,
            trial=None,
        )

    def told(self) -> Slots:
        """After the coordinator has been told of what was given up."""
        return replace(self, reverted=None)

    def without_personal(self) -> Slots:
        """With nothing that was learnt from this device's examples."""
        return replace(self, personal=None, previous_personal=None)


def slots_from_tree(tree: dict[str, Any]) -> Slots:
    """Undo `dataclasses.asdict`; what an older version didn't write is absent, what a newer one added left out.

    Raises:
        MalformedMessage, KeyError, TypeError, ValueError: damaged.
    """

    def slot(entry: dict[str, Any] | None) -> Slot | None:
        if entry is None:
            return None
        return Slot(str(entry["model"]), int(entry["number"]), int(entry["version"]), parse_digest(entry["bundle"]))

    def own(entry: dict[str, Any] | None) -> Personal | None:
        return None if entry is None else Personal(parse_digest(entry["bundle"]), parse_digest(entry["weights"]))

    active, previous, personal = slot(tree["active"]), slot(tree["previous"]), own(tree["personal"])
    trial, reverted = tree.get("trial"), tree.get("reverted")
    return Slots(
        active=active,
        previous=previous,
        personal=personal,
        previous_personal=own(tree.get("previous_personal")),
        trial=None
        if trial is None
        else Trial(str(trial["execution"]), float(trial["since"]), int(trial["tries_left"])),
        blocked=tuple(parse_digest(bundle) for bundle in tree.get("blocked", ())),
        reverted=None if reverted is None else Reverted(**known(Reverted, reverted)),
    )
