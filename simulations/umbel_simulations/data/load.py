"""The federation that a scenario names."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from umbel.errors import BadInput, OutOfBounds
from umbel.randomness import generator
from umbel_client.examples import INPUT, TARGET, Examples
from umbel_simulations.data import partition
from umbel_simulations.data.digits import load_digits
from umbel_simulations.data.federation import ClientData, Federation, join
from umbel_simulations.data.flights import load_aeroplanes
from umbel_simulations.data.own import load_users
from umbel_simulations.data.shakespeare import load_roles
from umbel_simulations.scenario import Data
from umbel_simulations.smartwatch import Windows, load_wearers

CUT_USERS: Final = 20
"""Users that data are cut into, if a scenario doesn't say."""


def load(data: Data, seed: int) -> Federation:
    """The users of a scenario, the same for the same seed.

    Natural users keep their own past and future: what they did last is held back. Where data are cut anew, each user
    holds back a fifth by chance, and the global model is judged by what nobody trains with.

    Raises:
        NotFound: the package that holds the data isn't installed; or there is nothing of one's own.
        MalformedMessage, InputMismatch, NotFinite: one's own data are no examples; see `load_users`.
        BadInput: a partition by labels of data that have none.
        OutOfBounds: more users than there can be; or nobody holds anything back to judge by.
    """
    if data.partition == "natural":
        clients = _keep(_natural(data), data.users)
        central = join([client.held_back for client in clients])
    else:
        pool, central = _pooled(data)
        clients = _cut(pool, data, seed)
    if not central.count:
        raise OutOfBounds("data: none of the users holds an example back to judge by; give one of them five or more")
    return Federation(data.federation, tuple(_at_most(client, data.most_examples) for client in clients), central)


def _natural(data: Data) -> list[ClientData]:
    match data.federation:
        case "smartwatch":
            return [ClientData(one.name, _examples(one.training), _examples(one.held_back)) for one in load_wearers()]
        case "shakespeare":
            return list(load_roles())
        case "flights":
            return list(load_aeroplanes())
        case "digits":
            raise BadInput("data: the digits have no natural users; cut them")
        case "own":
            return load_users(Path(data.folder))


def _examples(windows: Windows) -> Examples:
    return Examples({INPUT: windows.x}, {TARGET: windows.y}, len(windows))


def _pooled(data: Data) -> tuple[Examples, Examples]:
    """What may be cut anew, and what to judge by."""
    if data.federation == "digits":
        return load_digits()
    clients = _natural(data)
    return join([client.training for client in clients]), join([client.held_back for client in clients])


def _keep(clients: list[ClientData], users: int) -> list[ClientData]:
    if users > len(clients):
        raise OutOfBounds(f"data: users is {users}, and the data have {len(clients)} natural ones")
    return clients[:users] if users else clients


def _cut(pool: Examples, data: Data, seed: int) -> list[ClientData]:
    chance = generator(seed, "partition", data.federation, data.partition)
    users = data.users or CUT_USERS
    labels = pool.targets.get(TARGET, np.empty((0, 0)))
    if data.partition != "iid" and labels.ndim != 1:
        raise BadInput(f'data: {data.federation} has no single labels to cut by; choose partition = "iid" or "natural"')
    match data.partition:
        case "dirichlet":
            parts = partition.dirichlet(labels, users, data.alpha, chance)
        case "by-label":
            parts = partition.by_label(labels, users, data.labels_per_user, chance)
        case _:
            parts = partition.iid(pool.count, users, chance)
    return [
        ClientData.split(f"user{number:04}", pool.take(chance.permutation(rows))) for number, rows in enumerate(parts)
    ]


def _at_most(client: ClientData, most: int) -> ClientData:
    if not most or client.training.count <= most:
        return client
    newest = slice(client.training.count - most, None)
    return ClientData(client.name, client.training.take(newest), client.held_back)
