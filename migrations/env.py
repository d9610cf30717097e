"""Run the migrations on the database that DATABASE_URL names."""

from alembic import context
from sqlalchemy import text
from sqlmodel import SQLModel

from orders import models  # noqa: F401  (fills the metadata)
from orders.db import create_sync_engine
from orders.settings import Settings, read_environment

MIGRATION_LOCK = 7_262_001  # any number, the same for every migrator

url = read_environment().get("DATABASE_URL") or Settings.database_url
engine = create_sync_engine(url)

with engine.begin() as connection:
    if engine.dialect.name == "postgresql":
        # Two API processes may start at once: one migrates, one waits.
        connection.execute(
            text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK}
        )
    else:
        # SQLite changes a table by making it anew: events refer to orders.
        connection.execute(text("PRAGMA foreign_keys = OFF"))
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        render_as_batch=engine.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()
engine.dispose()
