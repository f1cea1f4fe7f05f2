"""The page that another party sets its helper up from is enough: followed word for word, a private round gets agreed.

Only what a single machine lacks is exchanged: the name helper.example.org and free ports. What the page takes for given
stands before it (a coordinator that runs, with a model and an enrolment code), and after it what must have come of it.
"""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.docs_runner import run
from umbel_models.zoo import bundle_path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "run-the-helper.md"
BEFORE = """
```console
$ umbel init umbel-state
$ umbel serve &
$ until umbel status; do sleep 0.2; done > /dev/null 2>&1
$ umbel models add {bundle} --name smartwatch
$ umbel devices tokens create --population wrists --count 1 --codes > code
$ cp umbel-state/release.pub .
```
"""
BETWEEN = """
```console
$ cp helper-state/card.json . && head -n 1 tokens.txt > token
```
"""
CONFIG_LINE = """```toml
helper = "/path/to/card.json"
```
"""
CONFIGURED = """```console
$ kill -TERM %1 && wait %1
$ sed -i "1i helper = \\"$PWD/card.json\\"" umbel-state/config.toml
$ umbel serve &
$ until umbel status; do sleep 0.2; done > /dev/null 2>&1
```
"""
AFTER = """
```console
$ umbel status
learn ... collecting
development trust
$ python -c "import urllib.request as it; print(it.urlopen('http://127.0.0.1:{health}/healthz').read().decode())"
"status": "ok"
$ umbel helper revoke --state helper-state @token
revoked
```
"""


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


@pytest.mark.slow
def test_the_page_alone_sets_up_a_helper_that_a_coordinator_and_a_device_work_with(tmp_path: Path) -> None:
    port, health = free_ports(2)
    page = PAGE.read_text("utf-8")
    assert page.count(CONFIG_LINE) == 1
    page = page.replace(CONFIG_LINE, CONFIGURED)
    page = page.replace("helper.example.org:7446", f"127.0.0.1:{port}").replace(
        "--health-port 7447", f"--health-port {health}"
    )
    # The reader of the coordinator's side gets card and token by hand, after the tokens were made.
    tokens = "A token is good for a week"
    assert page.count(tokens) == 1
    page = page.replace(tokens, BETWEEN + tokens)
    folder = tmp_path / "reader"
    folder.mkdir()
    run(BEFORE.format(bundle=bundle_path("smartwatch")) + page + AFTER.format(health=health), folder, timeout=240)
