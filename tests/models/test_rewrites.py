"""The functions of torch that are replaced while tracing: ours are called as theirs are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from umbel_models.rewrites import REPLACED

_FIRST = {"input", "tensor"}
"""What torch calls the first argument; the mode hands it over without its name."""


def names_of(function: Callable[..., Any]) -> list[str]:
    """The names of a function's arguments; nothing where torch doesn't tell them, or takes any."""
    try:
        names = list(inspect.signature(function).parameters)
    except ValueError:
        return []
    return [] if {"args", "_"} & set(names) else names


KNOWN = [function for function in REPLACED if names_of(function) and names_of(REPLACED[function])]


@pytest.mark.parametrize("function", KNOWN, ids=[function.__name__ for function in KNOWN])
def test_arguments_have_the_names_that_torch_gives_them(function: Callable[..., Any]) -> None:
    theirs, ours = names_of(function), names_of(REPLACED[function])
    assert theirs[0] in _FIRST or theirs[0] == ours[0]
    assert theirs[1:] == ours[1 : len(theirs)]


def test_most_are_known() -> None:
    assert len(KNOWN) >= 12
