"""Descriptors of private rounds."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "private_rounds",
        sa.Column("task", sa.String(length=100), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("kind", sa.String(length=20), nullable=False),
        sa.Column("statement", sa.LargeBinary(), nullable=False),
        sa.Column("leader_signature", sa.LargeBinary(), nullable=False),
        sa.Column("helper_signature", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["task", "number", "kind"],
            ["rounds.task", "rounds.number", "rounds.kind"],
            name=op.f("fk_private_rounds_task_number_kind_rounds"),
        ),
        sa.PrimaryKeyConstraint("task", "number", "kind", name=op.f("pk_private_rounds")),
    )
