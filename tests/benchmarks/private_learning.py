"""What secret sums cost in accuracy: the demo's recipe on its twenty wearers, its rounds summed in several ways.

Everything is as in `learning`; only the sum differs. A secret one goes through the round's own descriptor and the
device's encoder: clipped, selected, rotated, rounded into the ring, added modulo 2^k. Masks fall out of any sum to the
bit, so that they are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import mean

import numpy as np

from tests.benchmarks import learning
from tests.benchmarks.harness import Table
from umbel.clip_vote import WITHIN_CLIP, share_within
from umbel.descriptor import RoundDescriptor, layout_of, weight_steps
from umbel.discrete_gaussian import discrete_gaussian
from umbel.plan import Plan
from umbel.randomness import generator
from umbel.ring import dequantise
from umbel.secure_sum import encode_update
from umbel.shares import HelperTotal, LeaderShare, LeaderTotal
from umbel.update import Aggregate, Update
from umbel.weights import Weights
from umbel_client.trainer import Job, train
from umbel_server.adaptive_clip import first_clip, next_clip
from umbel_server.aggregation import Presummed
from umbel_server.flower import StrategySpec, apply
from umbel_server.privacy import propose
from umbel_server.privacy_settings import PrivacySettings
from umbel_server.round import Base, Round, RoundKey
from umbel_server.task import Task

PLAN = Plan(epochs=2, batch_size=16, max_weight=500.0, clip_norm=4.0, hyperparameters={"lr": 0.1})
"""As in the demo's task.toml."""
STRATEGY = StrategySpec("FedAvgM", {"server_momentum": 0.8})
ROUNDS = 20
SEEDS = (1, 2, 3)
_NOISE = PrivacySettings(noise_multiplier=0.05, metric_bound=500.0)
"""Nothing to promise anybody: with twenty devices, any noise that means something drowns all."""
WAYS: dict[str, PrivacySettings | None] = {
    "plain": None,
    "secret, 32 bits (the demo's)": PrivacySettings(),
    "secret, 16 bits, rotated": PrivacySettings(ring_bits=16),
    "secret, 16 bits, rotated, half of the weights": PrivacySettings(ring_bits=16, sent_share=0.5),
    "secret, 16 bits, rotated, a quarter of the weights": PrivacySettings(ring_bits=16, sent_share=0.25),
    "secret, noise 0.05, clip 4": _NOISE,
    "secret, noise 0.05, clip moves to the median": replace(_NOISE, clip_quantile=0.5),
}


def run() -> Table:
    rows: list[tuple[str | float, ...]] = []
    scores: dict[str, float] = {}
    for title, settings in WAYS.items():
        found = [_trained(settings, seed) for seed in SEEDS]
        shares = [learning.accuracies(one.weights).overall for one in found]
        scores[title] = mean(shares)
        rows.append((title, scores[title], min(shares), max(shares), found[-1].bytes_per_weight, found[-1].clip))
    difference = 100 * (scores["plain"] - scores["secret, 32 bits (the demo's)"])
    ratios = {"points from plain to secret, 32 bits": difference}
    ratios["points from plain to secret, 16 bits, rotated"] = 100 * (
        scores["plain"] - scores["secret, 16 bits, rotated"]
    )
    columns = ("sum", "mean accuracy", "least", "most", "bytes/weight", "last clip")
    aims = {"points from plain to secret, 32 bits": ("<=", 1.0)}
    title = f"Learning with secret sums: the demo's recipe, {ROUNDS} rounds, {len(SEEDS)} seeds"
    return Table(title, columns, rows, ratios, aims)


@dataclass(frozen=True, slots=True)
class _Trained:
    weights: Weights
    bytes_per_weight: float
    clip: float


def _trained(settings: PrivacySettings | None, seed: int) -> _Trained:
    current, state, sent = learning.START, b"", 4.0
    plan = replace(PLAN, seed=seed)
    clip = (first_clip(settings, plan) if settings else None) or plan.clip_norm
    for number in range(1, ROUNDS + 1):
        updates = {name: _update(plan, name, number, current) for name in learning.wearers()}
        total = Aggregate.zero(current.shapes)
        if settings is None:
            for update in updates.values():
                total.accumulate(replace(update, delta=update.delta.clipped(plan.clip_norm)))
        else:
            descriptor = _descriptor(settings, plan, number, len(updates), clip)
            total, within = _secret_sum(descriptor, plan, updates, number)
            sent = layout_of(descriptor).size / current.size
            clip = clip if within is None else next_clip(clip, within, settings, plan)
        current, state = apply(STRATEGY, state, current, Presummed(total), number)
    return _Trained(current, sent, clip)


def _update(plan: Plan, name: str, number: int, base: Weights) -> Update:
    examples = learning.wearers()[name].training
    done = train(Job(plan, "secret", number, name), learning.BUNDLE, base, examples, learning.RUNTIME, learning.CLOCK)
    return Update(done.weights - base, min(float(examples.count), plan.max_weight), {})


def _descriptor(settings: PrivacySettings, plan: Plan, number: int, devices: int, clip: float) -> RoundDescriptor:
    task = Task("secret", "watches", "smartwatch", plan, privacy=settings)
    base = Base(1, 1, learning.BUNDLE.manifest.digest)
    held = Round(RoundKey("secret", number), base, devices, 2, devices, 600.0, 0.0, 600.0, 600.0)
    return propose(task, held, ("loss",), learning.START.size, (bytes(32), bytes([1]) * 32), clip)


def _secret_sum(
    descriptor: RoundDescriptor, plan: Plan, updates: dict[str, Update], number: int
) -> tuple[Aggregate, float | None]:
    layout = layout_of(descriptor)
    total, noise = LeaderTotal(layout), HelperTotal(layout)
    for name, update in updates.items():
        chance = generator("rounding", plan.seed, number, name)
        weight = weight_steps(update.weight, plan, descriptor)
        clear = encode_update(descriptor, update.delta.to_vector(), weight, {}, chance)
        total.add(LeaderShare(layout, clear.raw))
    entropy = generator("noise", plan.seed, number).bytes
    if descriptor.noise_variance:
        noise.add_number_noise(discrete_gaussian(descriptor.noise_variance, noise.numbers.size, entropy), 0)
    within = None
    for index, lane in enumerate(descriptor.lanes, start=1):
        if lane.noise_variance:
            noise.add_noise(index, discrete_gaussian(lane.noise_variance, 1, entropy))
    clear_sum = total.plus(noise)
    if descriptor.lanes[-1].name == WITHIN_CLIP:
        within = share_within(float(clear_sum.lanes[-1].astype(np.int64)) / (1 << 16), len(updates))
    numbers = descriptor.transform.backward(dequantise(clear_sum.numbers, 1.0 / descriptor.scale))
    return Aggregate(learning.START.shapes, numbers, float(clear_sum.lanes[0]), len(updates), {}), within
