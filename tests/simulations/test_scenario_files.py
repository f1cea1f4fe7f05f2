"""Scenarios are read strictly: each mistake is named with its file, line and key, and the nearest right one."""

from pathlib import Path

import pytest

from umbel.errors import BadInput, MalformedMessage, NotFound, OutOfBounds
from umbel_simulations.scenario import Data, PlanPart, Scenario, to_tree
from umbel_simulations.scenario_file import changed, find, library, load
from umbel_simulations.toml_lines import lines_of

GOOD = """\
name = "mine"
model = "digits"

[data]
federation = "digits"
partition = "iid"

[task]
goal = 10
rounds = 3

[task.plan]
lr = 0.1

[[adversaries]]
kind = "lazy"
share = 0.1

[[adversaries]]
kind = "nan"
share = 0.2
"""

OUTAGE = 'faults.outages = [{{ process = "coordinator", from_hour = 5, until_hour = {} }}]'
CRASHES = 'faults.crashes = [{{ process = "device", from_hour = 5, until_hour = {} }}]'


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_what_is_left_out_keeps_its_default(tmp_path: Path) -> None:
    scenario = load(written(tmp_path, GOOD))
    assert scenario.data == Data("digits", partition="iid")
    assert (scenario.task.goal, scenario.task.minimum, scenario.task.plan) == (10, 1, PlanPart(lr=0.1))
    assert [adversary.kind for adversary in scenario.adversaries] == ["lazy", "nan"]


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("goal = 10", "gaol = 10", r"mine\.toml, line 9, task\.gaol: .* did you mean 'goal'\?"),
        ("goal = 10", 'goal = "ten"', r"line 9, task\.goal is 'ten': it should be a valid integer"),
        ("goal = 10", "goal = 0", r"line 9, task\.goal is 0: it should be greater than or equal to 1"),
        ("rounds = 3", "minimum = 11", r"line 10: task: minimum 11 and goal 10"),
        ("lr = 0.1", "lr = -1.0", r"line 13, task\.plan\.lr is -1\.0"),
        ("lr = 0.1", "lr = true", r"line 13, task\.plan\.lr is True"),
        ("lr = 0.1", "lr = 0.1\nvalidation = [\n  1,\n]\nepochs = 0", r"line 17, task\.plan\.epochs is 0"),
        (
            "goal = 10",
            "deadline_seconds = 1e-9",
            r"task\.deadline_seconds is 1e-09: it should be greater than or equal to 1",
        ),
        (
            "[[adversaries]]",
            "[population]\ndevices = 1000000000000\n[[adversaries]]",
            r"population\.devices is 1000000000000",
        ),
        ("share = 0.2", "share = 2", r"line 21, adversaries\.1\.share is 2"),
        ("share = 0.2", "share = 0.95", r"line 15: adversaries: their shares together"),
        ("share = 0.2", "share = 0.004", r"line 21: adversaries\.1: a share of 0\.004 of 100 devices is"),
        (
            GOOD[GOOD.index("[[adversaries]]") :],
            '[[adversaries]]\nkind = "lazy"\nshare = 0.25\n' * 4 + "[population]\ndevices = 6\n",
            r"line 26: adversaries\.3: a share of 0\.25 of 6 devices is nobody beside those before it",
        ),
        (
            "[[adversaries]]",
            "[[shifts]]\nat_hour = 1\nshare = 0.004\n[[adversaries]]",
            r"shifts\.0: a share of 0\.004 of",
        ),
        (
            "[[adversaries]]",
            "[[shifts]]\nat_hour = 1\nby = 1e300\n[[adversaries]]",
            r"line 17, shifts\.0\.by is 1e\+300",
        ),
        ('kind = "nan"', 'kind = "nam"', r"line 20, adversaries\.1\.kind is 'nam': it should be 'sign-flip'"),
        ('federation = "digits"\n', "", r"line 4, data\.federation: it is missing"),
        ('"iid"', '"natural"', r"line 6: data: the digits have no natural users; choose partition"),
        ("[task.plan]", "[task.plam]", r"line 12, task\.plam: .* did you mean 'plan'\?"),
        ('name = "mine"', 'name = "my own"', r"line 1, name is 'my own'"),
        ('name = "mine"', "name = 2025-01-01", "write dates and times as numbers"),
        ("goal = 10", "goal = ", r"mine\.toml isn't TOML: .*line 9"),
        ("goal = 10", f"goal = {'9' * 5000}", r"mine\.toml isn't TOML: .*5000 digits"),
        (
            "[[adversaries]]",
            '[task.strategy]\nname = "FedAvgg"\n[[adversaries]]',
            r"task: no strategy is called 'FedAvgg'",
        ),
        (
            "[[adversaries]]",
            '[[faults.crashes]]\nprocess = "device"\nfrom_hour = 5\nuntil_hour = 3\n[[adversaries]]',
            r"line 15: faults: crashes can't come from hour 5.0 until hour 3.0",
        ),
        (
            "[[adversaries]]",
            '[[faults.crashes]]\nprocess = "device"\n' * 2 + "from_hour = 5\nuntil_hour = 2\n[[adversaries]]",
            r"line 17: faults: crashes can't come from hour 5.0 until hour 2.0",
        ),
        (
            "[[adversaries]]",
            "[[rollouts]]\nat_hour = 1\n[[rollouts]]\nat_hour = 2\ngate = { alpa = 1 }\n[[adversaries]]",
            r"line 19: rollouts: a gate has no setting 'alpa'",
        ),
        (
            "[[adversaries]]",
            '[[rollouts]]\nat_hour = 1\ncontent = "noisy"\nnoise = 1e39\n[[adversaries]]',
            r"line 18, rollouts\.0\.noise is 1e\+39: it should be less than or equal to 1000",
        ),
        ("lr = 0.1", "max_steps = 4294967296", r"line 13: task: max_steps is 4294967296; it must lie between"),
        ("[[adversaries]]", "[population]\ncheck_in_hours = 1e-9\n[[adversaries]]", "line 16, population.check_in_h"),
        ("[[adversaries]]", "[population]\nclock_error_hours = 1e9\n[[adversaries]]", "line 16, population.clock_er"),
        ("lr = 0.1", "epochs = 1000000000", r"line 13, task\.plan\.epochs is 1000000000"),
        (
            "[[adversaries]]",
            "[population]\nspeed_decades = 400\n[[adversaries]]",
            r"line 16, population\.speed_decades is",
        ),
        (
            "[[adversaries]]",
            "[[rollouts]]\nat_hour = 1\nwaves = [{ percent = 100, soak_hours = 50 }]\n[[adversaries]]",
            r"rollouts: a wave's soak time must lie between 0 and its deadline",
        ),
        ("[[adversaries]]", "[[rollouts]]\nat_hour = 1\ngate = { alpa = 1 }\n[[adversaries]]", r"no setting 'alpa'"),
        ('"iid"', '"iid"\nfolder = "here"', 'data: federation = "own" and a folder of archives go together'),
        (
            'federation = "digits"',
            'federation = "own"',
            'data: federation = "own" and a folder of archives go together',
        ),
        ("[data]", 'engine = "fleet"\nalgorithm = { kind = "scaffold" }\n[data]', 'only engine = "cohort" has'),
        ("[data]", 'population.availability = "trace"\n[data]', 'availability = "trace" and a trace file go together'),
        ("[data]", 'population.trace = "trace.pkl"\n[data]', 'availability = "trace" and a trace file go together'),
        *(
            ("[data]", f"population.time_zones = {zones}\n[data]", "time_zones must name at least one zone")
            for zones in ([], [0.0, 14.5], [-12.5])
        ),
        *(("[data]", f"{OUTAGE.format(hour)}\n[data]", "an outage must end after it began: 5.0 to") for hour in (4, 5)),
        *(
            ("[data]", f"rollouts = [{{ at_hour = 1, waves = [{waves}] }}]\n[data]", told)
            for waves, told in (
                ("", "rollouts: waves must rise"),
                ("{ percent = 25 }, { percent = 5 }", "rollouts: waves must rise"),
                ("{ percent = 25 }, { percent = 25 }", "rollouts: waves must rise"),
                ("{ percent = 101 }", r"rollouts: .*100"),
            )
        ),
    ],
)
def test_a_mistake_is_named_with_its_line_and_key(tmp_path: Path, right: str, wrong: str, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        load(written(tmp_path, GOOD.replace(right, wrong, 1)))


@pytest.mark.parametrize(
    ("right", "edge"),
    [
        ("share = 0.2", "share = 0.9"),
        ("share = 0.2", "share = 0.0"),
        (
            GOOD[GOOD.index("share = 0.1") :],
            '[[adversaries]]\nkind = "lazy"\n'.join(f"share = {share}\n" for share in (0.56, 0.34, 0.1)),
        ),
        ("[data]", "population.time_zones = [-12.0, 14.0]\n[data]"),
        *(("[data]", f"{CRASHES.format(hour)}\n[data]") for hour in (0, 5)),
        ("[data]", f"{OUTAGE.format(5.1)}\n[data]"),
        ("[data]", "rollouts = [{ at_hour = 1, waves = [{ percent = 100 }] }]\n[data]"),
    ],
)
def test_what_lies_just_within_the_limits_is_taken(tmp_path: Path, right: str, edge: str) -> None:
    load(written(tmp_path, GOOD.replace(right, edge, 1)))


def test_a_buffer_holds_as_many_reports_as_the_task_counts_at_least(tmp_path: Path) -> None:
    algorithm = 'engine = "cohort"\nalgorithm = { kind = "fedbuff", buffer = 3 }\n[data]'
    scenario = load(written(tmp_path, GOOD.replace("[data]", algorithm, 1)))
    assert changed(scenario, {"task.minimum": 3}).algorithm.buffer == 3
    with pytest.raises(OutOfBounds, match="a buffer of 3 never holds the 4 reports"):
        changed(scenario, {"task.minimum": 4})


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("goal = 10", "gaol = 10").replace("lr = 0.1", "lrr = 0.1")
    with pytest.raises(MalformedMessage) as refused:
        load(written(tmp_path, text))
    assert len(str(refused.value).splitlines()) == 2


def test_lines_are_right_after_values_over_several_lines() -> None:
    text = 'a = """\n[not.a.table]\n"""\nb = [\n 1, # x = 1\n]\n\n["q.r"]\nc.d = 1\ne = { f = [{ g = 1 }] }\n'
    lines = lines_of(text)
    assert lines[("b",)] == 4
    assert lines[("q.r",)] == 8
    assert lines[("q.r", "c", "d")] == 9
    assert lines[("q.r", "e", "f", 0, "g")] == 10
    assert lines_of("[[a]]\n[[a.b]]\nc = 1\n[[a]]\n[a.d]\ne = 1") == {
        ("a", 0): 1,
        ("a", 0, "b", 0): 2,
        ("a", 0, "b", 0, "c"): 3,
        ("a", 1): 4,
        ("a", 1, "d"): 5,
        ("a", 1, "d", "e"): 6,
    }


def test_files_are_named_from_the_scenarios_own_folder(tmp_path: Path) -> None:
    text = GOOD.replace('model = "digits"', 'model = "./bundles/mine"')
    assert load(written(tmp_path, text)).model == str((tmp_path / "bundles/mine").resolve())
    plain = written(tmp_path, GOOD.replace('model = "digits"', 'model = "mine"'))
    assert load(plain).model == "mine", "there is no such folder: a name of the zoo"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/manifest.json").touch()
    assert load(plain).model == str((tmp_path / "mine").resolve())


def test_values_can_be_changed_by_key() -> None:
    scenario = find("poisoned-fleet")
    other = changed(scenario, {"task.plan.lr": 0.5, "adversaries.1.share": 0.2, "seed": 9})
    assert (other.task.plan.lr, other.adversaries[1].share, other.seed) == (0.5, 0.2, 9)
    for key, value in (
        ("task.plan.lrr", 1),
        ("tusk.goal", 1),
        ("adversaries.7.share", 0.1),
        ("adversaries.7", {}),
        ("seed.of", 1),
        ("task.goal", "x"),
    ):
        with pytest.raises(BadInput, match=key.rsplit(".", 1)[0].split(".")[0]):
            changed(scenario, {key: value})
    with pytest.raises(OutOfBounds):
        changed(scenario, {"adversaries.0.share": 0.99})


def test_a_name_that_is_nearly_right_is_told() -> None:
    with pytest.raises(NotFound, match="did you mean 'smartwatch'"):
        find("smartwacht")
    with pytest.raises(NotFound, match="can't read"):
        find("nowhere.toml")


@pytest.mark.parametrize("name", library())
def test_each_scenario_of_the_library_reads_says_what_it_shows_and_what_must_hold(name: str) -> None:
    scenario = find(name)
    assert scenario.name == name and scenario.description
    assert scenario.thresholds.accepted_rounds
    assert isinstance(scenario, Scenario) and to_tree(scenario)["task"]["goal"] >= scenario.task.minimum


def test_the_library_has_what_its_page_promises() -> None:
    assert {
        "smartwatch", "shakespeare", "digits-dirichlet", "night-100k", "poisoned-fleet", "broken-release",
        "helper-outage", "coordinator-crashes", "calibration",
    } <= set(library())  # fmt: skip
