"""A channel's head for each population; what there was stays everybody's."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Make the table anew: neither database widens a primary key in place."""
    before = op.get_bind().execute(sa.text("SELECT model, channel, number FROM channel_heads")).mappings().all()
    op.drop_table("channel_heads")
    heads = op.create_table(
        "channel_heads",
        sa.Column("model", sa.String(length=100), nullable=False),
        sa.Column("channel", sa.String(length=100), nullable=False),
        sa.Column("population", sa.String(length=100), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("model", "channel", "population", name=op.f("pk_channel_heads")),
    )
    op.bulk_insert(heads, [{**row, "population": ""} for row in before])
