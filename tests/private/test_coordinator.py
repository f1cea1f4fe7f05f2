"""Private rounds through the whole coordinator: agreed before anyone joins, summed once, patient with the helper."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from tests.databases import new_sqlite
from tests.server.driving import (
    MODEL,
    OPERATOR,
    POPULATION,
    RUNTIME,
    TASK,
    Report,
    SimulatedDevice,
    World,
    task,
    together,
)
from umbel.descriptor import LONGEST_SECONDS, TWO_AGGREGATORS, descriptor_from_bytes
from umbel.digests import digest_of
from umbel.errors import BadInput, CohortTooSmall, MalformedMessage, OutOfBounds, SealBroken, Unreachable, WrongState
from umbel.helper_card import HelperCard
from umbel.plan import Kind, Plan
from umbel.sealing import SEALED, Binding, seal
from umbel.update import Aggregate, Update
from umbel.visit import Assignment, CheckInReply, ReportBegin, Retry
from umbel_client.private import Pinned, PrivacyPolicy, pin, seal_privately, verify_round
from umbel_models.zoo import bundle_path
from umbel_server import task_records
from umbel_server.aggregation import LeaderKey
from umbel_server.blobs import Blobs
from umbel_server.coordinator import Coordinator
from umbel_server.flower.spec import StrategySpec
from umbel_server.helper.core import Helper, HelperPolicy
from umbel_server.helper.local import LocalHelper
from umbel_server.helper.people import People
from umbel_server.helper.port import HelperPort
from umbel_server.helper.records import Records
from umbel_server.monitoring.books import Privacy
from umbel_server.monitoring.others import WatchedHelper
from umbel_server.privacy_settings import PrivacySettings
from umbel_server.round import RoundKey, RoundState
from umbel_server.signing import ReleaseSigner
from umbel_server.store import Store
from umbel_server.surroundings import Surroundings
from umbel_server.turns import AT_HELPER

PRIVATE: dict[str, Any] = {
    "updates_private": True,
    "goal": 4,
    "minimum": 3,
    "rounds": 2,
    "plan": Plan(clip_norm=20.0, max_weight=64.0),
}


class Away:
    """A helper that doesn't answer."""

    def __init__(self, identity: bytes) -> None:
        self.identity = identity

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: object) -> None:
            raise Unreachable("nobody answers")

        return call


class PrivateWorld(World):
    """A coordinator with a helper."""

    def __init__(
        self,
        url: str,
        blobs: Path,
        signer: ReleaseSigner | None = None,
        leader: LeaderKey | None = None,
        records: Records | None = None,
    ) -> None:
        self.records = records or Records()
        self.identity, self.authority = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
        self.helper: HelperPort | None = None
        super().__init__(url, blobs, signer, leader)

    def start(self) -> None:
        self.store = Store.open(self.url, self.plug)
        self.blobs = Blobs(self.blobs_path, self.plug)
        self.people = People(self.records, self.authority, self.clock, 90.0)
        policy = HelperPolicy(self.signer.public_key, minimum_cohort=3)
        core = Helper(self.records, self.identity, self.people.authority, policy, self.clock)
        self.real_helper = LocalHelper(core, self.signer.for_helper())
        self.coordinator = Coordinator(
            self.store,
            self.blobs,
            self.signer,
            self.leader,
            self.clock,
            Surroundings(self.offload, runtime=RUNTIME, helper=self.helper or self.real_helper),
        )

    def let_the_helper(self, *, answer: bool) -> None:
        self.helper = None if answer else Away(self.real_helper.identity)  # type: ignore[assignment]
        self.restart()

    def enrol_private(self, *names: str) -> list[PrivateDevice]:
        self.enrol(*names)
        return [PrivateDevice(self, name, POPULATION) for name in names]

    def round(self, number: int, kind: Kind = Kind.TRAIN) -> Any:
        from umbel_server import round_records

        with self.store.reading() as connection:
            return round_records.load(connection, RoundKey(TASK, number, kind))


class PrivateDevice(SimulatedDevice):
    """Sends shares only."""

    def __init__(self, world: PrivateWorld, name: str, population: str) -> None:
        super().__init__(world, name, population)
        key = Ed25519PrivateKey.generate()
        token = world.people.new_token(population)
        from umbel.participants import prove

        public = key.public_key().public_bytes_raw()
        certificate = world.people.enrol(token, population, public, prove(population, key))
        card = HelperCard("helper:1", world.real_helper.identity, b"", "")
        self.pinned: Pinned = pin(card, key, certificate, world.clock.now())

    async def check_in(self, **changes: Any) -> CheckInReply:
        return await super().check_in(**({"suites": (TWO_AGGREGATORS,)} | changes))

    def report(self, assignment: Assignment, body: Update | bytes | None = None, **changes: Any) -> Report:
        assert assignment.private_round is not None and not isinstance(body, bytes)
        keys = (self.world.signer.public_key, self.pinned.card.identity)
        base = self.world.base_of(assignment)
        policy, now = PrivacyPolicy(minimum_cohort=3), self.world.clock.now()
        descriptor = verify_round(assignment.private_round, assignment, base, POPULATION, keys, policy, now)
        name = f"{self.name}/{assignment.task}/{assignment.round}/{assignment.plan.kind}"
        report_id = digest_of(name.encode())[:32]
        update = body or self.update(assignment)
        sealed = seal_privately(
            descriptor, assignment.private_round, assignment, report_id, update, self.pinned, self.name
        )
        token, digest = assignment.upload_token, digest_of(sealed)
        return Report(ReportBegin(assignment.session_id, report_id, token, len(sealed), digest), sealed)


@pytest.fixture
def world(sqlite_url: str, tmp_path: Path) -> Iterator[PrivateWorld]:
    world = PrivateWorld(sqlite_url, tmp_path / "blobs")
    yield world
    world.store.close()


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody cuts the power here: nothing need be synced."""
    monkeypatch.setattr("umbel_server.blobs.flush", lambda path: None)
    monkeypatch.setattr("umbel_server.store.PRAGMAS", ("journal_mode=WAL", "synchronous=OFF", "foreign_keys=ON"))


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return new_sqlite(tmp_path / "umbel.db")


async def expected_after_one_round(world: PrivateWorld, devices: list[PrivateDevice]) -> np.ndarray:
    from tests.server.driving import SHAPES

    total = Aggregate.zero(SHAPES)
    for device in devices:
        reply = (await device.check_in()).reply
        assert isinstance(reply, Assignment)
        total.accumulate(device.update(reply))
        device.pending = device.report(reply)
    return world.weights().to_vector() + total.mean().to_vector()


async def test_a_private_round_makes_the_version_that_a_plain_one_would(world: PrivateWorld) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE))
    expected = await expected_after_one_round(world, devices)
    assert all(await together(*devices))
    await world.coordinator.tick()
    assert world.round(1).state is RoundState.COMPLETED
    assert world.round(1).metrics["correct"] == 48.0
    np.testing.assert_allclose(world.weights().to_vector(), expected, atol=2e-4)


@pytest.mark.parametrize("is_swept", [False, True], ids=["soon", "later"])
async def test_a_coordinator_that_went_back_to_a_backup_goes_on_above_the_rounds_that_its_helper_has_had(
    world: PrivateWorld, tmp_path: Path, is_swept: bool
) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE | {"rounds": 9, "evaluate_candidates": True}))

    async def goes_on(ticks: int) -> None:
        for _ in range(ticks):
            await together(*devices)
            await world.coordinator.tick()

    await goes_on(3)
    world.store.close()
    places = [(Path(world.url.removeprefix("sqlite:///")), tmp_path / "copy.db"), (world.blobs_path, tmp_path / "copy")]
    for place, copy in places:
        (shutil.copytree if place.is_dir() else shutil.copy)(place, copy)
    world.start()
    await goes_on(6)
    lost = world.coordinator.operations.rounds(TASK)[0].key.number
    assert lost > 2
    world.store.close()
    for place, copy in places:
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        copy.rename(place)
    world.start()
    if is_swept:
        world.records.sweep(world.clock.now() + 10 * LONGEST_SECONDS, LONGEST_SECONDS)
    await goes_on(10)
    numbers = [row.key.number for row in world.coordinator.operations.rounds(TASK) if row.state is RoundState.COMPLETED]
    assert max(numbers) > lost


async def test_a_device_that_only_reads_how_to_seal_seals_nothing_for_the_leader_in_a_private_round(
    world: PrivateWorld,
) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE))
    assignment = await devices[0].assignment()
    assert assignment.sealing.suite == TWO_AGGREGATORS
    with pytest.raises(MalformedMessage, match="umbel-2agg/1"):
        seal(b"an update", assignment.sealing, Binding(TASK, 1, assignment.session_id, "00" * 16, digest_of(b"")))


async def test_candidates_are_measured_privately_too(world: PrivateWorld) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE, evaluate_candidates=True))
    assert all(await together(*devices))
    await world.coordinator.tick()
    assert all(await together(*devices))
    await world.coordinator.tick()
    assert world.round(1, Kind.EVALUATE).metrics["examples"] == 80.0
    assert world.round(1).state is RoundState.COMPLETED


async def test_a_task_without_privacy_or_a_helper_is_never_private_in_name_only(world: PrivateWorld) -> None:
    world.coordinator.private._helper = None
    with pytest.raises(WrongState, match="no helper"):
        world.coordinator.operations.create_task(task(**PRIVATE), OPERATOR)
    assert world.coordinator.operations.tasks() == []


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"plan": Plan(max_weight=64.0)}, OutOfBounds, "clip_norm"),
        ({"minimum": 1}, CohortTooSmall, "minimum"),
        ({"deadline_seconds": 100_000.0}, OutOfBounds, "deadline_seconds"),
        ({"goal": 900_000, "over_selection": 1.1, "privacy": PrivacySettings(ring_bits=16)}, OutOfBounds, "ring_bits"),
        (
            {"privacy": PrivacySettings(ring_bits=16, noise_multiplier=50.0, metric_bound=10.0)},
            OutOfBounds,
            "wider ring",
        ),
        ({"privacy": PrivacySettings(noise_multiplier=9.0, metric_bound=1e6)}, OutOfBounds, "metric_bound"),
    ],
)
async def test_a_private_task_that_can_not_work_is_refused_with_what_to_change(
    world: PrivateWorld, changes: dict[str, Any], error: type[BadInput], words: str
) -> None:
    with pytest.raises(error, match=words):
        world.coordinator.operations.create_task(task(**(PRIVATE | changes)), OPERATOR)


async def test_strategies_that_need_single_updates_are_refused_and_others_named() -> None:
    with pytest.raises(BadInput, match="FedAvg"):
        task(**PRIVATE, strategy=StrategySpec("Krum"))


async def test_a_device_that_sends_in_the_clear_does_not_join_and_one_with_a_helper_joins_nothing_else(
    world: PrivateWorld,
) -> None:
    device = world.enrol_private("a")[0]
    await world.begin(task(**PRIVATE))
    reply = (await device.check_in(suites=(SEALED,))).reply
    assert isinstance(reply, Retry) and TWO_AGGREGATORS in reply.reason


async def test_nobody_joins_before_the_helper_has_agreed(world: PrivateWorld) -> None:
    device = world.enrol_private("a")[0]
    world.let_the_helper(answer=False)
    away = watched(world)
    await world.begin(task(**PRIVATE))
    reply = (await device.check_in()).reply
    assert isinstance(reply, Retry) and "waits for its helper" in reply.reason
    assert away("umbel_helper_up") == 0
    assert away("umbel_helper_calls_total", method="offer_key", error="unreachable") >= 1
    world.let_the_helper(answer=True)
    back = watched(world)
    await world.coordinator.tick()
    assert isinstance((await device.check_in()).reply, Assignment)
    assert back("umbel_helper_up") == 1
    assert back("umbel_helper_calls_total", method="countersign", error="") == 1
    assert back("umbel_helper_seconds_count", method="offer_key") == 1


def watched(world: PrivateWorld) -> Callable[..., float]:
    """Count what the helper is asked, as a coordinator with metrics does; reads one of them."""
    registry = CollectorRegistry()
    world.coordinator.private.watch(lambda helper: WatchedHelper(helper, registry))
    return lambda name, **labels: registry.get_sample_value(name, labels) or 0.0


async def test_prometheus_is_told_what_private_rounds_have_spent(world: PrivateWorld) -> None:
    noisy = PrivacySettings(noise_multiplier=2.0, metric_bound=20.0, epsilon=30.0)
    await world.begin(task(**PRIVATE | {"privacy": noisy}))
    ledger, reader = world.coordinator.operations.privacy(TASK), Privacy(world.coordinator.private)
    for _ in range(2):
        with world.store.reading() as connection:
            told = {
                family.name: family.samples for family in reader.read(connection, task_records.everything(connection))
            }
        assert [sample.value for sample in told["umbel_privacy_epsilon_spent"]] == [ledger.epsilon_spent]
        assert [sample.value for sample in told["umbel_privacy_epsilon_budget"]] == [30.0]
    assert 0 < ledger.epsilon_spent < 30


async def test_a_round_waits_for_a_helper_that_is_away_and_goes_on_when_it_is_back(world: PrivateWorld) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE))
    expected = await expected_after_one_round(world, devices)
    world.let_the_helper(answer=False)
    assert all(await together(*devices))
    for _ in range(3):
        await world.coordinator.tick()
    assert world.round(1).state is RoundState.AGGREGATING
    world.let_the_helper(answer=True)
    await world.coordinator.tick()
    assert world.round(1).state is RoundState.COMPLETED
    np.testing.assert_allclose(world.weights().to_vector(), expected, atol=2e-4)


async def test_the_measuring_of_a_candidate_waits_for_the_helper_too(world: PrivateWorld) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE, evaluate_candidates=True))
    assert all(await together(*devices))
    await world.coordinator.tick()
    world.let_the_helper(answer=False)
    assert all(await together(*devices))
    for _ in range(3):
        await world.coordinator.tick()
    assert world.round(1, Kind.EVALUATE).state is RoundState.AGGREGATING
    world.let_the_helper(answer=True)
    await world.coordinator.tick()
    assert world.round(1).state is RoundState.COMPLETED


async def test_what_a_round_waits_for_is_told_once_and_shown_for_as_long_as_it_waits(world: PrivateWorld) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE))
    operations = world.coordinator.operations
    assert operations.rounds()[0].reason == ""
    world.let_the_helper(answer=False)
    operations = world.coordinator.operations
    assert all(await together(*devices))
    with capture_logs() as logs:
        for _ in range(3):
            await world.coordinator.tick()
    assert [entry["event"] for entry in logs] == ["a round waits for the helper"]
    waiting = "waits for the helper: nobody answers"
    assert operations.round(TASK, 1).reason == waiting
    assert [held.reason for held in (*operations.rounds(), *operations.status().open_rounds)] == [waiting] * 2
    for asked in ("offer_key", "countersign", "prepare", "commit"):
        setattr(world.helper, asked, getattr(world.real_helper, asked))
    with capture_logs() as logs:
        await world.coordinator.tick()
    assert logs[0]["event"] == "the helper has answered, the round goes on"
    assert [held.reason for held in operations.rounds()] == ["", ""]


async def test_a_round_that_the_helper_refuses_waits_in_words_and_no_tick_fails(world: PrivateWorld) -> None:
    """A policy made stricter since: a traceback at each tick, and longer and longer pauses for all other tasks."""
    core = world.real_helper._helper
    core.policy = replace(core.policy, populations=("ankles",))
    with capture_logs() as logs:
        await world.begin(task(**PRIVATE))
        await world.coordinator.tick()
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert "doesn't help population 'wrists'" in world.coordinator.operations.round(TASK, 1).reason


async def test_a_helper_that_hangs_holds_up_no_other_task(world: PrivateWorld) -> None:
    """Its call may take ten minutes; until then nobody's rounds were closed."""
    hangs = asyncio.Event()

    async def offload(function: Callable[..., Any], *arguments: Any) -> Any:
        if function == world.coordinator.private.ask:
            await hangs.wait()
        return function(*arguments)

    world.offload = offload
    world.restart()
    operations = world.coordinator.operations
    operations.add_model("another", bundle_path(MODEL), OPERATOR)
    operations.create_task(task(**PRIVATE), OPERATOR)
    operations.create_task(replace(task(), name="plain", population="ankles", model="another"), OPERATOR)
    await world.coordinator.tick(patience=0.01)
    await world.coordinator.tick(patience=0.01)
    assert {held.key.task for held in operations.rounds()} == {TASK, "plain"}
    hangs.set()
    await world.coordinator.tick()
    assert not world.coordinator.runner(TASK).waits_for_helper


async def test_few_threads_wait_for_a_helper_that_hangs_however_many_tasks_ask_it(world: PrivateWorld) -> None:
    """The others are there for devices."""
    hangs, asking = asyncio.Event(), list[str]()

    async def offload(function: Callable[..., Any], *arguments: Any) -> Any:
        if function == world.coordinator.private.ask:
            asking.append(arguments[0].task.name)
            await hangs.wait()
        return function(*arguments)

    world.offload = offload
    world.restart()
    operations, names = world.coordinator.operations, [f"task-{number}" for number in range(AT_HELPER + 1)]
    for name in names:
        operations.add_model(name, bundle_path(MODEL), OPERATOR)
        operations.create_task(replace(task(**PRIVATE), name=name, population=name, model=name), OPERATOR)
    for _ in range(2):
        await world.coordinator.tick(patience=0.01)
    assert len(asking) == AT_HELPER
    hangs.set()
    await world.coordinator.tick()
    assert not any(world.coordinator.runner(name).waits_for_helper for name in names)


async def test_a_helper_that_never_comes_back_costs_the_round_and_its_shares_are_deleted(world: PrivateWorld) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE))
    assert await devices[0].visit()
    world.let_the_helper(answer=False)
    assert all(await together(*devices[1:]))
    await world.coordinator.tick()
    before = world.weights()
    assert list(world.blobs.spool.glob("**/*.bin")) or any(world.blobs.spool.rglob("*"))
    agreed = descriptor_from_bytes(world.coordinator.private.find(RoundKey(TASK, 1)).signed.statement)  # type: ignore[union-attr]
    world.clock.instant = agreed.not_after + 1
    await world.coordinator.tick()
    assert world.round(1).state is RoundState.FAILED
    assert world.weights() == before
    assert not [path for path in world.blobs.spool.rglob("*") if path.is_file()]


async def test_the_leader_restarts_between_any_two_reports_and_sums_the_same(world: PrivateWorld) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE))
    expected = await expected_after_one_round(world, devices)
    for device in devices:
        assert await device.visit()
        world.restart()
    await world.coordinator.tick()
    np.testing.assert_allclose(world.weights().to_vector(), expected, atol=2e-4)


async def test_a_broken_report_is_refused_and_the_round_goes_on_without_it(world: PrivateWorld) -> None:
    devices = world.enrol_private("a", "b", "c", "d", "e")
    await world.begin(task(**PRIVATE))
    report = devices[0].report(await devices[0].assignment())
    spoilt = report.sealed[:-1] + bytes([report.sealed[-1] ^ 1])
    begin = ReportBegin(
        report.begin.session_id, report.begin.report_id, report.begin.upload_token, len(spoilt), digest_of(spoilt)
    )
    with pytest.raises(SealBroken):
        await devices[0].send(Report(begin, spoilt))
    assert all(await together(*devices[1:]))
    await world.coordinator.tick()
    assert world.round(1).state is RoundState.COMPLETED


async def test_a_cohort_that_the_helper_finds_too_small_costs_the_round_only(world: PrivateWorld) -> None:
    devices = world.enrol_private("a", "b", "c", "d")
    await world.begin(task(**PRIVATE))
    for device in devices[:2]:
        world.people.revoke(device.pinned.certificate.public_key)
    assert all(await together(*devices))
    await world.coordinator.tick()
    assert world.round(1).state is RoundState.FAILED
    assert "cohort-too-small" in world.round(1).reason


async def test_a_device_that_was_in_as_many_sums_as_one_may_be_is_not_asked_again_and_costs_no_round(
    world: PrivateWorld,
) -> None:
    once = PrivacySettings(noise_multiplier=0.01, metric_bound=100.0, rounds_per_device=1)
    await world.begin(task(**PRIVATE | {"privacy": once}))
    first, others = world.enrol_private("a", "b", "c", "d"), world.enrol_private("e", "f", "g", "h")
    assert all(await together(*first))
    await world.coordinator.tick()
    world.restart()
    reply = (await first[0].check_in()).reply
    assert isinstance(reply, Retry)
    assert "as many sums as one may be in" in reply.reason
    assert not any(await together(*first)), "the helper would leave their reports out"
    assert all(await together(*others))
    await world.coordinator.tick()
    assert [world.round(number).state for number in (1, 2)] == [RoundState.COMPLETED] * 2


async def test_a_round_that_came_to_no_sum_uses_nobody_up(world: PrivateWorld) -> None:
    once = PrivacySettings(noise_multiplier=0.01, metric_bound=100.0, rounds_per_device=1)
    await world.begin(task(**PRIVATE | {"privacy": once}))
    devices = world.enrol_private("a", "b", "c", "d")
    for device in devices[:2]:
        world.people.revoke(device.pinned.certificate.public_key)
    assert all(await together(*devices))
    await world.coordinator.tick()
    assert world.round(1).state is RoundState.FAILED
    assert isinstance((await devices[3].check_in()).reply, Assignment)


async def test_the_descriptor_is_told_again_after_a_crash_between_signature_and_store(world: PrivateWorld) -> None:
    await world.begin(task(**PRIVATE))
    first = world.coordinator.private.find(RoundKey(TASK, 1))
    with world.store.transaction() as connection:
        from umbel_server.tables import PRIVATE_ROUNDS

        connection.execute(PRIVATE_ROUNDS.delete())
    world.restart()
    await world.coordinator.tick()
    assert world.coordinator.private.find(RoundKey(TASK, 1)) == first
