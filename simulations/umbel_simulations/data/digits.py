"""Handwritten digits, 8 x 8 pixels from 0 to 16: the file inside scikit-learn (UCI, Alpaydin and Kaynak 1998)."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np

from umbel_client.examples import INPUT, TARGET, Examples
from umbel_simulations.data.files import inside

CENTRAL: Final = 360
"""The last fifth: nobody trains with it."""


@lru_cache(maxsize=1)
def load_digits() -> tuple[Examples, Examples]:
    """The digits to share out (1,437), and those to judge by (360): x float32 [N, 64], y int64 [N].

    Raises:
        NotFound: scikit-learn isn't installed.
    """
    # The file is read directly: importing scikit-learn takes seconds.
    table = np.loadtxt(
        inside("sklearn", "scikit-learn", "datasets/data/digits.csv.gz"), delimiter=",", dtype=np.float32
    )
    whole = Examples({INPUT: table[:, :-1]}, {TARGET: table[:, -1].astype(np.int64)}, len(table))
    cut = len(table) - CENTRAL
    return whole.take(slice(cut)), whole.take(slice(cut, None))
