"""One coordinator with models to ask, for all tests that leave it as it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.live import Live, serving
from tests.serving.asking import add_version, identity, publish, stub, until
from umbel.oip import open_inference_pb2 as pb
from umbel_server.identity import Identity


@pytest.fixture(scope="package")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A coordinator with version 1 on `stable` and version 2 on `beta`."""
    folder = tmp_path_factory.mktemp("serving")
    with serving(folder / "state", inference_port=0, inference_http_port=0) as found:
        found.add_model()
        add_version(found, folder / "two", 0.01)
        publish(found, 1)
        publish(found, 2, "beta")
        admin = stub(found, found.first_admin())
        until(lambda: len(admin.RepositoryIndex(pb.RepositoryIndexRequest()).models) == 2)
        yield found


@pytest.fixture(scope="package")
def caller(live: Live) -> Identity:
    return identity(live, "caller", "shop")
