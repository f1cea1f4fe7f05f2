"""Gates that are looked at again and again, beside rules of thumb; and what a release listing costs a device."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

import numpy as np

from tests.benchmarks.harness import Table, seconds
from umbel.digests import digest_of
from umbel.listing import ListedRelease
from umbel_client.listing import Listing
from umbel_server.evidence import above_evidence, share_evidence
from umbel_server.gates import TESTS, GatePolicy
from umbel_server.keyring import Keyring
from umbel_server.repository import Repository, role_of

RUNS, DEVICES, LOOK_EVERY, ALPHA = 1000, 2000, 20, 0.01
TARGETS = 100
NOW = 1_790_000_000.0


def run() -> Table:
    rows: list[tuple[str | float, ...]] = []
    ratios: dict[str, float] = {}
    for usual, canary in ((0.02, 0.02), (0.045, 0.045), (0.02, 0.04), (0.02, 0.08)):
        for rule, (share, median) in _simulate(usual, canary).items():
            rows.append((f"{rule}: {usual:.1%} -> {canary:.1%}", share, median))
            if rule == "e-process":
                ratios[f"stopped at {usual:.1%} -> {canary:.1%}"] = share
    figures = _listing()
    ratios |= figures
    aims = {
        "stopped at 2.0% -> 2.0%": ("<=", 0.005),
        "stopped at 4.5% -> 4.5%": ("<=", 0.005),
        "stopped at 2.0% -> 8.0%": (">=", 1.0),
        "bytes of a check without news": ("<=", 1_000.0),
        "milliseconds of a check without news": ("<=", 10.0),
        "kilobytes of a cold start, 100 releases": ("<=", 40.0),
    }
    columns = ("rule and failure shares", "stopped", "devices (median)")
    title = f"Gates: {RUNS} rollouts, up to {DEVICES} canaries and as many controls, a look every {LOOK_EVERY}"
    return Table(title, columns, rows, ratios, aims)


def _simulate(usual: float, canary: float) -> dict[str, tuple[float, str | float]]:
    """Rule -> how many of the rollouts it stops, and after how many canaries."""
    chance = np.random.Generator(np.random.PCG64(20))
    looks = np.arange(LOOK_EVERY, DEVICES + 1, LOOK_EVERY)
    stops: dict[str, list[int]] = {"e-process": [], "z-test at each look": [], "above 5 %, 50 devices or more": []}
    for _ in range(RUNS):
        failed = np.cumsum(chance.random(DEVICES) < canary)[looks - 1]
        control = np.cumsum(chance.random(DEVICES) < usual)[looks - 1]
        counts = list(zip(map(int, failed), map(int, control), map(int, looks), strict=True))
        wealth = np.array([_failure_evidence(a, b, n) for a, b, n in counts])
        pooled = (failed + control) / (2 * looks)
        spread = np.sqrt(np.maximum(pooled * (1 - pooled) * 2 / looks, 1e-12))
        _note(stops["e-process"], looks, wealth >= TESTS / ALPHA)
        _note(stops["z-test at each look"], looks, (failed - control) / looks / spread > 2.3263)
        _note(stops["above 5 %, 50 devices or more"], looks, (failed / looks > 0.05) & (looks >= 50))
    return {rule: (len(at) / RUNS, float(np.median(at)) if at else "never") for rule, at in stops.items()}


def _failure_evidence(ours: int, theirs: int, devices: int) -> float:
    """As `umbel_server.gates.failure_evidence` has it, by counts."""
    return min(share_evidence(ours, theirs, 1.0), above_evidence(ours, devices, GatePolicy().expected_failure_share))


def _note(stops: list[int], looks: np.ndarray, fires: np.ndarray) -> None:
    first = np.flatnonzero(fires)
    if len(first):
        stops.append(int(looks[first[0]]))


def _listing() -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        repository = _repository(Path(folder))
        sent: list[int] = []

        async def fetch(name: str, limit: int) -> bytes:
            data = repository.file(name)
            sent.append(len(data))
            return data

        device = Listing(Path(folder) / "device", repository.first_root)
        asyncio.run(device.find(fetch, NOW, "model", 1))
        cold = sum(sent)
        sent.clear()
        spent = min(seconds(lambda: asyncio.run(device.find(fetch, NOW, "model", 1))) for _ in range(20))
        return {
            "kilobytes of a cold start, 100 releases": cold / 1000,
            "bytes of a check without news": sum(sent) / 20,
            "milliseconds of a check without news": spent * 1000,
        }


def _repository(folder: Path) -> Repository:
    keys = Keyring.create(folder / "keys")
    repository = Repository.create(folder / "listing", keys, NOW)
    role = role_of("model")
    signers = [signer.public_key for signer in keys.add(role)]
    repository.publish("targets", repository.sign(repository.draft_signers("model", signers, NOW), "targets"), NOW)
    repository.publish(role, repository.sign(repository.draft_empty("model", NOW), role), NOW)
    releases = [
        ListedRelease("model", number, number, "stable", digest_of(str(number).encode()), 4000)
        for number in range(1, TARGETS + 1)
    ]
    repository.publish(role, repository.sign(repository.draft_releases(releases, NOW), role), NOW)
    return repository
