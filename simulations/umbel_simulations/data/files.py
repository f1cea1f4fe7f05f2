"""Data files that stand inside packages, read without importing those packages."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from umbel.errors import NotFound


def inside(module: str, package: str, path: str) -> Path:
    """A file or folder of an installed module.

    Args:
        module: its name on import.
        package: its name for pip.
        path: from the module's folder.

    Raises:
        NotFound: not installed, or without that file.
    """
    spec = find_spec(module)
    roots = list(spec.submodule_search_locations or []) if spec else []
    for root in roots:
        if (Path(root) / path).exists():
            return Path(root) / path
    raise NotFound(f"the data come with the package {package}, which isn't here: pip install 'umbel[examples]'")
