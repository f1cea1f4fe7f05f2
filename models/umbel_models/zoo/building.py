"""What every model of the zoo does: fresh weights from a seed, without touching torch's global generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from umbel_models.zoo.features import PADDING, TOKENS


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A module with weights drawn from this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def made_up_text(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Token sequences [count, length], and the next token at each place; the later ones end in padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, TOKENS, (count, length + 1), generator=generator)
    for row in range(count // 2, count):
        tokens[row, length // 2 + row % (length // 2) :] = PADDING
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
