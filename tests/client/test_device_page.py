"""docs/reference/umbel-device.md has every option, every setting with its default, and every key of a status."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

from tests.test_docs_words import DEVICE, Command, verbs_and_options
from umbel_client.config import DeviceConfig
from umbel_client.status import DeviceStatus

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "umbel-device.md").read_text("utf-8")


def told(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_the_page_has_every_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^\|(?: [^|]+ \|| \|)? `(\w+)` \| ?([^|]*?) \|", PAGE, re.MULTILINE))
    settings = {
        setting.name: told(getattr(table, setting.name))
        for table in (getattr(DeviceConfig(), part.name) for part in fields(DeviceConfig))
        for setting in fields(table)
    }
    assert {name: rows.get(name) for name in settings} == settings
    assert all(f"`[{part.name}]`" in PAGE for part in fields(DeviceConfig))


def test_the_page_has_every_verb_and_option() -> None:
    def missing(command: Command) -> set[str]:
        verbs, options = verbs_and_options(command)
        lacking = {word for word in {*verbs, *options} if word not in PAGE and word not in ("-h", "--help")}
        return lacking.union(*map(missing, verbs.values()))

    assert not missing(DEVICE)


def test_the_page_has_every_fact_of_a_status() -> None:
    assert not [fact.name for fact in fields(DeviceStatus) if f"`{fact.name}`" not in PAGE]
