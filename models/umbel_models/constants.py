"""Numbers worked out while tracing: what hangs on no tensor of the trace stands in a graph as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing


@contextmanager
def constants() -> Iterator[None]:
    """While it is entered, torch reckons as if nothing were traced."""
    with disable_proxy_modes_tracing(), unset_fake_temporarily(), torch._C.DisableTorchFunction():
        yield
