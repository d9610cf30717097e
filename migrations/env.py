"""Run the migrations on the database that DATABASE_URL names."""

from alembic import context
from psycopg.errors import InsufficientPrivilege, InvalidSchemaName
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlmodel import SQLModel

from orders import models  # noqa: F401  (fills the metadata)
from orders.db import create_sync_engine
from orders.problems import is_outage
from orders.settings import load_settings, refuse_to_start

MIGRATION_LOCK = 7_262_001  # any number, the same for every migrator


def migrate(connection: Connection) -> None:
    """Run what is missing, all of it or nothing."""
    is_sqlite = connection.dialect.name == "sqlite"
    if is_sqlite:
        # SQLite makes a changed table anew, which foreign keys would forbid.
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        # SQLite's driver begins no transaction for a CREATE TABLE.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        check_encoding(connection)
        connection.exec_driver_sql("BEGIN")
        # Two API processes may start at once: one migrates, one waits.
        connection.exec_driver_sql("SET LOCAL statement_timeout TO 0")
        connection.exec_driver_sql("SET LOCAL lock_timeout TO 0")
        connection.exec_driver_sql(
            f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"
        )
        # The default is the limit of the URL or the database, if any. A
        # pooler may hand over a session with the limit of the API.
        connection.exec_driver_sql("SET LOCAL statement_timeout TO DEFAULT")
        connection.exec_driver_sql("SET LOCAL lock_timeout TO DEFAULT")
    context.configure(
        connection=connection,
        target_metadata=SQLModel.metadata,
        render_as_batch=is_sqlite,
    )
    try:
        context.run_migrations()
    except BaseException:
        if not connection.invalidated:  # otherwise it is lost
            connection.exec_driver_sql("ROLLBACK")
        raise
    connection.exec_driver_sql("COMMIT")


def check_encoding(connection: Connection) -> None:
    """End the process if the database cannot hold every character."""
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
    if encoding != "UTF8":
        refuse_to_start(
            f"DATABASE_URL: the database has the encoding {encoding}: make"
            " one with CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"
        )


url = load_settings(secret=False).database_url
engine = create_sync_engine(url).execution_options(
    isolation_level="AUTOCOMMIT"  # `migrate` begins and ends the transaction
)
try:
    with engine.connect() as connection:
        migrate(connection)
except DBAPIError as error:
    forbidden = InsufficientPrivilege, InvalidSchemaName
    if not is_outage(error) and not isinstance(error.orig, forbidden):
        raise  # a fault of a migration
    refuse_to_start(f"DATABASE_URL: {str(error).splitlines()[0]}")
finally:
    engine.dispose()
