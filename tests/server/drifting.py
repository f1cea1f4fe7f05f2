"""A model that counts, and rounds of it that are over, for tests that look for drift."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tests.server.driving import BUNDLE
from umbel.bundle import Bundle
from umbel.digests import Digest
from umbel.histograms import Histogram
from umbel.plan import Kind
from umbel.update import Metrics
from umbel_server import round_records
from umbel_server.registry import Registry
from umbel_server.round import Base, Round, RoundKey, RoundState
from umbel_server.store import Store

AGE = Histogram("age", (10.0, 20.0, 30.0))


def counting(*histograms: Histogram) -> Bundle:
    """The smartwatch's bundle, whose manifest says that its metrics count too."""
    bins = [name for histogram in histograms for name in histogram.bins]
    manifest = replace(BUNDLE.manifest, metrics=(*BUNDLE.manifest.metrics, *bins), histograms=histograms)
    return Bundle(manifest, BUNDLE.paths)


def metrics(ages: Sequence[float], worse: float = 0.0, seed: int = 0) -> Metrics:
    """What a cohort of 400 examples measured whose ages lie about as these shares say."""
    chance = np.random.default_rng(seed)
    counts = chance.multinomial(400, ages)
    loss, correct = chance.normal(200.0, 5.0) + 400 * worse, chance.binomial(400, 0.75 - worse)
    told = {"loss": loss, "correct": float(correct), "examples": 400.0}
    return told | dict(zip(AGE.bins, map(float, counts), strict=True))


def write_rounds(
    store: Store,
    registry: Registry,
    measured: Sequence[Metrics],
    task: str,
    first: int = 1,
    bundle: Bundle | None = None,
    state: RoundState = RoundState.COMPLETED,
    kind: Kind = Kind.TRAIN,
) -> None:
    """Rounds that are over, one for each of these sums."""
    based = bundle or counting(AGE)
    registry.keep_successor(based.manifest, {})
    base = Base(1, 1, Digest(based.manifest.digest))
    with store.transaction() as connection:
        for number, sums in enumerate(measured, first):
            opened = Round(RoundKey(task, number, kind), base, 2, 1, 3, 60.0, 1000.0 + number, 1000.0, 2000.0)
            round_records.open_round(connection, opened)
            over = replace(opened, state=state, ended_at=1001.0 + number, weight=1.0, metrics=sums)
            round_records.save(connection, opened, over, 1001.0 + number)
