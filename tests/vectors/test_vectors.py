"""The wire stays what it was: committed bytes decode to the committed values, and today's code makes these bytes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.vectors.generate import GENERATORS, file_of
from tests.vectors.kinds import DECODERS, FOLDER, as_json, load
from umbel.errors import BY_CODE, UmbelError

CASES = [(kind, case) for kind in DECODERS for case in load(kind)["vectors"]]
NAMED = [f"{kind}: {case['name']}" for kind, case in CASES]


@pytest.mark.parametrize(("kind", "case"), CASES, ids=NAMED)
def test_a_committed_vector_decodes_as_it_says(kind: str, case: dict[str, Any]) -> None:
    data = bytes.fromhex(case["hex"])
    if "error" in case:
        with pytest.raises(UmbelError) as caught:
            DECODERS[kind](data)
        assert type(caught.value) is BY_CODE[case["error"]]
    else:
        assert as_json(DECODERS[kind](data)) == case["value"]


@pytest.mark.parametrize("kind", GENERATORS)
def test_todays_code_makes_the_committed_bytes(kind: str) -> None:
    committed = (FOLDER / f"{kind}.json").read_text("utf-8")
    assert file_of(kind) == committed, "the wire changed: read docs/reference/wire-evolution.md"


@pytest.mark.parametrize("kind", GENERATORS)
def test_each_kind_has_good_vectors_and_bad_ones(kind: str) -> None:
    cases = load(kind)["vectors"]
    assert sum("value" in case for case in cases) >= 1
    assert sum("error" in case for case in cases) >= 5
    assert len({case["name"] for case in cases}) == len(cases)


def test_only_the_vectors_named_here_lie_here() -> None:
    # Two are made and tested elsewhere, since their bytes can't be made again: capsules are random, zstd may change.
    assert {path.stem for path in FOLDER.glob("*.json")} == {*GENERATORS, "secure_sum", "delta"}
