"""Which tests run on which of several workers: those of a file on one, as they share what the file prepares."""

from __future__ import annotations

from typing import Any, Final

from xdist.scheduler import LoadScopeScheduling

APART: Final = ("tests/test_docs_commands.py", "tests/test_streams.py", "tests/simulations/test_library.py")
"""Files whose tests share nothing, and take longer than most files do: at the end one worker would wait for another."""


class ByFile(LoadScopeScheduling):
    """Gives each worker whole files, in their order."""

    def __init__(self, config: Any, log: Any) -> None:
        config.option.loadscopereorder = False  # the longest come first already, and not by their number
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return nodeid if file in APART else file
