"""Torch on one thread: for small models several only get in each other's way, on a busy machine tenfold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Within it, torch computes on the calling thread alone."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stay_on_one_torch_thread() -> None:
    """From now on torch computes on the calling thread alone, whichever that is."""
    import torch

    torch.set_num_threads(1)
