"""A device runs the runtime that its settings name; what isn't there, or makes no sense, it refuses in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from umbel.errors import MalformedMessage, NotFound
from umbel_client.config import load_config
from umbel_client.opening import RuntimeSettings, runtime_of


def test_without_settings_it_is_onnx_runtime(tmp_path: Path) -> None:
    assert runtime_of(load_config(tmp_path).runtime).name == "onnx"


def test_settings_choose_litert(tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_text('[runtime]\nname = "litert"\nthreads = 2\n')
    chosen = load_config(tmp_path).runtime
    assert chosen == RuntimeSettings("litert", 2)
    assert runtime_of(chosen).name == "litert"


def test_a_runtime_that_nobody_knows_is_not_found() -> None:
    with pytest.raises(NotFound, match="onnx and litert"):
        runtime_of(RuntimeSettings("abacus"))


def test_a_number_for_a_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "device.toml").write_text("[runtime]\nname = 7\n")
    with pytest.raises(MalformedMessage, match="name is 7"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("[privcy]\nminimum_cohort = 50", "privcy"),
        ("privacy = 50", "PrivacyPolicy must be a table"),
        ("[privacy]\nminimum_cohorts = 50", "minimum_cohorts"),
        ("[privacy]\nminimum_cohort = true", "minimum_cohort is True"),
        ("[privacy]\nminimum_cohort = 50.5", "minimum_cohort is 50.5"),
        ("[privacy]\nminimum_cohort = -1", "minimum_cohort is -1"),
        ("[privacy]\nminimum_noise_multiplier = nan", "minimum_noise_multiplier is nan"),
        ("[privacy", "isn't TOML"),
    ],
)
def test_a_setting_that_means_nothing_is_refused_and_never_passed_over(
    tmp_path: Path, written: str, named: str
) -> None:
    (tmp_path / "device.toml").write_text(written)
    with pytest.raises(MalformedMessage, match=named):
        load_config(tmp_path)


def test_settings_that_were_named_have_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        load_config(tmp_path, tmp_path / "elsewhere.toml")
