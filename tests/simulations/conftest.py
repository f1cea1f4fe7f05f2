from __future__ import annotations

import pytest

from tests.simulations import tiny
from umbel.bundle import Bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny.compiled(tmp_path_factory.mktemp("tiny"))
