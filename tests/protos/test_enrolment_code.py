"""The line that an operator hands to a device comes back whole, or is refused in words; its token doesn't print."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel.enrolment_code import PREFIX, EnrolmentCode
from umbel.errors import MalformedMessage
from umbel.randomness import generator

CODE = EnrolmentCode("coordinator.example:8441", "a-secret-token", b"-----BEGIN CERTIFICATE-----\n")
filled = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


def spelled(tree: object) -> str:
    return PREFIX + base64.urlsafe_b64encode(json.dumps(tree).encode()).decode()


@given(st.builds(EnrolmentCode, filled, filled, filled.map(str.encode)))
def test_a_code_comes_back(code: EnrolmentCode) -> None:
    assert EnrolmentCode.from_text(f"  {code.to_text()}\n") == code


@pytest.mark.parametrize(
    "text",
    [
        "",
        PREFIX,
        PREFIX + "!!!",
        PREFIX + "é",
        "umbel-enrol-2." + CODE.to_text().removeprefix(PREFIX),
        CODE.to_text()[:-9],
        PREFIX + base64.urlsafe_b64encode(b"[" * 200_000).decode(),
        spelled([]),
        spelled({"server": "s", "token": "t"}),
        spelled({"server": "s", "token": None, "authority": "a"}),
        spelled({"server": ["s"], "token": "t", "authority": "a"}),
        spelled({"server": "", "token": "t", "authority": "a"}),
        spelled({"server": "s", "token": "t", "authority": "\ud800"}),
    ],
    ids=lambda text: ascii(text[:24]),
)
def test_anything_else_is_refused_in_words(text: str) -> None:
    with pytest.raises(MalformedMessage, match="ask the operator for a new one"):
        EnrolmentCode.from_text(text)


def test_no_damaged_code_gets_anything_but_a_refusal_out() -> None:
    chance = generator("fuzz", "enrolment code")
    for _ in range(2_000):
        letters = list(CODE.to_text())
        for _ in range(int(chance.integers(1, 4))):
            letters[int(chance.integers(len(letters)))] = chr(int(chance.integers(1, 0x300)))
        try:
            EnrolmentCode.from_text("".join(letters))
        except MalformedMessage as refusal:
            assert CODE.token not in str(refusal)


def test_the_token_does_not_print() -> None:
    assert CODE.token not in repr(CODE)
    assert "14 letters" in repr(CODE)
