"""A device doesn't work for a coordinator that shows it something it may not believe."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.client.conftest import Bench
from tests.client.coordinator import retuned
from umbel.bundle import Bundle
from umbel.errors import SignatureInvalid
from umbel.messages import release_to_bytes, signed_to_message
from umbel.plan import Plan
from umbel.release import Release, sign_statement
from umbel_client import Ending, PersonalSettings
from umbel_models.zoo import bundle_path

PLAN = Plan(epochs=1)
PERSONAL = PersonalSettings(epochs=1)


async def test_a_forged_release_ends_the_visit_with_nothing_fetched_or_trained(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    real = bench.coordinator.newest
    assert real is not None
    changed = bytearray(real.statement)
    changed[-1] ^= 1
    bench.coordinator.newest = type(real)(bytes(changed), real.key_id, real.signature)
    visit = await bench.device_with_examples().wake()
    assert visit.ending is Ending.FAILED
    assert isinstance(visit.error, SignatureInvalid)
    assert visit.next_wake - bench.clock.now() >= 3600
    assert bench.channel.calls == ["check_in"]


async def test_a_forged_base_is_not_trained_on(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [PLAN]
    check_in = bench.coordinator.check_in

    def swap_base(message: Any) -> Any:
        answer = check_in(message)
        answer.assignment.base.signature = bytes(64)
        return answer

    bench.coordinator.check_in = swap_base  # type: ignore[method-assign]
    visit = await bench.device_with_examples(personal=PERSONAL).wake()
    assert isinstance(visit.error, SignatureInvalid)
    assert visit.session is not None and visit.session.shape == "-*"
    assert bench.coordinator.updates == {}


async def test_a_base_that_comes_damaged_ends_its_session(bench: Bench) -> None:
    """Nothing has been worked on that would be lost; another device may have a better way."""
    bench.coordinator.publish()
    await bench.device_with_examples(personal=PERSONAL).wake()
    check_in, base = bench.coordinator.check_in, bench.coordinator.publish(labels=tuple("abcdefg"), channel="candidate")
    bench.coordinator.tasks = [PLAN]

    def with_another_base(message: Any) -> Any:
        answer = check_in(message)
        answer.assignment.base.CopyFrom(signed_to_message(base))
        return answer

    bench.coordinator.check_in = with_another_base  # type: ignore[method-assign]
    bench.channel.tamper = lambda digest, data: bytes(len(data))
    visit = await bench.open().wake()
    assert visit.ending is Ending.REFUSED
    assert visit.session is not None and (visit.session.shape, visit.session.error) == ("-*", "digest-mismatch")


async def test_a_manifest_without_end_is_not_fetched(bench: Bench) -> None:
    """Whoever has the online release key could fill a device's disk with one."""
    bench.coordinator.publish()
    (real,) = bench.coordinator.bases.values()
    endless = replace(real, number=2, manifest_size=2**62)
    bench.coordinator.newest = sign_statement(release_to_bytes(endless), bench.coordinator.release_key)
    visit = await bench.open().wake()
    assert visit.error is not None and visit.error.code == "out-of-bounds"
    assert bench.channel.calls == ["check_in"]


async def test_an_old_release_is_not_taken_back(bench: Bench) -> None:
    old = bench.coordinator.publish()
    weights = Bundle.open(bundle_path("smartwatch")).shared_weights()
    bench.coordinator.publish(retuned(weights, 1.01))
    device = bench.open()
    await device.wake()
    bench.coordinator.newest = old
    visit = await bench.open().wake()
    assert visit.error is not None and visit.error.code == "rollback-refused"
    slot = device.kit.shelf.slots.active
    assert slot is not None and slot.number == 2


async def test_a_release_for_another_model_is_refused(bench: Bench) -> None:
    bench.coordinator.publish()
    device = bench.open()
    await device.wake()
    seen = bench.coordinator.bases
    real = next(iter(seen.values()))
    other = Release("other-model", 9, 9, real.channel, real.bundle, real.manifest_size, real.issued_at)
    bench.coordinator.newest = sign_statement(release_to_bytes(other), bench.coordinator.release_key)
    visit = await device.wake()
    assert visit.error is not None and visit.error.code == "not-allowed"
