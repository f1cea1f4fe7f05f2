"""The library truly plays: every scenario from its first second to its report, with fewer devices and rounds."""

from pathlib import Path

import pytest

from umbel_simulations import runs
from umbel_simulations.engines import Silent
from umbel_simulations.judgement import accepted_rounds, judge
from umbel_simulations.scenario_file import changed, find, library


@pytest.mark.slow
@pytest.mark.parametrize("name", library())
def test_a_scenario_of_the_library_plays_to_its_report(name: str, tmp_path: Path) -> None:
    whole = find(name)
    devices = min(60, whole.population.devices)
    short = {"task.rounds": 2, "task.goal": 8, "task.minimum": 4, "population.devices": devices, "hours": 3.0}
    if name == "shakespeare":
        short |= {"data.most_examples": 10, "data.users": 12}
    if name == "night-100k":  # three devices in a hundred make no cohort of sixty
        short |= {"population.mean_availability": 0.4, "population.check_in_hours": 0.5}
    run = runs.play(changed(whole, short), tmp_path, workers=2, progress=Silent())
    assert accepted_rounds(run.outcome) == 2, run.outcome.rounds
    assert (tmp_path / runs.PAGE).read_text("utf-8").count("<svg") >= 5
    asked = [name for name in whole.thresholds.__dataclass_fields__ if getattr(whole.thresholds, name) is not None]
    assert [check.name for check in judge(run.outcome)] == asked
    assert run.outcome.engine == "cohort" or run.outcome.invariants


@pytest.mark.slow
def test_the_shakespeare_scenario_learns_more_than_to_answer_with_the_commonest_character(tmp_path: Path) -> None:
    fewer = {"task.rounds": 3, "task.goal": 10, "data.users": 40, "data.most_examples": 60}
    run = runs.play(changed(find("shakespeare"), fewer), tmp_path, workers=2, progress=Silent())
    assert run.outcome.rounds[-1].accuracy is not None
    # A space everywhere is right in 16.4 % of places; too fast a gradient descent still stood there after 40 rounds.
    assert run.outcome.rounds[-1].accuracy > 0.2
