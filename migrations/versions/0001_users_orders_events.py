"""Create users, orders and events."""

import sqlalchemy as sa
from alembic import op
from sqlmodel.sql.sqltypes import UTCDateTime

revision = "0001"
down_revision = None

STATUSES = ("PENDING", "PAID", "SHIPPED", "CANCELED")
UNPROCESSED = sa.text("processed_at IS NULL")


def upgrade() -> None:
    """Apply the change."""
    op.create_table(
        "users",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("email", sa.String(254), nullable=False, unique=True),
        sa.Column("hashed_password", sa.String, nullable=False),
    )
    op.create_table(
        "orders",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column(
            "user_id", sa.Integer, sa.ForeignKey("users.id"), nullable=False
        ),
        sa.Column("items", sa.JSON, nullable=False),
        sa.Column("total_price", sa.Float, nullable=False),
        sa.Column(
            "status",
            sa.Enum(
                *STATUSES,
                name="orders_status_check",
                native_enum=False,
                create_constraint=True,
                length=16,
            ),
            nullable=False,
        ),
        sa.Column("created_at", UTCDateTime, nullable=False),
        sa.CheckConstraint(
            "total_price >= 0", name="orders_total_price_check"
        ),
    )
    op.create_index(
        "orders_user_id_created_at_id",
        "orders",
        ["user_id", "created_at", "id"],
    )
    op.create_index(
        "orders_user_id_status_created_at_id",
        "orders",
        ["user_id", "status", "created_at", "id"],
    )
    op.create_table(
        "events",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column(
            "order_id", sa.Uuid, sa.ForeignKey("orders.id"), nullable=False
        ),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("payload", sa.JSON, nullable=False),
        sa.Column("created_at", UTCDateTime, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("due_at", UTCDateTime, nullable=False),
        sa.Column("processed_at", UTCDateTime),
    )
    op.create_index(
        "events_due",
        "events",
        ["kind", "due_at"],
        postgresql_where=UNPROCESSED,
        sqlite_where=UNPROCESSED,
    )
    op.create_index("ix_events_order_id", "events", ["order_id"])


def downgrade() -> None:
    """Undo the change."""
    op.drop_table("events")
    op.drop_table("orders")
    op.drop_table("users")
