"""`umbel rollouts`, `approvals` and `audit` as people type them: one writes, another lets it go, devices answer."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import MODEL, POPULATION, TASK, Live, LiveDevice
from tests.server.test_cli import Result, Umbel, done
from tests.server.test_cli import live as live
from tests.server.test_cli import run as run
from tests.server.test_cli import umbel as umbel
from umbel import messages
from umbel.offer import offer_of_statement
from umbel.visit import CheckIn, CheckInReply, Outcome, ReleaseOutcome

SPEC = """
[gate]
least_answers = 1
ceiling_devices = 1
ceiling_share = 0.0
margin = 0.0

[[waves]]
percent = 100.0
soak_seconds = 0.0
promotion = "manual"
"""


class Phone:
    """A device that takes what it is offered, or fails at it."""

    def __init__(self, live: Live) -> None:
        self.device: LiveDevice = live.device()
        self.release, self.told = 0, tuple[ReleaseOutcome, ...]()

    def visit(self, outcome: Outcome = Outcome.ADOPTED) -> CheckInReply:
        asked = CheckIn(POPULATION, ("onnx",), (), offers_work=False, outcomes=self.told, release=self.release)
        reply = messages.check_in_reply_from_message(self.device.stub.CheckIn(messages.check_in_to_message(asked)))
        self.told = ()
        if reply.offer is not None:
            offer = offer_of_statement(reply.offer.statement)
            self.told = (ReleaseOutcome(offer.model, offer.number, outcome, execution=offer.execution),)
            self.release = offer.number if outcome is Outcome.ADOPTED else self.release
        return reply


def steer(live: Live) -> None:
    def look() -> None:
        live.parts.coordinator.fleet.flush(live.clock.now())
        rollouts = live.parts.coordinator.rollouts
        assert rollouts is not None
        rollouts.reconcile()

    live.do(look)


@pytest.fixture
def world(umbel: Umbel, live: Live, tmp_path: Path) -> tuple[Phone, list[str], str]:
    """A phone that has release 1; how a second person calls; a file with a spec."""
    live.add_model()
    # A population's task says which model it has; nobody trains here.
    done(umbel("tasks", "create", "--name", TASK, "--population", POPULATION, "--model", MODEL, "--public"))
    done(umbel("tasks", "stop", TASK))
    done(umbel("operators", "add", "grace", "--role", "approver", "--out", str(tmp_path / "grace")))
    phone = Phone(live)
    done(umbel("releases", "publish", MODEL, "1"))
    first = done(umbel("releases", "prepare", MODEL, "1", "--json")).json
    steer(live)
    phone.visit()
    phone.visit()
    assert phone.release == first["head"]
    (tmp_path / "spec.toml").write_text(
        f'model = "{MODEL}"\nchannel = "stable"\npopulation = "{POPULATION}"\nrelease = {first["number"]}\n'
        f"revert_release = {first['revert']}\nfrom_release = {first['head']}\n{SPEC}"
    )
    return phone, ["--identity", str(tmp_path / "grace")], str(tmp_path / "spec.toml")


def stage(result: Result) -> Any:
    return done(result).json["stage"]


def written(result: Result) -> Any:
    return json.loads(done(result).json["spec"])


def test_a_soak_time_alone_leaves_the_usual_waves_and_a_population_without_devices_is_told(
    umbel: Umbel, world: tuple[Phone, list[str], str]
) -> None:
    chosen = ("--model", MODEL, "--population", POPULATION, "--release", "2", "--soak", "60", "--dry-run", "--json")
    preview = done(umbel("rollouts", "create", "r", *chosen))
    assert [wave["percent"] for wave in preview.json["waves"]] == [1.0, 5.0, 25.0, 100.0]
    assert not preview.err
    mistyped = done(umbel("rollouts", "create", "r", *chosen, "--population", "wrsts"))
    assert "no device of population 'wrsts' is enrolled yet; `umbel devices list`" in mistyped.err


def test_waves_that_are_none_are_refused_by_name(
    umbel: Umbel, world: tuple[Phone, list[str], str], tmp_path: Path
) -> None:
    refused = umbel("rollouts", "create", "r", "--model", MODEL, "--waves", "1,half")
    assert refused.code == 1 and "'1,half'" in refused.err and "1,5,25,100" in refused.err
    (tmp_path / "one.toml").write_text("waves = 5\n")
    refused = umbel("rollouts", "create", "r", "--file", str(tmp_path / "one.toml"), "--soak", "60")
    assert refused.code == 1 and "waves is 5" in refused.err and "[[waves]]" in refused.err
    assert umbel("rollouts", "create", "r", "--model", MODEL, "--soak", "-60").code == 2


def test_what_a_file_says_stands_unless_an_option_says_otherwise(
    umbel: Umbel, world: tuple[Phone, list[str], str], tmp_path: Path
) -> None:
    _, _, spec = world
    on_beta = done(umbel("releases", "prepare", MODEL, "1", "--channel", "beta", "--json")).json["number"]
    beta = tmp_path / "beta.toml"
    beta.write_text(f'model = "{MODEL}"\nchannel = "beta"\npopulation = "{POPULATION}"\nrelease = {on_beta}\n')
    assert written(umbel("rollouts", "create", "b", "--file", str(beta), "--json"))["channel"] == "beta"
    without = written(umbel("rollouts", "create", "r", "--file", spec, "--revert", "0", "--json"))
    assert (without["channel"], without["revert_release"]) == ("stable", 0)


def test_an_edit_without_the_spec_to_write_is_refused_before_anything_is_asked(
    umbel: Umbel, world: tuple[Phone, list[str], str]
) -> None:
    _, _, spec = world
    draft = written(umbel("rollouts", "create", "r", "--file", spec, "--revert", "0", "--json"))
    refused = umbel("rollouts", "edit", "r")
    assert refused.code == 2 and "Missing option '--file'" in refused.err
    assert written(umbel("rollouts", "show", "r", "--json")) == draft
    assert written(umbel("rollouts", "edit", "r", "--file", spec, "--json"))["revert_release"] > 0


def test_a_rollout_from_a_dry_run_to_its_promotion_takes_two_people(
    umbel: Umbel, live: Live, world: tuple[Phone, list[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    phone, grace, spec = world
    preview = done(umbel("rollouts", "create", "r", "--file", spec, "--dry-run", "--json")).json
    assert preview["waves"][0]["devices"] == [phone.device.id]
    assert done(umbel("rollouts", "list", "--json")).json["rollouts"] == [], "a dry run writes nothing"
    lines = done(umbel("rollouts", "create", "r", "--file", spec, "--dry-run")).out.splitlines()
    assert [line.split()[0] for line in lines if phone.device.id[:12] in line] == ["1"], "as `show` counts waves"

    created = done(umbel("rollouts", "create", "r", "--file", spec, "--json")).json
    assert (created["stage"], created["light"]) == ("draft", "amber")
    assert stage(umbel("rollouts", "submit", "r", "--json")) == "pending-approval"
    waiting = done(umbel("approvals", "list", "--json")).json["rollouts"]
    assert [it["id"] for it in waiting] == ["r"]
    own = umbel("rollouts", "approve", "r")
    assert own.code == 1 and "somebody else has to let it go" in own.err
    other = umbel("rollouts", "approve", "r", "--subject", "0" * 64, *grace)
    assert other.code == 1 and "look at it again" in other.err
    assert stage(umbel("rollouts", "approve", "r", "--subject", created["subject"], "--json", *grace)) == "scheduled"
    assert stage(umbel("rollouts", "start", "r", "--json")) == "running"

    phone.visit()
    phone.visit()
    steer(live)
    shown = done(umbel("rollouts", "show", "r", "--json")).json
    assert (shown["stage"], shown["light"]) == ("awaiting-promotion", "amber")
    (wave,) = shown["waves"]
    assert (wave["devices"], wave["counts"]) == (1, {"adopted": 1})
    picture = done(umbel("rollouts", "show", "r")).out
    assert "1 (100 %)" in picture and "████████████████████ 1" in picture and "1 adopted" in picture
    explained = done(umbel("rollouts", "explain", "r")).out
    assert explained.startswith("pass:") and "enough data: 1 of 1 devices answered" in explained
    assert [it["id"] for it in done(umbel("approvals", "list", "--json")).json["rollouts"]] == ["r"]

    looks: list[float] = []

    def twice(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", twice)
    watched = done(umbel("rollouts", "watch", "r"))
    assert len(looks) == 2 and "awaiting-promotion" in watched.out and "1 adopted" in watched.out
    monkeypatch.undo()
    state = ["--state", str(live.settings.state)]
    assert umbel("rollouts", "promote", "r", *state).code == 1
    assert stage(umbel("rollouts", "promote", "r", "--json", *grace, *state)) == "succeeded"
    lineage = done(umbel("versions", "lineage", MODEL, "1", *state)).out
    assert "rollout r (succeeded): " in lineage and "approved by operator:grace" in lineage
    assert done(umbel("audit", "verify", *state)).out.startswith("intact: ")


def test_one_person_stops_takes_back_and_holds(umbel: Umbel, live: Live, world: tuple[Phone, list[str], str]) -> None:
    phone, grace, spec = world
    done(umbel("rollouts", "create", "r", "--file", spec))
    denied = done(umbel("rollouts", "create", "d", "--file", spec, "--json")).json
    done(umbel("rollouts", "submit", "r"))
    done(umbel("rollouts", "approve", "r", *grace))
    done(umbel("rollouts", "start", "r"))
    assert stage(umbel("rollouts", "pause", "r", "--reason", "lunch", "--json")) == "paused"
    assert phone.visit().offer is None
    assert stage(umbel("rollouts", "resume", "r", "--json")) == "running"
    mistyped = umbel("releases", "hold", MODEL + "s", "--reason", "stop everything")
    assert mistyped.code == 1 and "`umbel models list`" in mistyped.err, "or somebody takes it for stopped"
    done(umbel("releases", "hold", MODEL, "--reason", "stop everything"))
    assert phone.visit().offer is None
    done(umbel("releases", "lift", MODEL))
    phone.visit(Outcome.FAILED)
    phone.visit()
    steer(live)
    steer(live)
    shown = done(umbel("rollouts", "show", "r", "--json")).json
    assert (shown["stage"], shown["light"]) == ("rolled-back", "red")
    assert "ceiling: 1 of 1 devices failed" in done(umbel("rollouts", "explain", "r")).out
    done(umbel("rollouts", "submit", "d"))
    assert stage(umbel("rollouts", "deny", "d", "--reason", "no", "--json", *grace)) == "denied"
    assert umbel("rollouts", "submit", "d").code == 1 and denied["stage"] == "draft"
    for words in (("versions", "list", "other"), ("models", "show", "other"), ("releases", "list", "other")):
        assert "no model is called 'other'" in umbel(*words).err
    assert "no task is called 'other'" in umbel("rounds", "list", "--task", "other").err


def test_a_person_who_saw_an_older_revision_changes_nothing_and_a_call_made_again_is_done_once(
    umbel: Umbel, world: tuple[Phone, list[str], str]
) -> None:
    _, grace, spec = world
    seen = done(umbel("rollouts", "create", "r", "--file", spec, "--expected-revision", "0", "--json")).json["revision"]
    once = ("rollouts", "submit", "r", "--request-id", "once", "--expected-revision", str(seen), "--json")
    submitted = done(umbel(*once)).json
    assert done(umbel(*once)).json == submitted
    for late in (("approve", *grace), ("deny", "--reason", "no", *grace), ("edit", "--file", spec), ("cancel",)):
        refused = umbel("rollouts", late[0], "r", *late[1:], "--expected-revision", str(seen))
        assert refused.code == 1 and "revision" in refused.err, late
    assert done(umbel("rollouts", "show", "r", "--json")).json["revision"] == submitted["revision"]


# What an auditor finds.


def test_an_auditor_finds_a_planted_edit_a_deletion_a_cut_and_a_rewriting(
    umbel: Umbel, live: Live, tmp_path: Path
) -> None:
    from tests.rollouts.planting import PLANTS

    for index in range(4):
        done(umbel("devices", "tokens", "create", "--population", f"p{index}"))
    live.do(live.parts.coordinator.checkpoint)
    assert done(umbel("audit", "verify", "--json")).json["intact"]
    exported = tmp_path / "audit.jsonl"
    done(umbel("audit", "export", str(exported)))
    before = [json.loads(line) for line in exported.read_text().splitlines()]
    notes = Path(live.settings.state) / "witness" / "checkpoints.txt"
    key = done(umbel("audit", "key", "--json")).json["key"]
    offline = ("audit", "check", str(exported), "--checkpoints", str(notes), "--key", key)
    checked = done(umbel(*offline, "--json")).json
    assert checked["rows"] == len(before) and checked["checkpoints"] >= 1

    for name, plant in PLANTS.items():
        with live.parts.store.transaction() as connection:
            saved = plant(connection)
        found = umbel("audit", "verify", "--json")
        assert (found.code, found.json["intact"]) == (1, False), name
        done(umbel("audit", "export", str(exported)))
        assert umbel(*offline).code == 1, name
        with live.parts.store.transaction() as connection:
            saved(connection)
        assert done(umbel("audit", "verify", "--json")).json["intact"], name
