"""What holds for every test."""

from __future__ import annotations

import gc

import pytest


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare the collector all that was imported: torch alone is a million objects; Flower collects at each reply."""
    del session
    gc.collect()
    gc.freeze()
