"""Node and npm are not among the project's own requirements: what needs them is tested where they are."""

from __future__ import annotations

import shutil


def has_node() -> bool:
    """Whether what is written in JavaScript can be tried here."""
    return bool(shutil.which("node") and shutil.which("npm"))
