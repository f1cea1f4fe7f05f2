"""A device takes a release over unless it serves it worse, and answers with the better of two forms."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.client.conftest import LEARNS, Bench, learnt_from_anna
from tests.client.coordinator import held_files, retuned
from tests.client.recordings import recordings
from umbel.bundle import Bundle, file_refs
from umbel.digests import digest_of
from umbel.errors import InputMismatch
from umbel.messages import release_to_bytes
from umbel.plan import Plan
from umbel.release import Release, sign_statement
from umbel.visit import Outcome
from umbel_client import ALWAYS, Device, Ending, IdlePolicy, PersonalSettings
from umbel_client.agent import status_of
from umbel_client.personal import Comparison, score
from umbel_models.zoo import bundle_path

PACKAGED = Bundle.open(bundle_path("smartwatch"))


def compared(release: float | None, tuned: float | None, present: float | None) -> Comparison:
    return Comparison(release, tuned, present, 20, None)


@pytest.mark.parametrize(
    ("release", "tuned", "present", "worse", "personal"),
    [
        (0.8, 0.9, 0.7, False, True),
        (0.9, 0.8, 0.7, False, False),
        (0.8, 0.8, 0.8, False, False),
        (0.5, 0.84, 0.9, True, True),
        (0.5, 0.86, 0.9, False, True),
        (0.5, None, 0.9, True, False),
        (0.5, 0.6, None, False, True),
        (None, None, None, False, False),
        (None, None, 0.9, False, False),
    ],
)
def test_the_accept_test(
    release: float | None, tuned: float | None, present: float | None, worse: bool, personal: bool
) -> None:
    found = compared(release, tuned, present)
    assert found.worse_than_present(0.05) is worse
    assert found.personal_wins is personal


def test_accuracy_counts_where_there_is_one_and_loss_where_not() -> None:
    assert score({"loss": 4.0, "correct": 3.0, "examples": 4.0}) == 0.75
    assert score({"loss": 4.0, "examples": 2.0}) == -2.0
    assert score({}) is None


async def accuracy(device: Device, shift: int = 0) -> float:
    inputs, classes = recordings(35, "fresh", shift=shift)
    return float((device.predict(inputs)["logits"].argmax(-1) == classes).mean())


async def test_a_device_makes_a_release_its_own(bench: Bench) -> None:
    bench.coordinator.publish()
    device = bench.open(personal=LEARNS)
    device.learn_from(*recordings(100, "mine", shift=3))
    await device.wake()
    assert device.answers_with == "personal, from release 1"
    assert await accuracy(device, shift=3) > 0.9
    scores = device.kit.memory.state.scores
    assert scores.personal is not None and scores.global_ is not None and scores.personal > scores.global_
    assert bench.open().answers_with == "personal, from release 1"


async def test_a_release_of_a_newer_compiler_is_made_its_own_too(bench: Bench) -> None:
    """A manifest may say more than this device understands: its bundle goes by the bytes that were signed."""
    bench.coordinator.publish()
    manifest = json.dumps(json.loads(PACKAGED.manifest.to_bytes()) | {"since_then": ["something", "new"]}).encode()
    bench.coordinator.blobs[digest_of(manifest)] = manifest
    release = Release("smartwatch", 2, 2, "stable", digest_of(manifest), len(manifest), bench.clock.now())
    bench.coordinator.newest = sign_statement(release_to_bytes(release), bench.coordinator.release_key)
    device = bench.open(personal=LEARNS)
    device.learn_from(*recordings(100, "mine", shift=3))
    await device.wake()
    assert device.answers_with == "personal, from release 2"


async def test_a_worse_release_is_turned_down_and_the_own_model_stays(bench: Bench) -> None:
    bench.coordinator.publish()
    device = bench.open(personal=LEARNS)
    device.learn_from(*recordings(100, "mine"))
    await device.wake()
    bench.coordinator.publish(retuned(PACKAGED.shared_weights(), 0.0))
    settings = replace(LEARNS, epochs=0)
    device = bench.open(personal=settings)
    visit = await device.wake()
    assert visit.release is not None and visit.release.outcome is Outcome.KEPT_OWN
    assert "held-back" in visit.release.reason
    assert device.answers_with == "personal, from release 1"
    assert await accuracy(device) > 0.9
    assert (await device.wake()).release is None


async def test_a_release_that_does_not_answer_here_as_it_did_there_is_turned_down(bench: Bench) -> None:
    bench.coordinator.publish()
    device = bench.open()
    await device.wake()
    signed = _release_with_foreign_weights(bench)
    bench.coordinator.newest = signed
    visit = await device.wake()
    assert visit.release is not None and visit.release.outcome is Outcome.FAILED
    assert visit.release.reason.startswith("golden-mismatch")
    assert visit.ending is Ending.RESTED
    assert device.answers_with == "release 1"
    await device.wake()
    assert [outcome.outcome for outcome in bench.coordinator.check_ins[-1].outcomes] == [Outcome.FAILED]
    await device.wake()
    assert bench.coordinator.check_ins[-1].outcomes == ()


def _release_with_foreign_weights(bench: Bench) -> Any:
    odd = retuned(PACKAGED.shared_weights(), 3.0).to_bytes()
    files = {**PACKAGED.manifest.files, **file_refs({"weights.safetensors": odd})}
    manifest = replace(PACKAGED.manifest, files=files)
    for data in (odd, manifest.to_bytes()):
        bench.coordinator.blobs[digest_of(data)] = data
    size = len(manifest.to_bytes())
    release = Release(manifest.model, 2, 2, "stable", manifest.digest, size, bench.clock.now())
    return sign_statement(release_to_bytes(release), bench.coordinator.release_key)


async def test_damage_on_the_way_is_told_and_tried_again(bench: Bench) -> None:
    bench.coordinator.publish()
    device = bench.open()
    bench.channel.tamper = lambda digest, data: bytes(len(data))
    visit = await device.wake()
    assert visit.release is not None and visit.release.outcome is Outcome.FAILED
    bench.channel.tamper = lambda digest, data: data
    visit = await device.wake()
    assert visit.release is not None and visit.release.outcome is Outcome.ADOPTED


async def test_a_damaged_shelf_is_mended_at_the_next_visit(bench: Bench) -> None:
    bench.coordinator.publish()
    device = bench.open()
    await device.wake()
    slot = device.kit.shelf.slots.active
    assert slot is not None
    device.kit.shelf.bundle(slot.bundle, "onnx").paths["weights.safetensors"].write_bytes(b"rotten")
    device = bench.open()
    assert device.answers_with == ""
    await device.wake()
    assert device.answers_with == "release 1"


async def test_new_examples_make_a_new_personal_model_without_a_new_release(bench: Bench) -> None:
    bench.coordinator.publish()
    device = bench.open(personal=LEARNS)
    await device.wake()
    assert device.answers_with == "release 1"
    device.learn_from(*recordings(100, "mine", shift=2))
    await device.wake()
    assert device.answers_with == "personal, from release 1"
    await device.wake()
    assert bench.coordinator.check_ins[-1].outcomes == ()


async def test_forgetting_a_person_drops_what_was_learnt_from_them_at_once(bench: Bench) -> None:
    device = await learnt_from_anna(bench)
    own = device.kit.shelf.slots.personal
    assert own is not None
    assert device.forget("anna") == 70
    assert device.answers_with == "release 1"
    names = {path.name for path in held_files(bench.home)}
    assert not names & {own.weights, "sealed.bin", "session.json", "progress.safetensors"}
    await device.wake()
    assert bench.coordinator.updates == {}


async def test_forgetting_during_a_visit_throws_its_work_away(bench: Bench) -> None:
    bench.coordinator.publish()
    device = bench.device_with_examples(personal=PersonalSettings(epochs=0))
    await device.wake()
    bench.coordinator.tasks = [Plan(epochs=1)]
    looks = iter(range(100))

    class Nosy:
        def read(self) -> Any:
            if next(looks) == 2:
                device.kit.examples.forget(None)
            return bench.status.read()

    device = bench.open(personal=PersonalSettings(epochs=0), status=Nosy())
    visit = await device.wake()
    assert visit.ending is Ending.INTERRUPTED
    assert "deleted" in str(visit.error)
    assert bench.coordinator.updates == {}


async def test_personal_examples_never_leave_the_device(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [Plan(epochs=1, batch_size=8)]
    sent: list[bytes] = []
    device = bench.open(personal=LEARNS)
    inputs, classes = recordings(40, "mine")
    device.learn_from(inputs, classes, subject="anna")
    report, check_in = bench.channel.report, bench.coordinator.check_in
    bench.channel.report = lambda begin, sealed: sent.append(sealed) or report(begin, sealed)  # type: ignore[method-assign, func-returns-value]
    bench.coordinator.check_in = lambda message: sent.append(message.SerializeToString()) or check_in(message)  # type: ignore[method-assign, func-returns-value]
    await device.wake()
    assert len(sent) == 2
    everything = b"".join(sent)
    assert b"anna" not in everything
    assert all(row.tobytes() not in everything for row in inputs[:, 0, :4])


async def test_a_stopped_accept_test_is_made_again(bench: Bench) -> None:
    bench.coordinator.publish()
    policy = IdlePolicy(require_power=False, require_unmetered=False, max_temperature=None, min_free_bytes=0)
    bench.status.tell(idle=True)
    device = bench.device_with_examples(personal=LEARNS, policy=policy)
    looks = iter(range(100))

    class Briefly:
        def read(self) -> Any:
            return replace(bench.status.read(), idle=next(looks) < 3)

    visit = await bench.open(personal=LEARNS, policy=policy, status=Briefly()).wake()
    assert visit.ending is Ending.INTERRUPTED
    assert device.kit.shelf.slots.active is None
    visit = await bench.open(personal=LEARNS, policy=ALWAYS).wake()
    assert visit.release is not None and visit.release.outcome is Outcome.ADOPTED


async def test_what_does_not_fit_the_model_is_refused_where_it_is_handed_over(bench: Bench) -> None:
    bench.coordinator.publish()
    device = bench.open()
    await device.wake()
    with pytest.raises(InputMismatch, match="6, 100"):
        device.learn_from(np.zeros((3, 6, 99), np.float32), np.zeros(3, np.int64))
    with pytest.raises(InputMismatch):
        device.predict(np.zeros((3, 6, 100)))
    with pytest.raises(InputMismatch):
        device.predict({"z": np.zeros((3, 6, 100), np.float32)})
    for label in (-1, len(PACKAGED.manifest.labels)):
        with pytest.raises(InputMismatch, match=f"holds {label}; this model has labels 0 to 6"):
            device.learn_from(np.zeros((2, 6, 100), np.float32), np.array([0, label]))
    assert device.kit.examples.stats(0.0).training == 0


@pytest.mark.parametrize("labels", [PACKAGED.manifest.labels, ()], ids=["by labels", "by the graph"])
async def test_examples_that_a_model_cannot_use_are_left_out_and_told(bench: Bench, labels: tuple[str, ...]) -> None:
    bench.coordinator.publish(labels=labels)
    bench.coordinator.tasks = [Plan(), Plan()]
    device = bench.device_with_examples(20, personal=PersonalSettings(epochs=1))
    x, y = recordings(1)
    device.learn_from(x, y + 100, subject="typo", held_back=True)
    device.learn_from(x, y + 100, subject="typo", held_back=False)
    visit = await device.wake()
    assert visit.ending is Ending.CONTRIBUTED and device.answers_with
    assert visit.reasons == ("examples left out, as their numbers aren't the model's: 2",)
    assert status_of(device)["examples"]["left_out"] == 2
    with_them = next(iter(bench.coordinator.updates.values()))
    device.forget("typo")
    bench.clock.instant = visit.next_wake
    again = await device.wake()
    assert again.ending is Ending.CONTRIBUTED and not again.reasons
    assert list(bench.coordinator.updates.values())[1].weight == with_them.weight


async def test_examples_none_of_which_a_model_can_use_are_named(bench: Bench) -> None:
    bench.coordinator.publish()
    bench.coordinator.tasks = [Plan()]
    device = bench.open()
    device.learn_from(recordings(3)[0], np.array([7, 7, 7]))
    refused = await device.wake()
    assert isinstance(refused.error, InputMismatch)
    assert refused.release is not None and refused.release.outcome is Outcome.FAILED
    for told in (str(refused.error), refused.release.reason):
        assert "target 'y' holds 7; this model has labels 0 to 6" in told


async def test_probabilities_are_ranked_by_label_and_sum_to_one(bench: Bench) -> None:
    bench.coordinator.publish()
    device = bench.open()
    await device.wake()
    for row in device.probabilities(recordings(3)[0]):
        assert set(row) == set(PACKAGED.manifest.labels)
        assert sum(row.values()) == pytest.approx(1.0)
        assert list(row.values()) == sorted(row.values(), reverse=True)
