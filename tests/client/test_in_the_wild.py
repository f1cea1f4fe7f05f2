"""What happens to a device that nobody looks after: clocks that were wrong, a home that was enrolled anew meanwhile."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from tests.client.conftest import Bench
from tests.client.coordinator import POPULATION, Coordinator, DirectChannel
from umbel.clock import SystemClock
from umbel.errors import CertificateRefused, WrongState
from umbel_client import ALWAYS, Device, HostStatus, Identity, IdlePolicy, agent
from umbel_client.agent import BUSY_SECONDS, LONGEST_SLEEP, Agent, Until
from umbel_client.enrolment import load_identity, new_key, save_identity
from umbel_client.idle import History
from umbel_client.kit import only_visitor
from umbel_client.slots import Trial
from umbel_client.visits import Ending, Visit

YEARS = 4 * 365 * 86_400.0


async def test_an_agent_whose_clock_was_years_ahead_does_not_sleep_for_years(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.clock.instant += YEARS
    await bench.open().wake()
    bench.clock.instant -= YEARS
    waited = list[float]()

    async def at_once(self: Agent, seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr(Agent, "_sleep", at_once)
    device = bench.open()
    assert device.kit.memory.state.next_wake > bench.clock.now() + LONGEST_SLEEP
    await Agent(device, lambda visit: None).run(Until(visits=2))
    assert waited[0] == LONGEST_SLEEP


@pytest.mark.parametrize("wrong", [YEARS, -YEARS], ids=["ahead", "behind"])
async def test_an_agent_looks_again_at_once_when_its_clock_is_set_right(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    """A certificate or metadata that the wrong date refused cost hours, though the date was right a minute later."""
    monkeypatch.setattr(agent, "LOOK_SECONDS", 0.01)
    visits = list[Visit]()
    bench.channel.down = CertificateRefused("not in time, by this machine's clock")
    bench.clock.instant += wrong

    def tell(visit: Visit) -> None:
        visits.append(visit)
        assert visit.next_wake >= bench.clock.now() + 3600
        asyncio.get_running_loop().call_later(0.05, setattr, bench.clock, "instant", visits[0].at - wrong)

    await asyncio.wait_for(Agent(bench.open(), tell).run(Until(visits=2)), 5)
    assert visits[1].at == visits[0].at - wrong


async def test_an_agent_outlives_a_visit_by_hand_and_suffers_no_second_agent(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = list[float]()

    async def at_once(self: Agent, seconds: float) -> None:
        waited.append(seconds)
        if seconds == BUSY_SECONDS:
            by_hand.close()
            with pytest.raises(WrongState, match="another agent"):
                await Agent(bench.open(), lambda visit: None).run(Until())

    monkeypatch.setattr(Agent, "_sleep", at_once)
    with ExitStack() as by_hand:
        device = bench.open()
        by_hand.enter_context(only_visitor(bench.home))
        with pytest.raises(WrongState, match="on a visit"):
            await Agent(device, lambda visit: None).run(Until(visits=1))
        visit = await Agent(device, lambda visit: None).run(Until(visits=2))
    assert visit is not None and visit.ending is Ending.RESTED
    assert waited[1] == BUSY_SECONDS


def test_a_contribution_in_the_future_holds_no_device_back() -> None:
    patient = IdlePolicy(min_seconds_between_contributions=3600.0, require_idle=False, require_power=False)
    now = 1_790_000_000.0
    ahead = History(training_examples=9, last_contribution=now + YEARS)
    assert list(patient._without_work(ahead, now)) == []
    assert list(patient._without_work(replace(ahead, last_contribution=now), now)), "just now still counts"


async def test_a_trial_that_began_in_the_future_begins_anew_and_ends(bench: Bench) -> None:
    """Set right, or gone back to 1970 for want of a battery: neither shows anything of the release."""
    bench.coordinator.publish()
    device = bench.device_with_examples()
    bench.coordinator.tasks = []
    await device.wake()
    shelf, on_trial = device.kit.shelf, Trial("", bench.clock.now() + YEARS)
    shelf.change(lambda slots: replace(slots, trial=on_trial))
    await device.wake()
    assert shelf.slots.trial is not None
    assert shelf.slots.trial.since == bench.clock.now()
    bench.clock.instant += device.kit.personal.trial_seconds
    await device.wake()
    assert shelf.slots.trial is None and device.answers_with


async def test_a_process_that_runs_on_never_takes_the_place_of_a_home_enrolled_anew(bench: Bench) -> None:
    """`umbel-device enrol --again` beside a running agent: its next renewal put the old identity back."""
    save_identity(bench.home, bench.identity)
    device = bench.open(identity=None)
    assert (await device.wake()).ending is Ending.RESTED
    anew = replace(bench.identity, private_key=new_key(), channel="beta")
    save_identity(bench.home, anew)
    with pytest.raises(WrongState, match=rf"enrolled anew, as {anew.device_id}; start this process again"):
        await device.wake()
    assert load_identity(bench.home) == anew


async def test_an_agent_ends_once_its_home_was_enrolled_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in nobody's way, so to wait as behind a visit by hand would be to wait for ever."""

    async def at_once(self: Agent, seconds: float) -> None:
        assert seconds != BUSY_SECONDS

    monkeypatch.setattr(Agent, "_sleep", at_once)
    save_identity(bench.home, bench.identity)
    device = bench.open(identity=None)
    save_identity(bench.home, replace(bench.identity, private_key=new_key()))
    with pytest.raises(WrongState, match="enrolled anew"):
        await Agent(device, lambda visit: None).run(Until())


def _without_an_end(graph: bytes) -> bytes:
    """The same graph, but for a loop that hands its answer round and round."""
    model = onnx.load_model_from_string(graph)
    out = model.graph.output[0]
    for node in model.graph.node:
        node.output[:] = ["once" if name == out.name else name for name in node.output]
    helper, kind = onnx.helper, onnx.TensorProto
    steps = [helper.make_node("Identity", [f"{name}_in"], [f"{name}_out"]) for name in ("going", "value")]
    ends = [("going", kind.BOOL, []), ("value", kind.FLOAT, None)]
    given = [helper.make_tensor_value_info("at", kind.INT64, [])]
    given += [helper.make_tensor_value_info(f"{name}_in", of, shape) for name, of, shape in ends]
    made = [helper.make_tensor_value_info(f"{name}_out", of, shape) for name, of, shape in ends]
    body = helper.make_graph(steps, "body", given, made)
    model.graph.initializer.append(helper.make_tensor("always", kind.BOOL, [], [True]))
    model.graph.node.append(helper.make_node("Loop", ["", "always", "once"], [out.name], body=body))
    return model.SerializeToString()


def follow_a_release_without_an_end(home: Path) -> None:
    """In a process of its own: its training thread can't be ended."""
    agent.LOOK_SECONDS, agent.END_SECONDS, agent.LONGEST_VISIT = 0.05, 0.2, 0.5
    clock = SystemClock()
    coordinator = Coordinator(clock.now)
    coordinator.publish(spoil=_without_an_end)
    release_key = coordinator.release_key.public_key().public_bytes_raw()
    device = Device.open(
        home,
        identity=Identity(new_key(), b"", b"", release_key, POPULATION, ""),
        channel=DirectChannel(coordinator),
        status=HostStatus(),
        policy=ALWAYS,
    )
    asyncio.run(Agent(device, lambda visit: sys.stdout.write(str(visit))).run(Until()))


def test_an_agent_ends_with_a_visit_that_runs_without_an_end(tmp_path: Path) -> None:
    """Whoever starts it again has it count what took it down."""
    call = f"from {__name__} import follow_a_release_without_an_end as f; from pathlib import Path; f(Path('home'))"
    paths = os.pathsep.join((str(Path(__file__).parents[2]), *sys.path))
    done = subprocess.run(
        [sys.executable, "-c", call], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "umbel-device: a visit goes on 0.2 s after it had to end; giving it up\n"
