"""Every guard that `python -m tests.mutation` takes out still stands where its list says, once and with its tests."""

from __future__ import annotations

from pathlib import Path

from tests.mutation import access, guards, releases, rollouts, serving

ROOT = Path(__file__).parents[1]
EVERY = (*guards.GUARDS, *releases.GUARDS, *rollouts.GUARDS, *access.GUARDS, *serving.GUARDS)


def test_every_mutant_finds_its_guard_and_the_tests_that_keep_it() -> None:
    assert len(EVERY) > 300
    lost = [f"{m.name} ({m.file})" for m in EVERY if (ROOT / m.file).read_text().count(m.before) != 1]
    assert not lost, f"edited since; follow them to their new text: {lost}"
    tests = {test.partition("::")[0] for m in EVERY for test in m.tests if not test.startswith("-")}
    missing = sorted(test for test in tests if not (ROOT / test).exists())
    assert not missing
