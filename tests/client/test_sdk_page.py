"""docs/reference/device-sdk.md has each name of the SDK, what calls take and raise, and nothing that isn't there."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import umbel_client
from umbel import errors
from umbel.clock import Clock
from umbel.runtime import Runtime
from umbel.visit import Outcome, ReleaseOutcome, SessionRecord
from umbel_client import Channel, Device, DeviceStatus, Ending, ExampleStore, StatusSource, Visit, enrol

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "device-sdk.md").read_text("utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
CALLS = [name for name in vars(Device) if not name.startswith("_") and name != "open"]


def table(text: str) -> dict[str, str]:
    """Each name in a first cell -> its whole row."""
    rows = re.findall(r"^\| .*\|$", text, re.MULTILINE)
    return {name: row for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def of_device(name: str) -> str:
    (row,) = [row for told, row in table(PAGE).items() if re.match(rf"(await )?device\.{name}\b", told)]
    return row


def raised(call: Any) -> set[str]:
    """The classes that a docstring says it raises."""
    _, _, said = (inspect.getdoc(call) or "").partition("Raises:\n")
    return {name for names in re.findall(r"^    ([A-Z][\w, ]+):", said, re.MULTILINE) for name in names.split(", ")}


def members(seam: type) -> set[str]:
    return {name for name in {*vars(seam), *seam.__annotations__} if not name.startswith("_")}


def test_every_name_of_the_sdk_is_on_the_page() -> None:
    assert not [name for name in umbel_client.__all__ if not re.search(rf"`(await )?{name}\b", PAGE)]


@pytest.mark.parametrize("name", CALLS)
def test_every_call_of_a_device_has_a_row_with_what_it_raises(name: str) -> None:
    found = inspect.getattr_static(Device, name)
    row = of_device(name)
    assert not [error for error in raised(found) if f"`{error}`" not in row]


def test_no_call_is_on_the_page_that_a_device_does_not_have() -> None:
    called = re.findall(r"(?<!-)\bdevice\.([a-z_]+)", PAGE)
    assert set(called) - {"toml"} == {*CALLS}


def test_what_calls_take_is_on_the_page() -> None:
    learn_from = inspect.signature(Device.learn_from).parameters
    bare = [given.replace(annotation=inspect.Parameter.empty) for name, given in learn_from.items() if name != "self"]
    assert f"device.learn_from{inspect.Signature(bare)}".replace("'", '"') in table(PAGE)
    assert [*table(SECTIONS["Open"])] == [*inspect.signature(Device.open).parameters][1:]
    arguments = inspect.signature(enrol).parameters
    assert [*table(SECTIONS["Enrol"])] == [*arguments]
    for name, row in table(SECTIONS["Enrol"]).items():
        default = arguments[name].default
        told = "" if default is inspect.Parameter.empty else f"`{default!r}`".replace("'", '"')
        assert row.split("|")[2].strip() == told, name
    for call, section in ((Device.open, "Open"), (enrol, "Enrol")):
        assert not [name for name in raised(call) if f"`{name}`" not in SECTIONS[section].partition("Raises ")[2]]


def test_what_comes_back_is_on_the_page() -> None:
    visit = table(SECTIONS["Visit"])
    assert [one.name for one in Ending] == [name for name in visit if name.isupper()]
    assert {field.name for field in fields(Visit)} <= set(visit)
    told = {field.name for value in (ReleaseOutcome, SessionRecord) for field in fields(value)} - {"execution"}
    assert not [name for name in told if f"`{name}`" not in visit["release"] + visit["session"]]
    assert not [one.value for one in Outcome if f"`{one.value}`" not in SECTIONS["Visit"]]
    assert not [one.name for one in fields(DeviceStatus) if f"`{one.name}`" not in SECTIONS["The machine's status"]]


@pytest.mark.parametrize("seam", [Channel, ExampleStore, StatusSource, Runtime, Clock], ids=lambda seam: seam.__name__)
def test_a_seam_has_the_methods_that_the_page_names(seam: type) -> None:
    row = table(SECTIONS["Parts of your own"])[seam.__name__]
    assert {*re.findall(r"`(\w+)`", row.split("|")[2])} == members(seam)


def test_errors_stand_beneath_the_class_that_the_page_puts_them_under() -> None:
    for row in re.findall(r"^\| `[A-Z].*\|$", SECTIONS["Errors"], re.MULTILINE):
        classes, codes = (re.findall(r"`([\w-]+)`", cell) for cell in row.split("|")[1:3])
        first = getattr(errors, classes[0])
        assert codes[0] == first.code
        if ":" in row.split("|")[1]:
            assert all(issubclass(getattr(errors, name), first) for name in classes[1:])
        for name, code in zip(classes, codes, strict=False):
            assert getattr(errors, name).code == code
