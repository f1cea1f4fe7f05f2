"""`umbel` as an operator types it, against a running coordinator."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from tests.server.live import MODEL, POPULATION, TASK, Live, serving
from umbel.bundle import Bundle
from umbel.errors import BadInput
from umbel.v1.admin_pb2 import LineageStep
from umbel_client.enrolment import EnrolmentCode
from umbel_models.zoo import bundle_path
from umbel_server import admin
from umbel_server.admin_messages import task_from_message
from umbel_server.cli import main, program
from umbel_server.cli.output import size
from umbel_server.cli.task_file import read_task
from umbel_server.privacy_settings import PrivacySettings
from umbel_server.settings import Settings
from umbel_server.task import Task

BUNDLE = str(bundle_path(MODEL))
REFERENCE = Path(__file__).parents[2] / "docs" / "reference" / "umbel-cli.md"
TASK_FILE = """
name = "learn"
population = "wrists"
model = "smartwatch"
rounds = 3
updates_private = false
goal = 4

[plan]
epochs = 2
hyperparameters = { lr = 0.05 }

[strategy]
name = "FedAdam"
arguments = { eta = 0.02 }

[validation]
max_accuracy_drop = 0.25
"""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out, parse_constant=int)  # which refuses `Infinity`: no other program reads that


Umbel = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Umbel:
    """Run `umbel` with these words, in this process."""

    def umbel(*words: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["umbel", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return Result(int(ended.value.code or 0), captured.out, captured.err)

    return umbel


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Live]:
    with serving(tmp_path / "state") as live:
        monkeypatch.setenv("UMBEL_STATE", str(tmp_path / "state"))
        yield live


@pytest.fixture
def umbel(run: Umbel, live: Live) -> Umbel:
    return run


def done(result: Result) -> Result:
    assert result.code == 0, result.err
    return result


def a_round(live: Live) -> None:
    """One device does a round of the running task."""
    live.run(live.parts.coordinator.tick())
    device = live.device()
    begin, data = device.sealed(device.assignment())
    device.report(begin, [data[start : start + 50_000] for start in range(0, len(data), 50_000)])
    live.run(live.parts.coordinator.tick())


# From an empty folder to a version.


def test_the_way_from_a_bundle_to_a_published_version(umbel: Umbel, live: Live, tmp_path: Path) -> None:
    added = done(umbel("models", "add", BUNDLE, "--name", MODEL, "--json")).json
    assert (added["model"], added["number"], added["state"]) == (MODEL, 1, "accepted")
    done(umbel("tasks", "create", "--name", TASK, "--population", POPULATION, "--model", MODEL, "--public"))
    created = done(umbel("tasks", "show", TASK, "--json")).json
    assert (created["state"], created["spec"]["goal"]) == ("running", 10)
    done(umbel("tasks", "stop", TASK))
    done(
        umbel(
            "tasks", "create", "--name", "next", "--population", POPULATION, "--model", MODEL, "--goal", "1", "--public"
        )
    )
    a_round(live)
    rounds = done(umbel("rounds", "list", "--task", "next", "--json")).json["rounds"]
    assert [(found["number"], found["state"], found["accuracy"]) for found in rounds][-1] == (1, "completed", 0.8)
    lineage = done(umbel("versions", "lineage", MODEL, "2", "--json")).json["versions"]
    assert [version["number"] for version in lineage] == [2, 1]
    done(umbel("versions", "publish", MODEL, "1", "--channel", "beta"))
    tree = done(umbel("versions", "lineage", MODEL, "2")).out
    assert "round    1 of 1 devices, base version 1, completed" in tree
    assert "on beta" in tree
    releases = done(umbel("releases", "list", MODEL, "--json")).json["releases"]
    assert (releases[0]["version"], releases[0]["channel"]) == (1, "beta")
    exported = done(umbel("versions", "export", MODEL, "2", str(tmp_path / "out"), "--json")).json
    assert Bundle.open(tmp_path / "out").manifest.digest == exported["bundle_digest"]
    assert umbel("versions", "export", MODEL, "2", str(tmp_path / "out")).code == 1
    assert done(umbel("audit", "verify", "--json")).json["intact"]


def test_every_list_is_a_table_for_people_and_json_for_programs(
    umbel: Umbel, live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done(umbel("models", "add", BUNDLE, "--name", MODEL))
    done(
        umbel(
            "tasks", "create", "--name", TASK, "--population", POPULATION, "--model", MODEL, "--goal", "1", "--public"
        )
    )
    a_round(live)
    device = live.device().id
    for words in (
        ("models", "list"),
        ("models", "show", MODEL),
        ("versions", "list", MODEL),
        ("versions", "show", MODEL, "2"),
        ("versions", "lineage", MODEL, "2"),
        ("releases", "list"),
        ("tasks", "list"),
        ("tasks", "show", TASK),
        ("tasks", "privacy", TASK),
        ("rounds", "list"),
        ("rounds", "show", TASK, "1"),
        ("devices", "list"),
        ("devices", "show", device),
        ("operators", "list"),
        ("audit", "list"),
        ("audit", "verify"),
        ("audit", "export", str(tmp_path / "audit.jsonl")),
        ("status",),
    ):
        assert isinstance(done(umbel(*words, "--json")).json, dict), words
        assert done(umbel(*words)).out.strip(), words
    # A coordinator of another version may leave out what is shown: that is one line too, and no traceback.
    monkeypatch.setattr(admin, "lineage_to_message", lambda step: LineageStep())
    for trace in (live.parts.coordinator.operations.trace, lambda model, number: ()):
        monkeypatch.setattr(live.parts.coordinator.operations, "trace", trace)
        told = umbel("versions", "lineage", MODEL, "2")
        assert told.code == 1
        assert re.fullmatch(r"umbel: this umbel can't make out the coordinator's answer .*same version\?\n", told.err)


def test_a_task_is_written_down_in_a_file(umbel: Umbel, tmp_path: Path) -> None:
    done(umbel("models", "add", BUNDLE, "--name", MODEL))
    (tmp_path / "task.toml").write_text(TASK_FILE)
    task = done(umbel("tasks", "create", "--file", str(tmp_path / "task.toml"), "--rounds", "9", "--json")).json
    spec = task["spec"]
    assert (spec["rounds"], spec["goal"], spec["plan"]["epochs"]) == (9, 4, 2)
    assert spec["plan"]["hyperparameters"] == {"lr": 0.05}
    assert spec["strategy"]["arguments"]["eta"] == 0.02
    assert spec["validation"]["max_accuracy_drop"] == 0.25
    assert spec["plan"]["kind"] == "train"
    told = done(umbel("tasks", "show", spec["name"])).out
    assert "kind=train  epochs=2" in told and "lr=0.05" in told, "in the words of its file"
    assert "max_seconds" not in told, "what has no limit"
    assert "max_accuracy_drop=0.25" in told and "the coordinator reads each one" in told


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("goal = 3", 2),
        ("name = ", 1),
        (TASK_FILE.replace("rounds = 3", "laps = 3"), 1),
        (TASK_FILE.replace("FedAdam", "FedMagic"), 1),
        (TASK_FILE.replace("eta = 0.02", "beta = 'x'"), 1),
        (TASK_FILE.replace("goal = 4", "goal = 0"), 1),
        (TASK_FILE.replace("goal = 4", "deadline_seconds = 1e-6"), 1),
        (TASK_FILE.replace("epochs = 2", "epochs = 'two'"), 1),
        (TASK_FILE.replace("lr = 0.05", "warmth = 0.05"), 1),
    ],
    ids=["no name", "no TOML", "field", "strategy", "argument", "goal", "deadline", "type", "hyper-parameter"],
)
def test_a_task_that_makes_no_sense_is_refused_in_words(umbel: Umbel, tmp_path: Path, text: str, code: int) -> None:
    done(umbel("models", "add", BUNDLE, "--name", MODEL))
    (tmp_path / "task.toml").write_text(text)
    result = umbel("tasks", "create", "--file", str(tmp_path / "task.toml"))
    assert result.code == code
    assert "Traceback" not in result.err
    assert result.err
    assert umbel("tasks", "list", "--json").json == {"tasks": []}


# Devices and operators.


def test_tokens_and_codes_are_what_a_device_enrols_with(umbel: Umbel, live: Live) -> None:
    plain = done(umbel("devices", "tokens", "create", "--population", POPULATION, "--count", "3"))
    assert len(plain.out.split()) == 3
    line = done(umbel("devices", "tokens", "create", "--population", POPULATION, "--codes")).out.strip()
    code = EnrolmentCode.from_text(line)
    assert code.server == live.addresses.enrol
    assert code.authority == live.parts.authorities.server.certificate_pem
    tree = done(umbel("devices", "tokens", "create", "--population", POPULATION, "--codes", "--json")).json
    assert EnrolmentCode.from_text(tree["codes"][0]).token == tree["tokens"][0]
    elsewhere = umbel(
        "devices", "tokens", "create", "--population", POPULATION, "--codes", "--enrol-server", "fleet.example:7444"
    )
    assert "at fleet.example:7444" in elsewhere.err
    assert EnrolmentCode.from_text(elsewhere.out.strip()).server == "fleet.example:7444"


def test_a_device_is_revoked(umbel: Umbel, live: Live) -> None:
    device = live.device()
    done(umbel("devices", "revoke", device.id, "--reason", "lost"))
    assert "revoked" in done(umbel("devices", "show", device.id)).out
    assert umbel("devices", "revoke", "0" * 32).code == 1


def test_an_operator_gets_a_folder_to_call_with_from_anywhere(
    umbel: Umbel, live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "ada"
    done(umbel("operators", "add", "ada", "--role", "viewer", "--out", str(theirs)))
    assert stat.S_IMODE((theirs / "key.pem").stat().st_mode) == 0o600
    monkeypatch.delenv("UMBEL_STATE")
    monkeypatch.chdir(tmp_path)
    remote = ("--identity", str(theirs), "--server", live.addresses.admin)
    done(umbel("status", *remote))
    refused = umbel("tasks", "pause", TASK, *remote)
    assert (refused.code, "needs the role operator" in refused.err) == (1, True)
    done(umbel("operators", "revoke", "ada", "--state", str(live.settings.state)))
    assert umbel("status", *remote).code == 1


# Refusals.


def test_without_a_coordinator_the_message_says_what_to_do(run: Umbel, tmp_path: Path) -> None:
    missing = run("status", "--state", str(tmp_path / "nowhere"))
    assert (missing.code, "umbel init" in missing.err) == (1, True)
    done(run("init", str(tmp_path / "state")))
    stopped = run("status", "--state", str(tmp_path / "state"))
    assert (stopped.code, "umbel serve" in stopped.err) == (1, True)


def test_without_a_folder_the_message_names_the_option(
    run: Umbel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("UMBEL_STATE", raising=False)
    monkeypatch.chdir(tmp_path)
    result = run("status")
    assert (result.code, "--state" in result.err) == (1, True)


def test_a_coordinator_that_vanished_is_unreachable_not_a_traceback(run: Umbel, tmp_path: Path) -> None:
    done(run("init", str(tmp_path / "state")))
    gone = '{"device": "127.0.0.1:1", "enrol": "127.0.0.1:1", "admin": "127.0.0.1:1"}'
    (tmp_path / "state" / "addresses.json").write_text(gone)
    result = run("status", "--state", str(tmp_path / "state"))
    assert (result.code, "no answer" in result.err) == (1, True)


def test_another_coordinators_identity_opens_nothing(umbel: Umbel, live: Live, tmp_path: Path) -> None:
    done(umbel("init", str(tmp_path / "other")))
    foreign = ("--identity", str(tmp_path / "other" / "admin"), "--server", live.addresses.admin)
    result = umbel("status", *foreign)
    assert (result.code, "no answer" in result.err) == (1, True)


def test_usage_errors_are_told_apart(run: Umbel) -> None:
    for words in (("tasks", "show"), ("no-such-verb",), ("versions", "show", "m", "zero"), ("status", "--what")):
        result = run(*words)
        assert (result.code, result.out) == (2, ""), words


def test_a_broken_audit_chain_is_exit_code_one(umbel: Umbel, live: Live) -> None:
    from sqlalchemy import delete

    from umbel_server.tables import AUDIT

    done(umbel("devices", "tokens", "create", "--population", POPULATION))
    with live.parts.store.transaction() as connection:
        connection.execute(delete(AUDIT).where(AUDIT.c.sequence == 1))
    result = umbel("audit", "verify", "--json")
    assert (result.code, result.json["intact"]) == (1, False)
    assert "row 1" in result.err


# Help and init.


def test_init_tells_what_it_made_and_what_it_trusts(run: Umbel, tmp_path: Path) -> None:
    tree = done(run("init", str(tmp_path / "state"), "--name", "fleet.example", "--json")).json
    assert Path(tree["server_authority"]).is_file()
    assert any("development trust" in warning for warning in tree["warnings"])
    assert "fleet.example" in (tmp_path / "state" / "config.toml").read_text()
    again = run("init", str(tmp_path / "state"))
    assert (again.code, "already" in again.err) == (1, True)


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_every_command_has_help_with_an_example_and_json() -> None:
    found = dict(commands(program()))
    assert len(found) >= 30
    for path, command in found.items():
        example = re.search(r"Example: umbel (.*)", command.help or "")
        assert example, path
        assert example[1].split()[: len(path)] == list(path), path
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--json" in options, path
        unexplained = [one.name for one in command.params if one.param_type_name == "option" and not one.help]
        assert not unexplained, path


def test_the_reference_page_names_every_option_and_every_setting() -> None:
    page = REFERENCE.read_text()
    for path, command in commands(program()):
        assert f"umbel {path[0]}" in page
        assert path[-1] in page
        missing = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        known_by_task_file = path == ("tasks", "create")
        assert known_by_task_file or not [option for option in missing if option not in page], path
    for setting in set(Settings.model_fields) - {"state"}:
        assert f"`{setting}`" in page, setting


def test_the_reference_pages_task_is_one(tmp_path: Path) -> None:
    block = re.search(r"```toml\n(.*?)```", REFERENCE.read_text(), re.DOTALL)
    assert block
    (tmp_path / "task.toml").write_text(block[1])
    task = task_from_message(read_task(tmp_path / "task.toml", {}, {}, None))
    assert (task.name, task.strategy.name, task.plan.hyperparameters) == ("shoulder", "FedAdam", {"lr": 0.05})


def test_the_reference_pages_task_tells_all_keys_and_their_defaults(tmp_path: Path) -> None:
    """In brackets where the example says something else."""
    page = REFERENCE.read_text()
    block = re.search(r"```toml\n(.*?)```", page, re.DOTALL)
    assert block
    (tmp_path / "task.toml").write_text(re.sub(r"= .+?# \(([^)]*)\)", r"= \1 # ", block[1]))
    default = Task("shoulder", "watches", "smartwatch")
    assert task_from_message(read_task(tmp_path / "task.toml", {}, {}, None)) == default
    named = {*re.findall(r"^\[?(\w+)\b", block[1], re.MULTILINE), "privacy", "state"}
    parts = (default, default.plan, default.strategy, default.validation)
    assert {entry.name for part in parts for entry in fields(part)} == named
    for entry in fields(PrivacySettings):
        row = re.search(rf"^\| .*`{entry.name}`.*? \| (.+?) \|", page, re.MULTILINE)
        assert row and entry.default in map(float, row[1].split(", ")), entry.name


@pytest.mark.parametrize(
    "odd",
    [
        'seed = "one"', "seed = -1", "goal = 2.5", "goal = true", 'updates_private = "no"', 'state = "paused"',
        "gaol = 3", "deadline_seconds = 2026-01-01", "over_selection = nan", "[plan]\nepochs = 1.5",
        "[plan]\nepochs = 4294967296", "[strategy]\nname = 3", "goal =",
    ],
)  # fmt: skip
def test_a_tasks_file_that_says_something_else_than_a_task_is_refused(tmp_path: Path, odd: str) -> None:
    (tmp_path / "task.toml").write_text(f'name = "a"\npopulation = "b"\nmodel = "c"\n{odd}\n')
    with pytest.raises(BadInput):
        read_task(tmp_path / "task.toml", {}, {}, None)


def test_a_date_in_a_rollouts_file_is_refused(umbel: Umbel, tmp_path: Path) -> None:
    (tmp_path / "rollout.toml").write_text("start_at = 2026-01-01T00:00:00Z\n")
    refused = umbel("rollouts", "create", "r", "--file", str(tmp_path / "rollout.toml"))
    assert refused.code == 1 and "POSIX seconds" in refused.err


def test_the_steps_of_the_help_can_be_taken(umbel: Umbel, live: Live) -> None:
    steps = re.findall(r"^\d\. umbel (.+)$", program().help or "", re.MULTILINE)
    assert steps[0].startswith("init") and steps[1] == "serve"
    for step in steps[2:5]:
        done(umbel(*step.replace("BUNDLE_DIR", BUNDLE).split()))


def test_the_command_starts_without_loading_the_server(tmp_path: Path) -> None:
    words = "import sys; from umbel_server.cli import program; program()"
    heavy = "print({'numpy', 'sqlalchemy', 'onnxruntime', 'flwr', 'torch', 'alembic'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", f"{words}; {heavy}"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_the_command_itself_answers(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("umbel")
    found = subprocess.run([command, "--help"], capture_output=True, text=True, check=True)
    for group in (
        "init",
        "serve",
        "models",
        "tasks",
        "rounds",
        "versions",
        "releases",
        "devices",
        "operators",
        "audit",
    ):
        assert group in found.stdout


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_500_000_000_000, "2.5 TB")]
)
def test_sizes_are_for_people(count: int, text: str) -> None:
    assert size(count) == text


def test_nothing_prints_in_colour_into_a_pipe(umbel: Umbel) -> None:
    assert "\x1b" not in done(umbel("status")).out
