"""Questions to models as Prometheus reads them."""

from __future__ import annotations

import urllib.request
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.server.live import MODEL, Live, refused, serving
from tests.serving.asking import INPUTS, add_version, identity, publish, question, stub, until
from umbel.oip import open_inference_pb2 as pb


def scraped(live: Live) -> dict[tuple[str, ...], float]:
    """Each number under its name and the values of its labels."""
    with urllib.request.urlopen(f"http://{live.addresses.metrics}/metrics", timeout=20) as page:
        families = text_string_to_metric_families(page.read().decode())
    return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}


def test_questions_are_counted_by_model_and_outcome_and_what_callers_make_up_is_not(tmp_path: Path) -> None:
    with serving(tmp_path / "state", inference_port=0, metrics_port=0) as live:
        live.add_model()
        publish(live, 1)
        publish(live, add_version(live, tmp_path / "two", 0.01), "beta")
        asking = stub(live, identity(live, "caller"))
        until(lambda: len(asking.RepositoryIndex(pb.RepositoryIndexRequest()).models) == 2)
        for version in ("", "beta"):
            asking.ModelInfer(question(version=version))
        wrong = [question(model="made-up"), question(version="made-up"), question({"x": INPUTS["x"][:, :3]})]
        for one in wrong:
            with refused():
                asking.ModelInfer(one)
        until(lambda: ("umbel_inference_version", "beta", MODEL) in scraped(live))
        found = scraped(live)
        counted = {name: value for name, value in found.items() if name[0] == "umbel_inferences_total"}
        assert counted == {
            ("umbel_inferences_total", MODEL, "answered"): 2,
            ("umbel_inferences_total", MODEL, "not-found"): 1,
            ("umbel_inferences_total", MODEL, "input-mismatch"): 1,
            ("umbel_inferences_total", "", "not-found"): 1,
        }
        assert found["umbel_inference_examples_total", MODEL] == 2 * len(INPUTS["x"])
        assert found["umbel_inference_ran_seconds_count", MODEL] == 2
        assert found["umbel_inferences_open",] == 0
        assert found["umbel_inference_records_dropped_total",] == 0
        versions = {channel: found["umbel_inference_version", channel, MODEL] for channel in ("stable", "beta")}
        assert versions == {"stable": 1, "beta": 2}
        assert found["umbel_inference_current", "stable", MODEL] == 1
        assert not any("made-up" in name for name in found)
