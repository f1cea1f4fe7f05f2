"""The base install is the device SDK: light, and without anything that belongs to the coordinator or the compiler."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from umbel_server.folder import Folder

LIMIT_MB = 260
UNWANTED = {"torch", "tensorflow", "flwr", "sqlalchemy", "pydantic", "typer", "rich", "onnx", "ray"}


def closure(name: str) -> dict[str, Distribution]:
    """A distribution and all that its install without extras brings, by normalised name."""
    found: dict[str, Distribution] = {}
    waiting = [name]
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        for text in found[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def megabytes(installed: Distribution) -> float:
    files = [installed.locate_file(file) for file in installed.files or []]
    return sum(path.stat().st_size for path in files if path.is_file()) / 1e6  # type: ignore[attr-defined]


def test_the_base_install_is_light_and_brings_nothing_of_the_coordinator() -> None:
    found = closure("umbel")
    assert {"numpy", "grpcio", "onnxruntime", "cryptography", "zstandard"} <= set(found)
    assert not UNWANTED & set(found)
    total = sum(megabytes(installed) for installed in found.values())
    assert 50 < total < LIMIT_MB


_EVERYTHING = """
import json, pkgutil, sys
import umbel_client
after_face = sorted(sys.modules)
from umbel_client import *
import importlib
for module in pkgutil.walk_packages(umbel_client.__path__, "umbel_client."):
    importlib.import_module(module.name)
print(json.dumps([after_face, sorted(sys.modules)]))
"""


def test_importing_the_sdk_imports_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", _EVERYTHING], capture_output=True, text=True, check=True)
    face, everything = json.loads(done.stdout)
    assert not {"numpy", "grpc", "onnxruntime", "cryptography"} & set(face)
    assert not (UNWANTED | {"umbel_server", "umbel_models"}) & {name.partition(".")[0] for name in everything}


@pytest.mark.parametrize(
    ("lacking", "program", "words", "says"),
    [
        ("typer", "umbel_server.cli", "status", "umbel needs typer: pip install 'umbel[server]'"),
        ("structlog", "umbel_server.cli", "serve --state made", "umbel needs structlog: pip install 'umbel[server]'"),
        (
            "psycopg",
            "umbel_server.cli",
            "serve --state made --database-url postgresql+psycopg://localhost/umbel",
            "umbel needs psycopg: pip install 'umbel[server,postgres]'",
        ),
        ("typer", "umbel_models.cli", "inspect it", "umbel-compile needs typer: pip install 'umbel[compile]'"),
        ("typer", "umbel_simulations.cli", "list", "umbel-simulate needs typer: pip install 'umbel[simulate]'"),
    ],
)
def test_a_program_whose_extra_is_not_installed_names_it(
    lacking: str, program: str, words: str, says: str, tmp_path: Path
) -> None:
    if "made" in words:
        Folder.create(tmp_path / "made", (), time.time())
    code = f"import sys; sys.modules[{lacking!r}] = None; from {program} import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *words.split()], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, says + "\n")
