"""What holds for every test."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.databases import running_postgresql
from tests.javascript.node import has_node

MEMORY = Path("/dev/shm")
"""A file system in memory, where Linux has one."""
ROOM = 1 << 30
"""Bytes that must be free there: many times what tests hold at once, as a test's files go with it unless it failed."""

# Of most strategies each example takes milliseconds; who needs more of them says so.
settings.register_profile("house", max_examples=40)
settings.load_profile("house")
# A test makes thousands of objects that live as long as itself: looking through the young ones finds none to let go.
gc.set_threshold(10_000, 20, 20)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out."""
    if not has_node():
        terminalreporter.write_line("left out, as node and npm aren't here: most of tests/javascript")


def pytest_configure() -> None:
    """Let tests write in memory where there is room: some waited for a disk for a quarter of their time."""
    if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= ROOM:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The pages of the docs first: each takes as long as hundreds of tests, and at the end one worker would be idle."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: Any, log: Any) -> object:
    """Keep a file's tests together, unless another way was asked for."""
    from tests.sharing_out import ByFile

    return ByFile(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(autouse=True, scope="module")
def objects_of_before_are_not_searched() -> None:
    """Spare the collector what earlier modules left: torch is a million objects, and Flower collects at each reply."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The address of a PostgreSQL server that lives as long as the test session."""
    with running_postgresql() as address:
        yield address
