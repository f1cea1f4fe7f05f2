"""Will a flight be more than 15 minutes late: a dense net over a row of a table, with embeddings for its categories.

The columns stand in `umbel_models.zoo.features`. They come as numbers, categories too, so that a row is one array.
"""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own custom
from torch import Tensor, nn

from umbel_models.histograms import Counting, feature, label
from umbel_models.losses import binary_correct
from umbel_models.optimizers import SGD, Proximal
from umbel_models.spec import ModelSpec
from umbel_models.zoo.building import seeded
from umbel_models.zoo.features import CARRIERS, FLIGHT_FEATURES, ORIGINS

_YEAR, _DAY = 12.0, 24.0


class Flights(nn.Module):
    """Month and hour go round, the weekday and the two categories have embeddings: 1,957 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weekday = nn.Embedding(7, 2)
        self.origin = nn.Embedding(len(ORIGINS), 2)
        self.carrier = nn.Embedding(len(CARRIERS), 4)
        self.hidden1 = nn.Linear(13, 48)
        self.hidden2 = nn.Linear(48, 24)
        self.head = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Rows [N, 6] to logits [N]; categories outside their lists are taken for the nearest in them."""
        month, weekday, hour, distance, origin, carrier = x.unbind(1)
        round_trip = 2 * math.pi * torch.stack([month / _YEAR, hour / _DAY], 1)
        parts = [
            torch.sin(round_trip),
            torch.cos(round_trip),
            (distance / 1000.0 - 1.0).unsqueeze(1),
            self.weekday(weekday.clamp(0, 6).to(torch.int64)),
            self.origin(origin.clamp(0, len(ORIGINS) - 1).to(torch.int64)),
            self.carrier(carrier.clamp(0, len(CARRIERS) - 1).to(torch.int64)),
        ]
        hidden = F.relu(self.hidden2(F.relu(self.hidden1(torch.cat(parts, 1)))))
        logit: Tensor = self.head(hidden).squeeze(1)
        return logit


_LIMITS: Final = {
    "month": (1, 13),
    "weekday": (0, 7),
    "hour": (5, 24),
    "distance": (80, 5000),
    "origin": (0, len(ORIGINS)),
    "carrier": (0, len(CARRIERS)),
}


def spec(seed: int = 0) -> ModelSpec:
    """The model with fresh weights, and made-up flights as examples; a target of 1 is a late one."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randint(*_LIMITS[name], (16,), generator=generator) for name in FLIGHT_FEATURES]
    return ModelSpec(
        name="flights",
        module=seeded(Flights, seed),
        loss=F.binary_cross_entropy_with_logits,
        inputs={"x": torch.stack(columns, 1).to(torch.float32)},
        targets={"y": (torch.arange(16) % 4 == 0).to(torch.float32)},
        outputs=("logit",),
        metrics={"correct": binary_correct},
        optimizer=Proximal(SGD(lr=0.1, momentum=0.9)),
        histograms={
            "month": feature("x", 0, [place + 0.5 for place in range(1, 12)]),
            "hour": feature("x", 2, (7, 9, 11, 13, 15, 17, 19)),
            "miles": feature("x", 3, (250, 500, 750, 1000, 1500, 2500)),
            "late": label("y", 2),
            "says": Counting(lambda inputs, answers, targets: answers["logit"] > 0, [0.5]),
        },
        description="Whether a flight comes over 15 minutes late: x is month, weekday, hour, miles, origin, carrier",
    )
