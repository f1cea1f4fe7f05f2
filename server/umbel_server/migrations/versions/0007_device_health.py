"""What devices tell of the release that answers, in use."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Make the table."""
    measured = ("accuracy", "latency_seconds", "memory_mb")
    op.create_table(
        "device_health",
        sa.Column("device", sa.String(length=32), nullable=False),
        sa.Column("population", sa.String(length=100), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("release", sa.Integer(), nullable=False),
        sa.Column("troubles", sa.Integer(), nullable=False),
        *(sa.Column(name, sa.Double(), nullable=True) for name in measured),
        *(sa.Column(f"before_{name}", sa.Double(), nullable=True) for name in measured),
        sa.PrimaryKeyConstraint("device", name=op.f("pk_device_health")),
    )
    op.create_index(op.f("ix_device_health_population"), "device_health", ["population", "at"])
