"""What holds for every test."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True, scope="module")
def objects_of_before_are_not_searched() -> None:
    """Spare the collector what earlier modules left: torch is a million objects, and Flower collects at each reply."""
    gc.collect()
    gc.freeze()
