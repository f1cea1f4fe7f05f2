"""What calls were answered with; revisions and revocations by index."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add columns and indexes."""
    op.add_column("requests", sa.Column("body", sa.String(length=64), nullable=True))
    op.add_column("requests", sa.Column("answer", sa.Text(), nullable=True))
    op.create_index(op.f("ix_audit_object"), "audit", ["object", "sequence"])
    op.create_index(op.f("ix_devices_revoked_at"), "devices", ["revoked_at"])
