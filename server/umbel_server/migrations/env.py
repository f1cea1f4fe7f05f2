"""Alembic's entry: run the steps on the connection that `Store.open` holds, inside its one transaction."""

from alembic import context

from umbel_server.tables import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
context.run_migrations()
