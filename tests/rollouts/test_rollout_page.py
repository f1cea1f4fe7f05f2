"""Followed word for word, docs/how-to/roll-out-a-release.md takes a release to devices and back.

What the page takes for given stands before it: a coordinator with seven versions, the first of which a device has. Only
what the page says in prose is put between its commands: that keys moved, and that somebody kept the checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs_runner import run
from tests.server.processes import ALWAYS_READY
from tests.server.test_cli_releases import next_bundle
from umbel_models.zoo import bundle_path

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "roll-out-a-release.md"
BEFORE = """
```console
$ umbel init umbel-state
$ umbel serve &
$ until umbel status; do sleep 0.2; done > /dev/null 2>&1
$ umbel models add {first} --name smartwatch
$ for parent in 1 2 3 4 5 6; do umbel models add {next} --name smartwatch --parent $parent; done
$ for version in 2 3 1; do umbel versions publish smartwatch $version; done
$ umbel tasks create --name learn --population watches --model smartwatch --public
$ umbel devices tokens create --population watches --codes > code
$ umbel-device --home watch enrol --code @code
$ cp {always} watch/device.toml
$ umbel-device --home watch run --once
release 10 adopted
```
"""
SIGNERS = """```console
$ umbel keys status
releases-smartwatch ... yes
$ for key in 1:first 2:second 3:third; do
>   mv umbel-state/keys/releases/releases-smartwatch-${key%:*}.key ${key#*:}-signer.key
> done
```

"""


def between(page: str, here: str, block: str) -> str:
    assert page.count(here) == 1
    return page.replace(here, block + here)


@pytest.mark.slow
def test_the_page_takes_a_release_to_devices_and_back(tmp_path: Path) -> None:
    always = tmp_path / "device.toml"
    always.write_text(ALWAYS_READY)
    before = BEFORE.format(first=bundle_path("smartwatch"), next=next_bundle(tmp_path / "next"), always=always)
    page = PAGE.read_text("utf-8").replace("/var/www/umbel", "www")
    page = between(page, "```console\n$ umbel releases prepare smartwatch 7\n$ umbel releases draft", SIGNERS)
    page = between(page, "$ umbel audit key", "$ cp umbel-state/witness/checkpoints.txt .\n")
    folder = tmp_path / "reader"
    folder.mkdir()
    run(before + page, folder, timeout=240)
