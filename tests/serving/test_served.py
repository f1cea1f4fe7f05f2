"""Which version answers: names, what is kept loaded, and what happens while something loads."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.serving.asking import BUNDLE, INPUTS
from umbel.bundle import Bundle, file_refs, write_bundle
from umbel.digests import Digest
from umbel.errors import InputMismatch, ModelUnusable, NotFound, Unavailable
from umbel.golden import GoldenExamples
from umbel.listing import ListedRelease
from umbel.manifest import GOLDEN_FILE
from umbel.runtime.onnx import OnnxRuntime
from umbel_server.serving.catalogue import Catalogue, Offered
from umbel_server.serving.inference import ANSWERED, Inference, Inferred, Question
from umbel_server.serving.served import AGAIN_SECONDS, SPARE, ServedModels

RUNTIME = OnnxRuntime()


def release(number: int, version: int, channel: str = "stable") -> ListedRelease:
    return ListedRelease("m", number, version, channel, Digest(f"{version:064x}"), 100)


def offered(heads: dict[str, int], *releases: ListedRelease) -> Catalogue:
    return Catalogue({"m": Offered.of({one.number: one for one in releases}, heads)})


class Clock:
    at = 1000.0

    def now(self) -> float:
        return self.at


class Shelf:
    """Bundles by digest: the packaged one for each, counted; what `broken` names isn't there."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.broken: set[int] = set()
        self.away = False
        self.bundle = BUNDLE
        self.slow: set[int] = set()
        """Those that wait for `going_on`; none for all."""
        self.going_on = threading.Event()
        self.going_on.set()

    def __call__(self, digest: Digest) -> Bundle:
        self.read.append(int(digest, 16))
        if not self.slow or int(digest, 16) in self.slow:
            assert self.going_on.wait(10)
        if self.away:
            raise OSError("the disk is away")
        if int(digest, 16) in self.broken:
            raise NotFound("no such blob")
        return self.bundle


class World:
    def __init__(self, catalogue: Catalogue) -> None:
        self.shelf, self.clock, self.catalogue = Shelf(), Clock(), catalogue
        self.away = False
        self.served = ServedModels(self.look, self.shelf, RUNTIME, asyncio.to_thread, self.clock)

    def look(self) -> Catalogue:
        if self.away:
            raise OSError("the database is away")
        return self.catalogue

    async def answers(self, version: str = "") -> int:
        return (await self.served.answering("m", version)).version


# Names.


def test_a_version_is_named_by_its_number_its_channel_or_by_nothing() -> None:
    catalogue = offered({"stable": 3, "beta": 5}, release(3, 1), release(5, 2, "beta"), release(7, 9))
    named = {asked: catalogue.find("m", asked).version for asked in ("", "stable", "beta", "9", "01")}
    assert named == {"": 1, "stable": 1, "beta": 2, "9": 9, "01": 1}


def test_what_is_not_signed_yet_is_not_offered() -> None:
    catalogue = offered({"stable": 4}, release(3, 1))
    with pytest.raises(NotFound, match="no released channel 'stable'"):
        catalogue.find("m", "")
    assert catalogue.find("m", "1").number == 3


@pytest.mark.parametrize("asked", ["-1", "1.0", "١", " 1", "1 ", "latest", "x" * 500, "9" * 500])
def test_no_other_words_name_a_version(asked: str) -> None:
    with pytest.raises(NotFound) as found:
        offered({"stable": 3}, release(3, 1)).find("m", asked)
    assert len(str(found.value)) < 300


# Loading.


async def test_a_coordinator_that_has_just_started_says_so_until_it_knows_what_there_is() -> None:
    world = World(offered({"stable": 1, "beta": 2}, release(1, 1), release(2, 2, "beta")))
    with pytest.raises(Unavailable, match="just started"):
        await world.answers()
    world.shelf.slow = {1}
    world.shelf.going_on.clear()
    looking = asyncio.create_task(world.served.look())
    while ("m", "beta") not in world.served.standing:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0)
    assert await world.answers("beta") == 2, "what is loaded needn't wait for the rest"
    with pytest.raises(Unavailable, match="just started"):
        await world.answers()
    assert not world.served.is_ready
    world.shelf.going_on.set()
    await looking
    assert world.served.is_ready and await world.answers() == 1


async def test_versions_beside_the_heads_are_loaded_when_asked_for_and_the_oldest_let_go() -> None:
    versions = range(1, SPARE + 3)
    world = World(offered({"stable": 1}, *(release(number, number) for number in versions)))
    await world.served.look()
    assert world.shelf.read == [1]
    for version in versions:
        assert await world.answers(str(version)) == version
    assert world.shelf.read == list(versions), "each once"
    assert await world.answers(str(versions[-1])) == versions[-1]
    assert world.shelf.read == list(versions)
    await world.answers("2")
    assert world.shelf.read == [*versions, 2], "of six, the one that was asked for longest ago had gone"
    assert await world.answers() == 1 and world.shelf.read.count(1) == 1, "a head never goes"


async def test_many_who_ask_for_one_version_have_it_loaded_once_and_one_who_gives_up_takes_it_from_nobody() -> None:
    world = World(offered({"stable": 1}, release(1, 1), release(2, 2)))
    await world.served.look()
    world.shelf.going_on.clear()
    asking = [asyncio.create_task(world.answers("2")) for _ in range(5)]
    await asyncio.sleep(0)
    asking[0].cancel()
    await asyncio.sleep(0)
    world.shelf.going_on.set()
    assert await asyncio.gather(*asking[1:]) == [2, 2, 2, 2]
    assert asking[0].cancelled() and world.shelf.read == [1, 2]


async def test_one_that_does_not_load_is_tried_again_after_a_minute_and_not_for_every_question() -> None:
    world = World(offered({"stable": 1}, release(1, 1)))
    world.shelf.broken = {1}
    await world.served.look()
    for _ in range(3):
        with pytest.raises(ModelUnusable, match="version 1 of 'm' doesn't load: no such blob"):
            await world.answers()
    assert world.shelf.read == [1]
    assert world.served.is_ready, "other models may answer"
    world.shelf.broken.clear()
    world.clock.at += AGAIN_SECONDS
    await world.served.look()
    assert await world.answers() == 1


async def test_a_version_that_answers_otherwise_than_its_maker_saw_never_answers(tmp_path: Path) -> None:
    golden = BUNDLE.golden()
    wrong = GoldenExamples(golden.inputs, {name: array + 1.0 for name, array in golden.outputs.items()})
    files = {name: path.read_bytes() for name, path in BUNDLE.paths.items()} | {GOLDEN_FILE: wrong.to_bytes()}
    world = World(offered({"stable": 1}, release(1, 1)))
    world.shelf.bundle = write_bundle(tmp_path, replace(BUNDLE.manifest, files=file_refs(files)), files)
    await world.served.look()
    with pytest.raises(ModelUnusable, match="differs by"):
        await world.answers()


async def test_a_disk_that_does_not_do_just_now_is_told_as_that() -> None:
    world = World(offered({"stable": 1}, release(1, 1)))
    world.shelf.away = True
    await world.served.look()
    with pytest.raises(Unavailable, match="just now"):
        await world.answers()


async def test_while_the_database_is_away_what_answered_answers() -> None:
    world = World(offered({"stable": 1}, release(1, 1)))
    world.away = True
    await world.served.look()
    assert not world.served.is_ready, "nobody knows yet what there is"
    world.away = False
    await world.served.look()
    assert world.served.is_ready
    world.away = True
    await world.served.look()
    assert await world.answers() == 1


async def test_a_channel_that_goes_back_answers_with_what_was_before_and_loads_nothing() -> None:
    world = World(offered({"stable": 2}, release(1, 1), release(2, 2), release(3, 1)))
    await world.served.look()
    assert (await world.answers(), await world.answers("1")) == (2, 1)
    world.catalogue = offered({"stable": 3}, release(1, 1), release(2, 2), release(3, 1))
    await world.served.look()
    assert await world.answers() == 1 and world.shelf.read == [2, 1]


async def test_versions_of_one_content_are_told_apart_and_loaded_once() -> None:
    first = release(1, 1)
    again = replace(first, number=2, version=2)
    world = World(offered({"stable": 1}, first, again))
    await world.served.look()
    assert (await world.answers(), await world.answers("2")) == (1, 2)
    world.catalogue = offered({"stable": 2}, first, again)
    await world.served.look()
    assert (await world.answers(), await world.answers("1")) == (2, 1)
    assert world.shelf.read == [1]


# Questions.


def inference(world: World, waiting: int = 8) -> tuple[Inference, list[Inferred]]:
    told: list[Inferred] = []
    return Inference(world.served, world.clock, 2, waiting, told.append), told


def question(**changed: object) -> Question:
    return replace(Question("m", "", lambda: INPUTS, len(INPUTS["x"])), **changed)  # type: ignore[arg-type]


async def test_who_comes_when_too_many_wait_is_told_so_at_once() -> None:
    world = World(offered({"stable": 1}, release(1, 1), release(2, 2)))
    await world.served.look()
    asked, told = inference(world, waiting=2)
    world.shelf.going_on.clear()
    waiting = [asyncio.create_task(asked.ask("c", question(version="2"))) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable, match="ask again later"):
        await asked.ask("c", question())
    world.shelf.going_on.set()
    assert [answer.version for answer in await asyncio.gather(*waiting)] == [2, 2]
    assert (await asked.ask("c", question())).version == 1, "there is room again"
    assert [one.outcome for one in told] == ["unavailable", ANSWERED, ANSWERED, ANSWERED]
    asked.close()


@pytest.mark.parametrize("examples", [1, 10**9])
async def test_quick_answers_are_made_at_once_and_others_on_a_thread_and_both_are_the_same(examples: int) -> None:
    world = World(offered({"stable": 1}, release(1, 1)))
    await world.served.look()
    asked, _ = inference(world)
    where: list[str] = []

    def read() -> dict[str, np.ndarray]:
        where.append(threading.current_thread().name)
        return INPUTS

    loaded = (await world.served.answering("m", "")).loaded
    assert loaded.quick < 10**9
    answer = await asked.ask("c", question(inputs=read, examples=examples))
    assert where[0].startswith("inference") == (examples > loaded.quick)
    np.testing.assert_allclose(answer.outputs["logits"], BUNDLE.golden().outputs["logits"], atol=1e-4)
    asked.close()


async def test_a_question_that_is_given_up_or_wrong_leaves_room_and_a_record() -> None:
    world = World(offered({"stable": 1}, release(1, 1), release(2, 2)))
    await world.served.look()
    asked, told = inference(world, waiting=1)
    world.shelf.going_on.clear()
    given_up = asyncio.create_task(asked.ask("c", question(version="2")))
    await asyncio.sleep(0)
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    world.shelf.going_on.set()
    for wrong in (question(outputs=("y",)), question(inputs=dict, examples=10**9, id="i" * 1_000_000)):
        with pytest.raises(InputMismatch):
            await asked.ask("c", wrong)
    assert [one.outcome for one in told] == ["cancelled", "input-mismatch", "input-mismatch"]
    assert len(told[-1].id) == 200, "its caller's words are cut"
    assert (await asked.ask("c", question())).version == 1
    asked.close()
