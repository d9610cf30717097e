"""Keep the trace of the call that recorded an event."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Apply the change."""
    op.add_column("events", sa.Column("traceparent", sa.String(55)))


def downgrade() -> None:
    """Undo the change."""
    op.drop_column("events", "traceparent")
