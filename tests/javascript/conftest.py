"""Node and npm are not among the project's own requirements: what needs them is there only where they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.javascript.devices import Parties, parties
from tests.javascript.node import has_node

NEED_NODE = ["test_rounds.py", "test_refusals.py", "test_vectors.py"]
collect_ignore = [] if has_node() else NEED_NODE


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parties]:
    """A coordinator and a helper, for all tests of this folder."""
    with parties(tmp_path_factory.mktemp("javascript")) as running:
        yield running
