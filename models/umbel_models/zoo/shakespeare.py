"""The next character of a role's lines: a small Transformer whose head shares the weights of its embedding.

The task is that of LEAF (Caldas et al., 2018, https://arxiv.org/abs/1812.01097), with a loss at every place. Tokens
stand in `umbel_models.zoo.features`; padding counts neither in the loss nor in the metrics.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn

from umbel_models.losses import token_correct, token_count, token_cross_entropy
from umbel_models.optimizers import SGD, Adam, Proximal
from umbel_models.spec import ModelSpec
from umbel_models.zoo.building import made_up_text, seeded
from umbel_models.zoo.features import CONTEXT, TOKENS


class Layer(nn.Module):
    """Causal attention and a dense part, each added to what came in; [N, T, width] to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Let each place look at those before it."""
        y = self.norm1(x)
        q, k, v = (part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return out


class Transformer(nn.Module):
    """Two layers of width 64: 78,464 weights."""

    def __init__(self, width: int = 64, heads: int = 4, layers: int = 2, context: int = CONTEXT) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, width)
        self.position = nn.Parameter(0.02 * torch.randn(context, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, TOKENS, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.05)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, T] to scores of the next one at each place, [N, T, 98]."""
        x = self.embedding(x) + self.position
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def spec(seed: int = 0) -> ModelSpec:
    """The model with fresh weights, and made-up text as examples."""
    tokens, following = made_up_text(16, CONTEXT, seed)
    return ModelSpec(
        name="shakespeare",
        module=seeded(Transformer, seed),
        loss=token_cross_entropy,
        inputs={"x": tokens},
        targets={"y": following},
        metrics={"correct": token_correct},
        count=token_count,
        optimizer=Proximal(SGD(lr=0.2)),
        description="The next character at each of 80 places of a text",
    )


def adam(seed: int = 0) -> ModelSpec:
    """The same, trained by Adam; its moments begin anew on each device in each round."""
    return replace(spec(seed), name="shakespeare-adam", optimizer=Proximal(Adam(lr=0.003)))
