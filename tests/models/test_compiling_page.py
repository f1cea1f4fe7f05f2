"""Whoever follows docs/how-to/compile-your-model.md compiles a module that Umbel has never seen in their own folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs_runner import run

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "compile-your-model.md"


@pytest.mark.slow
def test_a_module_outside_of_the_repository_is_compiled_checked_and_refused_as_the_page_says(tmp_path: Path) -> None:
    run(PAGE.read_text("utf-8"), tmp_path, timeout=300)
