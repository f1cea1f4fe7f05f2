"""Your own users: a folder of NumPy archives, one for each user, as `umbel-device examples import` takes them.

Each is read into a device's own store, so a simulated device has what a real one would have: inputs `x`, targets `y`
(or several, `x/NAME` and `y/NAME`), oldest first; `held_back` says what to judge by, or the newest fifth is held back.
"""

from __future__ import annotations

from pathlib import Path

from umbel.errors import InputMismatch, NotFound, UmbelError
from umbel_client.examples import Examples, MemoryExamples, form_of, require_form
from umbel_client.importing import import_npz
from umbel_simulations.data.federation import ClientData


def load_users(folder: Path) -> list[ClientData]:
    """All users in a folder, by the names of their files.

    Raises:
        NotFound: no such folder, or no archive in it.
        MalformedMessage: a file that isn't such an archive.
        InputMismatch: a user's examples don't fit together, or to those of the others.
        NotFinite: NaN or infinity in them.
    """
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise NotFound(f"data: there is no .npz in {folder}; put one there for each user")
    users = [_user(path) for path in paths]
    first = _whole(users[0])
    for path, user in zip(paths, users, strict=True):
        try:
            whole = _whole(user)
            require_form(form_of(whole.inputs, whole.targets), form_of(first.inputs, first.targets))
        except InputMismatch as error:
            raise InputMismatch(f"data: {path.name} isn't like {paths[0].name}: {error}") from error
    return users


def _user(path: Path) -> ClientData:
    store = MemoryExamples()
    try:
        import_npz(store, path, at=0.0)
    except UmbelError as error:
        raise type(error)(f"data: {path.name}: {error}") from error
    split = store.split(0.0)
    return ClientData(path.stem, split.training, split.held_back)


def _whole(user: ClientData) -> Examples:
    return user.training if user.training.count else user.held_back
