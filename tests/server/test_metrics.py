"""What a coordinator tells Prometheus: all of it true, none of it about anybody, and whatever state it is in."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import promql_parser
import pytest
import sqlalchemy as sa
import yaml
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as from_openmetrics
from prometheus_client.parser import text_string_to_metric_families as from_text
from structlog.testing import capture_logs

from tests.databases import empty_database
from tests.server.drifting import AGE, counting, metrics, write_rounds
from tests.server.driving import World, task, together
from tests.server.live import MODEL, POPULATION, TASK, Live, LiveDevice, MovedClock, serving
from tests.test_docs_words import MENTION, unknown
from umbel import messages
from umbel.errors import BY_CODE, Status, Unavailable
from umbel.sealing import SEALED
from umbel.visit import CheckIn, SessionRecord
from umbel_server import task_records
from umbel_server.app import Server, build
from umbel_server.drift_windows import Windows
from umbel_server.folder import Folder
from umbel_server.helper.port import HelperPort
from umbel_server.helper.records import Records
from umbel_server.identity import Addresses
from umbel_server.monitoring.drift import Drift
from umbel_server.monitoring.families import Spread
from umbel_server.monitoring.fleet import reached_and_ended
from umbel_server.monitoring.helper import HelperMonitor
from umbel_server.monitoring.others import WatchedHelper
from umbel_server.monitoring.rounds import Rounds
from umbel_server.plain_http import Answer, Pages
from umbel_server.rollout import Stage
from umbel_server.round import RoundState
from umbel_server.settings import load_settings
from umbel_server.tables import ROUNDS
from umbel_server.task import Task
from umbel_server.task_records import TaskRecord

MONITORING = Path(__file__).parents[2] / "monitoring"
LABELS = {
    "certificate", "channel", "ending", "error", "kind", "le", "method", "model", "outcome", "population", "reached",
    "role", "rollout", "service", "stage", "state", "status", "task", "version", "what",
}  # fmt: skip
"""Names that operators or makers of models gave, and words of fixed lists."""


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A coordinator with a model, on which no round has ended yet."""
    with serving(tmp_path_factory.mktemp("metrics") / "state", metrics_port=0, inference_port=0) as live:
        begin(live)
        yield live
    with pytest.raises(urllib.error.URLError):
        read(live)


def begin(live: Live) -> None:
    """Open a round."""
    live.add_model()
    wanted = Task(TASK, POPULATION, MODEL, goal=1, minimum=1, rounds=9, updates_private=False)
    live.do(lambda: live.parts.coordinator.operations.create_task(wanted, "operator:test"))
    live.run(live.parts.coordinator.tick())


@pytest.fixture(scope="module")
def device(live: Live) -> LiveDevice:
    return live.device()


def read(live: Live, accept: str = "", path: str = "/metrics") -> tuple[str, str]:
    """A page, and its media type."""
    asked = urllib.request.Request(f"http://{live.addresses.metrics}{path}", headers={"Accept": accept})
    with urllib.request.urlopen(asked, timeout=8) as answer:  # less than a database is given to answer
        return answer.read().decode(), answer.headers["content-type"]


def scrape(live: Live) -> dict[str, float]:
    """Sample, as it is written -> number."""
    samples = [sample for family in from_text(read(live)[0]) for sample in family.samples]
    return {written(sample.name, **sample.labels): sample.value for sample in samples}


def written(name: str, **labels: str) -> str:
    return name + "{" + ",".join(f"{key}={labels[key]}" for key in sorted(labels)) + "}"


def of_round(name: str, **labels: str) -> str:
    return written(name, task=TASK, kind="train", **labels)


def test_a_round_that_completes_moves_what_it_should(live: Live, device: LiveDevice) -> None:
    before = scrape(live)
    begin, data = device.sealed(device.assignment())
    assert scrape(live)[of_round("umbel_open_round_sessions")] == 1
    device.report(begin, [data])
    live.run(live.parts.coordinator.tick())
    after = scrape(live)
    moved = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name)}
    assert of_round("umbel_rounds_total", outcome="completed") in before, "a rise from nothing is none to Prometheus"
    assert moved[of_round("umbel_rounds_total", outcome="completed")] == 1
    assert moved[of_round("umbel_round_seconds_count")] == moved[of_round("umbel_round_seconds_bucket", le="+Inf")] == 1
    assert moved[of_round("umbel_sessions_total", outcome="reported")] == 1
    assert moved[of_round("umbel_round_reports_total", outcome="completed")] == 1
    assert moved[of_round("umbel_round_received_bytes_total")] == len(data)
    report = {"service": "DeviceService", "method": "Report"}
    assert moved[written("umbel_rpc_calls_total", **report, status="OK", error="")] == 1
    assert moved[written("umbel_rpc_received_bytes_total", **report)] > len(data)
    assert moved[written("umbel_audit_rows_total")] > 0
    others = [name for name in moved if name.startswith(("umbel_rounds_", "umbel_sessions_", "umbel_round_reports_"))]
    assert len(others) == 3, "what didn't happen stays"
    assert after[of_round("umbel_open_round", state="collecting")] == 1
    assert after[of_round("umbel_open_round_goal")] == 1
    assert after[written("umbel_devices", population=POPULATION)] == 1
    assert after[written("umbel_tick_timestamp_seconds")] == pytest.approx(live.clock.now(), abs=60)
    assert not [name for name in before if "_total{" in name and after[name] < before[name]]


async def test_what_was_added_up_over_scrapes_is_what_a_new_process_reads(small_world: World) -> None:
    """A restart moves no counter of what the store knows, and nothing that only rises ever falls."""
    devices, running = small_world.enrol("a", "b"), Rounds()

    def told(by: Rounds) -> dict[str, float]:
        with small_world.store.reading() as connection:
            found = by.read(connection, task_records.everything(connection))
        return {written(it.name, **it.labels): it.value for family in found for it in family.samples}

    await small_world.begin(task(rounds=9, evaluate_candidates=True))
    before = told(running)
    for devices_come in (True, True, False, True, False, True, True, True, True):
        if devices_come:
            await together(*devices)
        else:
            await devices[0].check_in()
            small_world.clock.instant += 1000.0
        await small_world.coordinator.tick()
        now = told(running)
        assert now == told(Rounds()) == told(running)
        assert not [name for name in before if re.search("_(total|count|bucket){", name) and now[name] < before[name]]
        before = now
    ended = {name: int(value) for name, value in now.items() if name.startswith("umbel_rounds_total") and value}
    assert ended == {
        of_round("umbel_rounds_total", outcome="completed"): 3,
        of_round("umbel_rounds_total", outcome="failed"): 1,
        of_round("umbel_rounds_total", outcome="abandoned"): 1,
        written("umbel_rounds_total", task=TASK, kind="evaluate", outcome="completed"): 3,
        written("umbel_rounds_total", task=TASK, kind="evaluate", outcome="abandoned"): 1,
    }
    assert running._up_to[TASK] > 1


def test_drift_is_worked_out_once_for_each_round(small_world: World) -> None:
    world = small_world
    with world.store.transaction() as connection:
        task_records.insert(connection, TaskRecord(task(), 0.0))
    write_rounds(
        world.store, world.coordinator.registry, [metrics((0.7, 0.3, 0, 0), seed=it) for it in range(10)], TASK
    )
    running = Drift(world.coordinator.registry, Windows())

    def told() -> dict[str, float]:
        with world.store.reading() as connection:
            found = list(running.read(connection, task_records.everything(connection)))
        return {written(it.name, **it.labels): it.value for family in found for it in family.samples}

    assert told() == {}
    older = [metrics((0.3, 0.7, 0, 0), seed=it) for it in range(5)]
    write_rounds(world.store, world.coordinator.registry, older, TASK, first=11)
    found = told()
    assert found[written("umbel_drift_p_value", task=TASK, what="age")] == pytest.approx(1 / 3003)
    assert found[written("umbel_drift_psi", task=TASK, what="age")] > 0.5
    assert found[written("umbel_drift_p_value", task=TASK, what="right answers")] > 0.001
    with world.store.transaction() as connection:
        connection.execute(ROUNDS.update().where(ROUNDS.c.number == 7).values(metrics_json="{}"))
    assert told() == found, "rounds that are over don't change, and nobody looks again"
    write_rounds(world.store, world.coordinator.registry, older[:1], TASK, first=16)
    assert told() != found
    with world.store.transaction() as connection:
        task_records.update(connection, TaskRecord(task().done(), 0.0))
    assert told() == {}, "nobody is called for what is over"


def test_a_model_whose_manifest_is_gone_takes_no_other_number_with_it(small_world: World) -> None:
    with small_world.store.transaction() as connection:
        task_records.insert(connection, TaskRecord(task(), 0.0))
    write_rounds(small_world.store, small_world.coordinator.registry, [metrics((0.7, 0.3, 0, 0))] * 15, TASK)
    small_world.blobs.bundle_path(counting(AGE).manifest.digest).unlink()
    with small_world.store.reading() as connection:
        families = list(
            Drift(small_world.coordinator.registry, Windows()).read(connection, task_records.everything(connection))
        )
    assert [family.samples for family in families] == [[], []]


def test_names_units_and_words_follow_prometheus(live: Live) -> None:
    families = list(from_text(read(live)[0]))
    assert len(families) > 40
    for family in (it for it in families if not it.name.startswith("process_") and not it.name.endswith("_created")):
        assert re.fullmatch(r"umbel(_[a-z0-9]+)+", family.name)
        assert family.documentation.endswith(".") and family.type in ("counter", "gauge", "histogram")
        assert not re.search(r"_(ms|milliseconds|minutes|hours|days|kb|mb|percent|ratio|count|sum)\b", family.name)
        assert (family.type == "histogram") <= family.name.endswith("_seconds")
        assert not (family.type == "gauge" and family.name.endswith("_total"))
        for sample in family.samples:
            assert set(sample.labels) <= LABELS, sample


def test_nobody_can_be_told_apart(live: Live, device: LiveDevice) -> None:
    """What a device makes up becomes no label, nor does who it is, nor who an operator is."""
    told = (
        SessionRecord(TASK, 1, "-v[]+#", "round-closed: my name is Ada"),
        SessionRecord(TASK, 1, "-v[*", "my-own-code"),
        SessionRecord("my-own-task", 1, "-v[!"),
    )
    offer = CheckIn(POPULATION, ("onnx",), (SEALED,), training_examples=50, sessions=told, sdk="Ada's phone")
    device.stub.CheckIn(messages.check_in_to_message(offer))
    live.do(lambda: live.parts.coordinator.fleet.flush(live.clock.now()))
    samples = scrape(live)
    assert samples[written("umbel_devices_seen_lately", population=POPULATION)] == 1
    reached = {"task": TASK, "reached": "report-started", "ending": "report-refused"}
    assert samples[written("umbel_device_sessions_total", **reached)] == 1
    errors = {
        error: written("umbel_device_session_errors_total", task=TASK, error=error)
        for error in ("round-closed", "other")
    }
    assert [samples[name] for name in errors.values()] == [1, 1]
    page = read(live)[0]
    people = [one.id for one in live.do(live.parts.operators.all)]
    for secret in (device.id, *people, "Ada", "my-own"):
        assert secret not in page


def test_every_shape_has_a_step_and_an_ending() -> None:
    assert reached_and_ended("-v[]+^") == ("report-started", "report-accepted")
    assert reached_and_ended("-v[!") == ("training-started", "interrupted")
    assert reached_and_ended("-v") == ("fetched", "")
    assert reached_and_ended("*") == ("", "failed")
    assert reached_and_ended("") == ("", "")


def test_a_bucket_holds_what_is_not_above_its_bound() -> None:
    spread = Spread((1.0, 10.0))
    for value in (0.0, 1.0, 1.5, 11.0):
        spread.add(value)
    assert (spread.buckets(), spread.total) == ([("1.0", 2), ("10.0", 3), ("+Inf", 4)], 13.5)


def test_openmetrics_is_spoken_with_those_who_ask_for_it(live: Live) -> None:
    text, kind = read(live, "application/openmetrics-text; version=1.0.0, text/plain; q=0.5")
    assert kind.startswith("application/openmetrics-text; version=1.0.0") and text.endswith("# EOF\n")
    assert "umbel_rounds" in {family.name for family in from_openmetrics(text)}
    assert read(live)[1].startswith("text/plain; version=0.0.4")


def test_while_the_database_is_away_the_rest_is_told(live: Live) -> None:
    before, database = scrape(live), live.settings.state / "umbel.db"

    def go_away() -> None:
        live.parts.store.close()
        database.rename(database.with_suffix(".away"))
        database.mkdir()

    def come_back() -> None:
        database.rmdir()
        database.with_suffix(".away").rename(database)

    assert before[written("umbel_database_up")] == 1
    with capture_logs():  # to draw tracebacks takes seconds
        live.do(go_away)
        try:
            away = scrape(live)
        finally:
            live.do(come_back)
    assert away[written("umbel_database_up")] == 0
    assert away[written("umbel_database_errors_total")] > before[written("umbel_database_errors_total")]
    assert of_round("umbel_rounds_total", outcome="completed") not in away
    assert away[written("umbel_disk_free_bytes")] > 0
    after = scrape(live)
    assert after[written("umbel_database_up")] == 1
    assert not [name for name in before if "_total{" in name and after[name] < before[name]]


def test_a_database_that_stands_still_holds_up_nobody_who_watches(
    postgresql: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, up = empty_database(postgresql), written("umbel_database_up")
    with serving(tmp_path / "state", metrics_port=0, database_url=url) as live:
        begin(live)
        live.device()
        assert (before := scrape(live))[up] == before[written("umbel_devices", population=POPULATION)] == 1
        assert before[of_round("umbel_open_round", state="collecting")] == 1
        with sa.create_engine(url, poolclass=sa.NullPool).begin() as other, monkeypatch.context() as impatient:
            other.execute(sa.text("LOCK TABLE session_shapes IN ACCESS EXCLUSIVE MODE"))
            impatient.setattr("umbel_server.monitoring.monitor.PATIENCE_SECONDS", 0.05)
            question = sa.text(
                "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%FROM session_shapes%'"
            )
            stood = [scrape(live)]
            while other.scalar(question) < 2 and len(stood) < 100:
                stood.append(scrape(live))
            stood.append(scrape(live))
            assert other.scalar(question) == 2, "this very question, and one reading that all scrapes wait for"
        assert {(it[up], it[written("umbel_disk_free_bytes")] > 0) for it in stood} == {(0, True)}
        assert scrape(live)[up] == 1


def test_coordinators_of_one_process_do_not_mix(live: Live) -> None:
    assert not [family for family in REGISTRY.collect() if family.name.startswith("umbel")]


def test_the_port_is_told_and_older_readers_cope(live: Live) -> None:
    addresses = Addresses.read(live.settings.state)
    assert addresses == live.addresses and addresses.metrics
    assert Addresses("a", "b", "c").metrics == ""


# Alerts, the dashboard and the page about them.


def exposed(live: Live) -> dict[str, str]:
    """Each sample's name -> what it is, of a coordinator with a helper and of a helper."""
    registry = CollectorRegistry()
    WatchedHelper(cast(HelperPort, None), registry)
    helper = HelperMonitor(Records())
    pages = (read(live)[0], *(generate_latest(it).decode() for it in (registry, helper.registry)))
    families = [family for page in pages for family in from_text(page) if not family.name.endswith("_created")]
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return {it.name + suffix: it.type for it in families for suffix in suffixes.get(it.type, ("",))}


def expressions() -> dict[str, str]:
    """Where it stands -> PromQL."""
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    found = {rule["alert"]: rule["expr"] for rule in rules}
    for panel in json.loads((MONITORING / "dashboard.json").read_text())["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "5m")
            found[f"{panel['title']} {target['refId']}"] = expression.replace("$instance", ".*")
    return found


def parsed(expression: str) -> list[Any]:
    """All parts of an expression; raises `ValueError` where it is none."""
    found: list[Any] = []
    promql_parser.walk(promql_parser.parse(expression), lambda part: found.append(part))
    return found


def test_alerts_and_dashboard_ask_only_for_what_there_is(live: Live) -> None:
    """A name or a word that is misspelt there would be silent for ever."""
    names = exposed(live) | {"up": "gauge"}
    samples = [sample for family in from_text(read(live)[0]) for sample in family.samples]
    words = {value for sample in samples for value in sample.labels.values()}
    words |= (
        {it.value for kind in (Stage, RoundState) for it in kind} | {status.value for status in Status} | set(BY_CODE)
    )
    asked = set()
    for where, expression in expressions().items():
        parts = parsed(expression)
        for selector in (part for part in parts if isinstance(part, promql_parser.VectorSelector)):
            asked.add(selector.name)
            assert selector.name in names, where
            for matcher in selector.matchers.matchers:
                assert matcher.name in LABELS | {"instance", "job"}, where
                if matcher.name not in ("instance", "job"):
                    assert set(matcher.value.split("|")) <= words | {""}, where
        for call in (part for part in parts if isinstance(part, promql_parser.Call)):
            if call.func.name in ("rate", "increase"):
                (selector,) = (it.vector_selector for it in call.args)
                assert names[selector.name] in ("counter", "histogram"), where
    unseen = {name for name in names if name.startswith("umbel_") and not name.endswith(("_sum", "_count"))} - asked
    assert not unseen, "nobody looks at these"


def test_the_page_names_what_there_is(live: Live) -> None:
    page = (MONITORING.parent / "docs" / "how-to" / "watch-a-coordinator.md").read_text()
    named = set(re.findall(r"\bumbel_[a-z_]+", page))
    assert named == {re.sub("_(bucket|sum|count)$", "", name) for name in exposed(live) if name.startswith("umbel_")}


def test_each_alert_says_what_to_do() -> None:
    rules = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        summary = rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("page", "ticket") and 80 < len(summary) < 300, rule["alert"]
        assert set(re.findall(r"\$labels\.(\w+)", summary)) <= LABELS | {"instance"}
        typed = [it.group(1) for it in MENTION.finditer(re.sub(r"{{.*?}}", "X", summary))]
        assert not [command for command in typed if unknown(command)], rule["alert"]


# Plain HTTP.


async def ask(address: str, request: bytes) -> str:
    reader, writer = await asyncio.open_connection(*address.split(":"))
    writer.write(request)
    answered = (await reader.read()).decode()
    writer.close()
    return answered


async def test_nothing_but_its_pages_is_answered() -> None:
    async def page(accept: str) -> Answer:
        if not accept:
            raise ZeroDivisionError("secret-7")
        return Answer(accept.encode(), "text/plain")

    pages = Pages({"/metrics": page})
    address = await pages.open("127.0.0.1", 0)
    try:
        found = await ask(address, b"GET /metrics?name=x HTTP/1.1\r\naccept: a\r\nAccept:b\r\n\r\n")
        assert found.startswith("HTTP/1.1 200 OK\r\n") and found.endswith("\r\n\r\n a,b")
        with capture_logs() as logs:
            failed = await ask(address, b"GET /metrics HTTP/1.1\r\n\r\n")
        assert failed.startswith("HTTP/1.1 500 ") and "secret-7" not in failed
        assert [entry["event"] for entry in logs] == ["a page failed"]
        for asked in (b"GET / HTTP/1.1", b"GET /metrics/.. HTTP/1.1", b"GET", b"", b"\xff\xfe"):
            assert (await ask(address, asked + b"\r\n\r\n")).startswith("HTTP/1.1 404 ")
        assert (await ask(address, b"POST /metrics HTTP/1.1\r\n\r\n")).startswith("HTTP/1.1 405 ")
        assert await ask(address, b"GET /metrics HTTP/1.1\r\n" + b"x" * 100_000) == ""
    finally:
        await pages.close()
    with pytest.raises(ConnectionRefusedError):
        await ask(address, b"")


async def test_who_asks_nothing_is_hung_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umbel_server.plain_http.REQUEST_SECONDS", 0.02)
    pages = Pages({})
    address = await pages.open("127.0.0.1", 0)
    assert await ask(address, b"GET /met") == ""
    await pages.close()


async def test_a_metrics_port_that_is_taken_is_told(tmp_path: Path) -> None:
    clock = MovedClock()
    Folder.create(tmp_path, (), clock.now())
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        settings = load_settings(tmp_path, device_port=0, enrol_port=0, admin_port=0, metrics_port=port)
        server = Server(settings, build(settings, clock), clock)
        with pytest.raises(Unavailable, match=f"can't listen at 127.0.0.1:{port}; is another program"):
            await server.start()
        await server.stop()
