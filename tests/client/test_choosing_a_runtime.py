"""A device runs the runtime that its settings name, and refuses one that isn't there in words."""

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
