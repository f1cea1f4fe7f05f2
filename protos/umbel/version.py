"""Umbel's version, where the package's metadata takes it from.

Asking `importlib.metadata` for it would cost each device 3 MB of memory.
"""

from __future__ import annotations

VERSION = "0.1.0"
