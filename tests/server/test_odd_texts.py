"""What an operator's call may carry that a database or JSON can't hold is refused by name, never a fault inside."""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from tests.databases import new_postgresql
from tests.server.live import POPULATION, Live, refused, serving
from tests.server.test_admin import METHODS, SERVICE, call
from umbel.errors import BadInput
from umbel.v1 import admin_pb2 as pb


@pytest.fixture(scope="module")
def live(postgresql: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    state = tmp_path_factory.mktemp("odd") / "state"
    with serving(state, database_url=new_postgresql(postgresql)) as live:
        live.admin()
        yield live


SPEC = {"model": "m", "channel": "stable", "population": POPULATION, "release": 1}
ACTIONS = {"GoOnRollout": "submit", "DecideRollout": "approve", "StopRollout": "pause"}


def with_nul(method: str) -> Iterator[Message]:
    """A method's message, once for each of its texts: that one with a NUL, all else with something."""
    kind = GetMessageClass(SERVICE.methods_by_name[method].input_type)
    texts = [field.name for field in kind.DESCRIPTOR.fields if field.type == FieldDescriptor.TYPE_STRING]
    numbers = [field.name for field in kind.DESCRIPTOR.fields if field.cpp_type <= FieldDescriptor.CPPTYPE_FLOAT]
    known = {"spec": json.dumps(SPEC), "action": ACTIONS.get(method, "")}
    plain = {name: known.get(name, "x") for name in texts} | dict.fromkeys(numbers, 1)
    for odd in texts:
        yield kind(**plain | {odd: "a\0b"})


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("Watch", "AddModel")])
def test_a_nul_in_any_text_is_no_fault_inside(live: Live, method: str) -> None:
    for message in with_nul(method):
        with pytest.raises(grpc.RpcError) as found:
            call(live.channels[0], method, message.SerializeToString())
        error = found.value
        assert isinstance(error, grpc.Call)
        assert error.code() is not grpc.StatusCode.INTERNAL, message


@pytest.mark.parametrize(
    "odd",
    [
        '"start_at":NaN',
        '"start_at":Infinity',
        f'"start_at":1{"0" * 400}',
        '"hold_back_salt":"\\ud800"',
        '"lab":["\\ud800"]',
    ],
)
def test_a_rollouts_spec_that_no_text_can_hold_is_refused(live: Live, odd: str) -> None:
    request = pb.PreviewRolloutRequest(spec=f"{json.dumps(SPEC)[:-1]},{odd}}}")
    with refused() as found:
        live.admin().PreviewRollout(request)
    assert isinstance(found[0], BadInput), found[0]
