"""The list of attacks in the docs names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs" / "reference" / "rollouts.md"
ROWS = re.findall(r"^\| ([^|]+) \| [^|]+ \| `([^:`]+)::(test_\w+)` \|$", PAGE.read_text(), re.MULTILINE)
LIST = (
    "rollback", "freeze", "mix-and-match", "endless data", "slow retrieval", "stolen online keys",
    "one of three release keys stolen", "tampered, truncated", "replayed offer", "a foreign device's offer",
    "clock set back",
)  # fmt: skip


@pytest.mark.parametrize("attack", LIST)
def test_every_attack_of_the_list_has_a_row(attack: str) -> None:
    assert any(row.startswith(attack) for row, _, _ in ROWS)


@pytest.mark.parametrize(("file", "name"), [(file, name) for _, file, name in ROWS])
def test_every_row_names_a_test_that_is_there(file: str, name: str) -> None:
    assert re.search(rf"^(async )?def {name}\(", (TESTS / file).read_text(), re.MULTILINE)
