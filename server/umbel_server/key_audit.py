"""Which keys devices trust, in the audit log: each root and each naming of signers that was published, once.

`umbel keys` publishes them beside a running coordinator, also with files from machines where offline keys are kept. So
nobody tells the coordinator, which sees for itself what its listing says by now.
"""

from __future__ import annotations

import json
from typing import Final

import sqlalchemy as sa

from umbel.errors import WrongState
from umbel_server import audit
from umbel_server.repository import Repository
from umbel_server.store import Store
from umbel_server.tables import AUDIT

PUBLISHED: Final = "keys.publish"
_HOLDERS: Final = ("root", "targets")
"""What names keys: those of all top-level roles, and those of each model's signers."""


class KeyAudit:
    """Writes down what a listing says of keys.

    Args:
        store: gets the rows.
        repository: the listing.
    """

    def __init__(self, store: Store, repository: Repository) -> None:
        self._store = store
        self._repository = repository
        self._looked_at = -1

    def require_ours(self) -> None:
        """Make sure that the log is of the listing's coordinator: another one's folder has neither its keys nor blobs.

        Raises:
            WrongState: it tells of other first keys.
        """
        first = sa.select(AUDIT.c.body_json).where(AUDIT.c.action == PUBLISHED, AUDIT.c.object == "root/1")
        with self._store.reading() as connection:
            told = connection.scalar(first.order_by(AUDIT.c.sequence).limit(1))
        if told is not None and json.loads(told) != self._repository.keys_named("root", 1):
            raise WrongState(
                "the database is of a coordinator with another folder; start that folder (or its backup), or name an "
                "empty database"
            )

    def look(self, now: float) -> None:
        """A row for each version of `root` and `targets` that has none yet, such as `root/3`.

        Args:
            now: POSIX seconds.
        """
        changed = self._repository.changed
        if changed == self._looked_at:
            return
        for role in _HOLDERS:
            self._write_down(role, now)
        self._looked_at = changed

    def _write_down(self, role: str, now: float) -> None:
        with self._store.transaction() as connection:
            known = _last(connection, role)
            for version in self._repository.versions(role):
                if version > known:
                    body = self._repository.keys_named(role, version)
                    audit.append(connection, now, audit.COORDINATOR, PUBLISHED, f"{role}/{version}", body)


def _last(connection: sa.Connection, role: str) -> int:
    """The newest version of a role that has a row; 0 for none."""
    rows = sa.select(AUDIT.c.object).where(AUDIT.c.action == PUBLISHED, AUDIT.c.object.startswith(f"{role}/"))
    found = connection.scalar(rows.order_by(AUDIT.c.sequence.desc()).limit(1))
    return int(found.rpartition("/")[2]) if found else 0
