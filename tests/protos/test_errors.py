"""The tree of errors is drawn as it is, and every leaf of it crosses the wire."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from umbel import errors
from umbel.errors import BY_CODE, Status, UmbelError, from_code


def classes() -> Iterator[type[UmbelError]]:
    """Every class in `umbel.errors`, the root first, children in the order in which they are defined."""

    def descend(parent: type[UmbelError]) -> Iterator[type[UmbelError]]:
        yield parent
        for child in parent.__subclasses__():
            if child.__module__ == errors.__name__:
                yield from descend(child)

    return descend(UmbelError)


CLASSES = tuple(classes())


def drawn() -> list[tuple[int, str]]:
    """(depth, name) of each line of the drawing."""
    assert errors.__doc__ is not None
    lines = re.findall(r"^    ((?:│   |    )*)(?:[├└]── )?([A-Z]\w+)", errors.__doc__, re.MULTILINE)
    root, *others = lines
    return [(0, root[1]), *((len(indent) // 4 + 1, name) for indent, name in others)]


def test_the_drawing_is_the_tree() -> None:
    real = [(len(cls.__mro__) - len(UmbelError.__mro__), cls.__name__) for cls in CLASSES]
    assert drawn() == real


def test_codes_are_unique_and_spelled_as_they_travel() -> None:
    codes = [cls.code for cls in CLASSES]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in codes)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_each_error_survives_the_wire(cls: type[UmbelError]) -> None:
    again = from_code(cls.code, "what happened; what to do")
    assert type(again) is cls
    assert str(again) == "what happened; what to do"
    assert BY_CODE[cls.code] is cls


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_each_error_has_a_code_of_its_own_a_status_and_a_sentence(cls: type[UmbelError]) -> None:
    assert "code" in vars(cls)
    assert isinstance(cls.status, Status)
    assert cls.__doc__
    assert cls.__doc__.endswith(".")


def test_a_newer_peers_error_is_still_an_error() -> None:
    assert type(from_code("invented-later", "words")) is UmbelError


@pytest.mark.parametrize(
    "words", ["gone\n2026-01-01 [info] all is well", "\x1b[2Jgone", "\x9b2J", "a\rb", "x" * 10_000, "\u202e"]
)
def test_the_far_sides_words_cannot_rewrite_a_log(words: str) -> None:
    told = str(from_code("not-found", words))
    assert told.isprintable() and len(told) <= 1000


def test_statuses_are_grpcs_own() -> None:
    import grpc

    assert {status.value for status in Status} <= {code.name for code in grpc.StatusCode}
