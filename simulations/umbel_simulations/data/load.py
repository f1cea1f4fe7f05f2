"""The federation that a scenario names."""

from __future__ import annotations

from umbel.errors import OutOfBounds
from umbel_client.examples import INPUT, TARGET, Examples
from umbel_simulations.data.federation import ClientData, Federation, join
from umbel_simulations.scenario import Data
from umbel_simulations.smartwatch import Windows, load_wearers


def load(data: Data, seed: int) -> Federation:
    """The users of a scenario, the same for the same seed.

    Raises:
        NotFound: the package that holds the data isn't installed.
        OutOfBounds: more users than there are.
    """
    clients = _smartwatch()
    clients = [_at_most(client, data.most_examples) for client in _keep(clients, data.users)]
    return Federation(data.federation, tuple(clients), join([client.held_back for client in clients]))


def _smartwatch() -> list[ClientData]:
    return [ClientData(one.name, _examples(one.training), _examples(one.held_back)) for one in load_wearers()]


def _examples(windows: Windows) -> Examples:
    return Examples({INPUT: windows.x}, {TARGET: windows.y}, len(windows))


def _keep(clients: list[ClientData], users: int) -> list[ClientData]:
    if users > len(clients):
        raise OutOfBounds(f"data: users is {users}, and the data have {len(clients)} natural ones")
    return clients[:users] if users else clients


def _at_most(client: ClientData, most: int) -> ClientData:
    if not most or client.training.count <= most:
        return client
    return ClientData(client.name, client.training.take(slice(client.training.count - most, None)), client.held_back)
