"""The next character of a role's lines, by an LSTM; data and metrics as in `umbel_models.zoo.shakespeare`."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from umbel_models.optimizers import SGD, Proximal
from umbel_models.spec import ModelSpec
from umbel_models.zoo import shakespeare
from umbel_models.zoo.building import seeded
from umbel_models.zoo.features import TOKENS


class Recurrent(nn.Module):
    """An embedding of 16, an LSTM of 96, a dense head: 54,850 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 16)
        self.lstm = nn.LSTM(16, 96, batch_first=True)
        self.head = nn.Linear(96, TOKENS)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, T] to scores of the next one at each place, [N, T, 98]."""
        logits: Tensor = self.head(self.lstm(self.embedding(x))[0])
        return logits


def spec(seed: int = 0) -> ModelSpec:
    """The Transformer's spec with this net in its place."""
    return replace(
        shakespeare.spec(seed),
        name="shakespeare-lstm",
        module=seeded(Recurrent, seed),
        optimizer=Proximal(SGD(lr=1.0)),
        description="The next character at each of 80 places of a text, by an LSTM",
    )
