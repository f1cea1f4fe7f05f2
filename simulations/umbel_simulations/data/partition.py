"""Cuts a data set into users: pure functions from labels to rows.

Each gives one array of rows per user; together they hold every row once.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from umbel.errors import OutOfBounds

Rows = list[NDArray[np.intp]]

LEAST: Final = 5
"""Fewest examples of a user: four to learn from, one to judge by."""


def iid(count: int, users: int, chance: np.random.Generator) -> Rows:
    """Deal all rows out evenly, by chance.

    Raises:
        OutOfBounds: too few examples for so many users.
    """
    _require_enough(count, users)
    return [np.sort(part) for part in np.array_split(chance.permutation(count), users)]


def dirichlet(labels: NDArray[Any], users: int, alpha: float, chance: np.random.Generator) -> Rows:
    """Share each label out in proportions from a Dirichlet distribution (Yurochkin et al. 2019, arXiv:1905.12022).

    So users differ in how much they have, too. Hsu et al. (arXiv:1909.06335) draw each user's mixture instead, and give
    all as much.
    Whoever ends up with fewer than `LEAST` examples is given some by those who have most.

    Args:
        labels: one for each row, [N].
        users: how many.
        alpha: concentration; small means few labels each.
        chance: where the proportions come from.

    Raises:
        OutOfBounds: too few examples for so many users.
    """
    _require_enough(len(labels), users)
    parts: list[list[int]] = [[] for _ in range(users)]
    for label in np.unique(labels):
        rows = chance.permutation(np.flatnonzero(labels == label))
        shares = chance.dirichlet(np.full(users, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(np.intp)
        for part, some in zip(parts, np.split(rows, cuts), strict=True):
            part.extend(some.tolist())
    _even_out(parts)
    return [np.sort(np.array(part, np.intp)) for part in parts]


def by_label(labels: NDArray[Any], users: int, labels_per_user: int, chance: np.random.Generator) -> Rows:
    """Sort by label, cut into shards, and deal each user so many of them (McMahan et al. 2017, arXiv:1602.05629).

    A shard that lies across a border holds two labels.

    Raises:
        OutOfBounds: too few examples for so many shards.
    """
    _require_enough(len(labels), users * labels_per_user)
    shuffled = chance.permutation(len(labels))
    rows = shuffled[np.argsort(labels[shuffled], kind="stable")]
    shards = np.array_split(rows, users * labels_per_user)
    dealt = chance.permutation(len(shards)).reshape(users, labels_per_user)
    return [np.sort(np.concatenate([shards[shard] for shard in mine])) for mine in dealt]


def _require_enough(count: int, parts: int) -> None:
    if count < parts * LEAST:
        raise OutOfBounds(
            f"data: {count} examples can't be cut into {parts} parts of at least {LEAST}; ask for fewer users or labels"
        )


def _even_out(parts: list[list[int]]) -> None:
    for part in parts:
        while len(part) < LEAST:
            part.append(max(parts, key=len).pop())
