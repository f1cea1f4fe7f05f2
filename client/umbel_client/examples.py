"""Where a device keeps what it learns from: the `ExampleStore` seam, and the store in memory.

Each example has the moment it was added, the person it is about (`subject`, so that a person's data can go at once),
and belongs to training or is held back for judging. Unless it was tagged when it came, that is decided in time: the
newest share is held back, so that a model is judged on what it has not seen yet. Nothing here ever leaves the device.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from umbel.errors import InputMismatch, NotFinite, OutOfBounds

Arrays = Mapping[str, NDArray[Any]]
"""Named arrays whose first dimension is the batch."""

INPUT: Final = "x"
TARGET: Final = "y"
"""Names for a plain array: those of a model with one input and one target."""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """How much a store keeps, and for how long."""

    held_back_share: float = 0.2
    """The newest share of untagged examples, held back for judging."""
    max_examples: int = 100_000
    max_bytes: int = 256 << 20
    max_age_seconds: float = 0.0
    """Older examples go; 0 means never."""

    def __post_init__(self) -> None:
        if not 0 <= self.held_back_share < 1:
            raise OutOfBounds(f"held_back_share is {self.held_back_share}; it must be at least 0 and below 1")


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """Some examples, stacked."""

    inputs: Arrays
    targets: Arrays
    count: int

    def take(self, rows: NDArray[np.intp] | slice) -> Examples:
        """Only these rows, in this order."""
        inputs = {name: array[rows] for name, array in self.inputs.items()}
        targets = {name: array[rows] for name, array in self.targets.items()}
        return Examples(inputs, targets, len(next(iter(inputs.values()), ())))


NONE: Final = Examples({}, {}, 0)


@dataclass(frozen=True, slots=True)
class Split:
    """All examples of a store at one moment, oldest first."""

    training: Examples
    held_back: Examples

    @property
    def count(self) -> int:
        """How many there are in all."""
        return self.training.count + self.held_back.count


@dataclass(frozen=True, slots=True)
class StoreStats:
    """What a store holds."""

    training: int = 0
    held_back: int = 0
    bytes: int = 0
    subjects: Mapping[str, int] = field(default_factory=dict)
    """Examples by subject."""


HeldBack = bool | NDArray[np.bool_] | None
"""For all examples of a batch, or one boolean each."""


class ExampleStore(Protocol):
    """A device's examples."""

    def add(self, inputs: Arrays, targets: Arrays, *, at: float, subject: str = "", held_back: HeldBack = None) -> int:
        """Keep some examples, all or none; returns how many.

        Args:
            inputs: by name, shapes [n, ...].
            targets: by name, shapes [n, ...].
            at: when they were seen, in POSIX seconds.
            subject: whom they are about.
            held_back: True for judging, False for training, None to decide in time; or an array, one boolean each.

        Raises:
            InputMismatch: not one batch, or of another form than the examples here.
            NotFinite: NaN or infinity in them.
        """

    def split(self, now: float) -> Split:
        """All examples, after dropping those that are too old."""

    def stats(self, now: float) -> StoreStats:
        """How much there is."""

    def forget(self, subject: str | None) -> int:
        """Delete all examples about `subject` (None: about anybody), for good; returns how many."""

    def revision(self) -> int:
        """A number that changes whenever the examples do."""

    def forgotten(self) -> int:
        """How often `forget` has deleted something: whoever works on a copy of the examples checks it afterwards."""


@dataclass(frozen=True, slots=True)
class Record:
    """One stored example, without its arrays."""

    key: int
    at: float
    subject: str
    held_back: bool | None
    size: int


def as_arrays(value: Arrays | NDArray[Any], name: str) -> dict[str, NDArray[Any]]:
    """A mapping as it is; a plain array under the name that a model with one input (or target) uses.

    Raises:
        InputMismatch: numbers are masked, and would count as what lies beneath.
    """
    given = value if isinstance(value, Mapping) else {name: value}
    for key, array in given.items():
        _require_unmasked(key, array)
    return {key: np.asarray(array) for key, array in given.items()}


def _require_unmasked(name: str, array: NDArray[Any]) -> None:
    if np.ma.is_masked(array):
        raise InputMismatch(f"{name!r} is masked in parts; fill them, or leave these examples out")


def require_batch(inputs: Arrays, targets: Arrays) -> int:
    """How many examples these are; raises `InputMismatch` or `NotFinite` unless they are examples at all."""
    if not inputs or not targets:
        raise InputMismatch("examples need at least one input and one target")
    sizes = {len(array) if array.ndim else -1 for array in (*inputs.values(), *targets.values())}
    if len(sizes) != 1 or (count := sizes.pop()) < 1:
        raise InputMismatch("the first dimension of inputs and targets must be the same number of examples, at least 1")
    for name, array in (*inputs.items(), *targets.items()):
        _require_unmasked(name, array)
        if array.dtype.kind not in "fiub":
            raise InputMismatch(f"{name!r} is {array.dtype}; examples are made of numbers")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise NotFinite(f"{name!r} holds NaN or infinity; nothing was kept")
    return count


def held_back_tags(held_back: HeldBack, count: int) -> list[bool | None]:
    """One for each example of a batch; raises `InputMismatch` if there are more or fewer."""
    if not isinstance(held_back, np.ndarray):
        return [held_back] * count
    if held_back.dtype != np.bool_ or held_back.shape != (count,):
        raise InputMismatch("`held_back` must be one boolean for each example")
    return [bool(tag) for tag in held_back]


Form = Mapping[str, tuple[str, tuple[int, ...]]]
"""Array name -> dtype and shape of one example; inputs are prefixed "in/", targets "out/"."""


def form_of(inputs: Arrays, targets: Arrays) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What all examples of a store have in common."""
    named = {**{f"in/{k}": v for k, v in inputs.items()}, **{f"out/{k}": v for k, v in targets.items()}}
    return {name: (str(array.dtype), tuple(array.shape[1:])) for name, array in sorted(named.items())}


def require_form(found: Form, wanted: Form) -> None:
    """Raise `InputMismatch`, naming the first difference, unless both forms are the same."""
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise InputMismatch(f"{name!r} is {found.get(name)}, the examples here have {wanted.get(name)}")


def held_back_keys(records: Sequence[Record], share: float) -> set[int]:
    """Which examples are held back: those tagged so, and of the untagged ones the newest share (rounded down)."""
    tagged = {record.key for record in records if record.held_back}
    untagged = sorted((r for r in records if r.held_back is None), key=lambda r: (r.at, r.key))
    return tagged | {record.key for record in untagged[len(untagged) - newest_of(len(untagged), share) :]}


def newest_of(untagged: int, share: float) -> int:
    """How many of so many untagged examples are held back."""
    # A hair above, so that 0.2 of 5 is 1 in binary fractions too.
    return math.floor(untagged * share + 1e-9)


def surplus_keys(records: Sequence[Record], limits: StoreLimits, now: float) -> list[int]:
    """Which examples go: those too old, then the oldest beyond the number or the bytes that are allowed."""
    oldest_first = sorted(records, key=lambda record: (record.at, record.key))
    count, size = len(records), sum(record.size for record in records)
    gone = []
    for record in oldest_first:
        if not is_surplus(limits, count, size, now - record.at):
            break
        gone.append(record.key)
        count, size = count - 1, size - record.size
    return gone


def is_surplus(limits: StoreLimits, count: int, size: float, age: float) -> bool:
    """Whether the oldest of so many examples, with so many bytes in all, has to go; its age in seconds."""
    expired = bool(limits.max_age_seconds) and age > limits.max_age_seconds
    return expired or count > limits.max_examples or size > limits.max_bytes


class Stack:
    """Single examples (without a batch dimension), put one by one into one batch: no second copy of all is ever made.

    Args:
        count: how many there will be.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._filled = 0
        self._batch = NONE

    def put(self, inputs: Arrays, targets: Arrays) -> None:
        """Add the next one; all have the same names, types and shapes."""
        if not self._filled:
            self._batch = Examples(self._room(inputs), self._room(targets), self._count)
        for batch, example in ((self._batch.inputs, inputs), (self._batch.targets, targets)):
            for name, array in example.items():
                batch[name][self._filled] = array
        self._filled += 1

    def whole(self) -> Examples:
        """All of them, in the order in which they came."""
        return self._batch

    def _room(self, example: Arrays) -> dict[str, NDArray[Any]]:
        return {name: np.empty((self._count, *array.shape), array.dtype) for name, array in example.items()}


def stacked(rows: Sequence[tuple[Arrays, Arrays]]) -> Examples:
    """Single examples (without a batch dimension) as one batch."""
    stack = Stack(len(rows))
    for inputs, targets in rows:
        stack.put(inputs, targets)
    return stack.whole()


class MemoryExamples:
    """Examples that live as long as the process: for simulations, and for hosts with a store of their own."""

    def __init__(self, limits: StoreLimits | None = None) -> None:
        self._limits = limits or StoreLimits()
        self._rows: dict[int, tuple[Record, Arrays, Arrays]] = {}
        self._form: Form | None = None
        self._next = 0
        self._revision = 0
        self._forgotten = 0

    def add(self, inputs: Arrays, targets: Arrays, *, at: float, subject: str = "", held_back: HeldBack = None) -> int:
        """Keep some examples; see `ExampleStore`."""
        count = require_batch(inputs, targets)
        tags, form = held_back_tags(held_back, count), form_of(inputs, targets)
        if self._form is not None and self._rows:
            require_form(form, self._form)
        self._form = form
        for row in range(count):
            one_input = {name: np.array(array[row]) for name, array in inputs.items()}
            one_target = {name: np.array(array[row]) for name, array in targets.items()}
            size = sum(array.nbytes for array in (*one_input.values(), *one_target.values()))
            self._rows[self._next] = (Record(self._next, at, subject, tags[row], size), one_input, one_target)
            self._next += 1
        self._revision += 1
        self._drop(surplus_keys(self._records(), self._limits, at))
        return count

    def split(self, now: float) -> Split:
        """All examples; see `ExampleStore`."""
        self._drop(surplus_keys(self._records(), self._limits, now))
        held = held_back_keys(self._records(), self._limits.held_back_share)
        ordered = sorted(self._rows.values(), key=lambda row: (row[0].at, row[0].key))
        return Split(
            stacked([(x, y) for record, x, y in ordered if record.key not in held]),
            stacked([(x, y) for record, x, y in ordered if record.key in held]),
        )

    def stats(self, now: float) -> StoreStats:
        """How much there is; see `ExampleStore`."""
        self._drop(surplus_keys(self._records(), self._limits, now))
        return stats_of(self._records(), self._limits.held_back_share)

    def forget(self, subject: str | None) -> int:
        """Delete examples; see `ExampleStore`."""
        gone = [record.key for record in self._records() if subject is None or record.subject == subject]
        self._drop(gone)
        self._forgotten += bool(gone)
        return len(gone)

    def revision(self) -> int:
        """A number that changes whenever the examples do."""
        return self._revision

    def forgotten(self) -> int:
        """How often `forget` has deleted something."""
        return self._forgotten

    def _records(self) -> list[Record]:
        return [record for record, _, _ in self._rows.values()]

    def _drop(self, keys: Sequence[int]) -> None:
        for key in keys:
            del self._rows[key]
        self._revision += bool(keys)


def stats_of(records: Sequence[Record], share: float) -> StoreStats:
    """Counts over the records of a store."""
    held = len(held_back_keys(records, share))
    subjects: dict[str, int] = {}
    for record in records:
        subjects[record.subject] = subjects.get(record.subject, 0) + 1
    return StoreStats(len(records) - held, held, sum(record.size for record in records), subjects)
