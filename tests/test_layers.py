"""What a device imports stays light, and every package tells its types. (Who may import whom: `make lint`.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "umbel": ROOT / "protos",
    "umbel_models": ROOT / "models",
    "umbel_client": ROOT / "client",
    "umbel_server": ROOT / "server",
    "umbel_simulations": ROOT / "simulations",
}
HEAVY = ("torch", "tensorflow", "flwr", "sqlalchemy", "onnx", "typer", "rich", "pydantic", "scipy", "prometheus_client")

IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(*sorted({name.partition(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("package", ["umbel", "umbel_client"])
def test_no_module_of_a_device_imports_anything_heavy(package: str) -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_ALL, package], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert package in imported
    assert not imported & set(HEAVY)


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_tells_its_types(package: str) -> None:
    assert (PACKAGES[package] / package / "py.typed").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_outgrows_one_mind(package: str) -> None:
    """400 lines are the house's limit for a file (docs/explanation/architecture.md)."""
    sources = [path for path in (PACKAGES[package] / package).rglob("*.py") if "_pb2" not in path.name]
    assert sources
    long = {str(path.relative_to(ROOT)): lines for path in sources if (lines := _lines(path)) > 400}
    assert not long


def _lines(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())
