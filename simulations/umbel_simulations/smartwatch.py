"""Real data for demos, benchmarks and tests: shoulder exercises recorded by smartwatches.

The recordings stand inside the `seglearn` package (BSD; Burns et al. 2018, arXiv:1802.01489): ten people wore a watch
on either wrist and did seven exercises; accelerometer (g) and gyroscope (rad/s), three axes each, at 50 Hz. A person's
wrist is one natural user of a device: twenty in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from umbel.errors import NotFound

WINDOW: Final = 100
"""Steps in a window: two seconds."""
STRIDE: Final = 25
HELD_BACK_SHARE: Final = 0.2


@dataclass(frozen=True, slots=True, eq=False)
class Windows:
    """Windows and what was done in them: `x` float32 [N, 6, 100], `y` int64 [N]."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True, slots=True, eq=False)
class Wearer:
    """One wrist of one person: what a device would record first (training) and last (held back)."""

    name: str
    training: Windows
    held_back: Windows


def load_wearers() -> list[Wearer]:
    """All twenty wearers, by person and wrist.

    Raises:
        NotFound: `seglearn` isn't installed (it comes with the extra `examples`).
    """
    recordings = _load_recordings()
    people = sorted({(int(s), int(w)) for s, w in zip(recordings["subject"], recordings["side"], strict=True)})
    return [_wearer(recordings, person, wrist) for person, wrist in people]


def _load_recordings() -> dict[str, Any]:
    # The file is read directly: importing seglearn would bring scikit-learn and pandas into a small process.
    spec = find_spec("seglearn")
    if spec is None or spec.origin is None:
        raise NotFound("the smartwatch recordings come with the package seglearn: pip install 'umbel[examples]'")
    path = Path(spec.origin).parent / "data" / "watch_dataset.npy"
    loaded: dict[str, Any] = np.load(path, allow_pickle=True).item()
    return loaded


def _wearer(recordings: dict[str, Any], person: int, wrist: int) -> Wearer:
    mine = [
        (series, int(label))
        for series, label, subject, side in zip(*(recordings[k] for k in ("X", "y", "subject", "side")), strict=True)
        if (int(subject), int(side)) == (person, wrist)
    ]
    training, held_back = [], []
    for series, label in sorted(mine, key=lambda pair: pair[1]):
        # Split in time before cutting windows, so that no window spans both parts.
        cut = round(len(series) * (1 - HELD_BACK_SHARE))
        training.append((series[:cut], label))
        held_back.append((series[cut:], label))
    side_name = "right" if wrist else "left"
    return Wearer(f"person{person:02}-{side_name}", _cut(training), _cut(held_back))


def _cut(parts: list[tuple[NDArray[np.float64], int]]) -> Windows:
    x, y = [], []
    for series, label in parts:
        windows = np.lib.stride_tricks.sliding_window_view(series, WINDOW, axis=0)[::STRIDE]
        x.append(windows.astype(np.float32))
        y.append(np.full(len(windows), label, np.int64))
    return Windows(np.ascontiguousarray(np.concatenate(x)), np.concatenate(y))
