"""The clip of a task's next round, where it moves; how many numbers the deltas of a round have."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the columns; rounds from before don't say how large they were."""
    op.add_column("tasks", sa.Column("clip_norm", sa.Double(), nullable=True))
    op.add_column("rounds", sa.Column("weights", sa.BigInteger(), nullable=False, server_default="0"))
