"""One device process of the demo: enrol at both aggregators, take over one person's recordings, live as an agent.

It runs the verbs of `umbel-device` one after the other in one process, as an app that embeds the SDK would do its
steps. The recordings are handed over as a file, which is gone once they stand in the device's own store.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from umbel_client.cli import main as umbel_device

RECORDINGS: Final = "recordings.npz"
CODE: Final = "enrolment-code"
HELPER_CARD: Final = "helper-card.json"
HELPER_TOKEN: Final = "helper-token"  # noqa: S105 - a file's name


def live(home: Path) -> int:
    """Run a device in `home` until it is told to stop; returns the exit code of the first step that failed, or 0."""
    helper = ["--helper", str(home / HELPER_CARD), "--helper-token", f"@{home / HELPER_TOKEN}"]
    steps = (
        ["enrol", "--code", f"@{home / CODE}", *(helper if (home / HELPER_CARD).exists() else [])],
        ["examples", "import", str(home / RECORDINGS), "--subject", "wearer"],
        ["run", "--json"],
    )
    for step in steps:
        code = umbel_device(["--home", str(home), *step])
        if code:
            return code
        (home / CODE).unlink(missing_ok=True)
        (home / HELPER_TOKEN).unlink(missing_ok=True)
        if step[0] == "examples":
            (home / RECORDINGS).unlink()
    return 0


if __name__ == "__main__":
    sys.exit(live(Path(sys.argv[1])))
