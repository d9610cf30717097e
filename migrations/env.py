"""Run the migrations on the database that DATABASE_URL names."""

from alembic import context
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError
from sqlmodel import SQLModel

from orders import auth, models  # noqa: F401  (fills the metadata)
from orders.db import AUTOCOMMIT, create_sync_engine
from orders.settings import load_settings, refuse_to_start

MIGRATION_LOCK = 7_262_001  # any number, the same for every migrator


def migrate(connection: Connection) -> None:
    """Run what is missing, all of it or nothing."""
    sqlite = connection.dialect.name == "sqlite"
    if sqlite:
        # SQLite changes a table by making it anew: events refer to orders.
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        # Its driver begins no transaction for a CREATE TABLE.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        # Two API processes may start at once: one migrates, one waits.
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql(
            f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"
        )
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        render_as_batch=sqlite,
    )
    try:
        context.run_migrations()
    except BaseException:
        connection.exec_driver_sql("ROLLBACK")
        raise
    connection.exec_driver_sql("COMMIT")


url = load_settings(secret=False).database_url
engine = create_sync_engine(url).execution_options(**AUTOCOMMIT)
try:
    with engine.connect() as connection:
        migrate(connection)
except OperationalError as error:
    refuse_to_start(f"DATABASE_URL: {str(error).splitlines()[0]}")
finally:
    engine.dispose()
