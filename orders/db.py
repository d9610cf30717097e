"""Open the database: PostgreSQL in production, SQLite when embedded.

A session of the API never waits for a hung server: a connection that is still
in use DEADLINE seconds after it was taken is cut, which its user sees as a
lost connection. A server that works has cancelled the statement before.
"""

import asyncio
import logging
import os
import socket
import time
from contextlib import suppress
from typing import Any

import psycopg
from psycopg import AsyncConnection
from sqlalchemy import URL, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry
from sqlmodel.ext.asyncio.session import AsyncSession

POOL_SIZE = 10  # connections of one API process
POOL_TIMEOUT = 2  # seconds to wait for a free connection
CONNECT_TIMEOUT = 2  # seconds
DEADLINE = 2.5  # seconds that the API may use a connection at a stretch
STATEMENT_TIMEOUT = 2000  # milliseconds that it may wait for one statement
BUSY_TIMEOUT = 5000  # milliseconds that SQLite waits for another writer
REPORT_INTERVAL = 10  # seconds without an outage before the next is news

logger = logging.getLogger(__name__)

OPTIONS: dict[str, dict[str, Any]] = {
    "postgresql": {
        "pool_size": POOL_SIZE,
        "max_overflow": 0,
        "pool_timeout": POOL_TIMEOUT,
        "connect_args": {"connect_timeout": CONNECT_TIMEOUT},
    },
    "sqlite": {},
}
AUTOCOMMIT = {"isolation_level": "AUTOCOMMIT"}

# What is raised while the database is away; anything else is a fault.
OUTAGES = (InterfaceError, OperationalError, PoolTimeoutError)


class OutageLog:
    """Log an outage of the database, but not once a call."""

    def __init__(self) -> None:
        """Start with the database up."""
        self._report_at = 0.0

    def report(self, error: object) -> None:
        """Log the error, unless the last was a moment ago."""
        if time.monotonic() >= self._report_at:
            reason = str(error).split("\n")[0]
            logger.warning("The database is away: %s", reason)
        self._report_at = time.monotonic() + REPORT_INTERVAL


class Database:
    """The API's asynchronous engine and its sessions."""

    def __init__(self, url: str) -> None:
        """Prepare the engine; it connects when it is first used."""
        self.engine = _create_async_engine(make_url(url))
        # The same connections, for a statement that is a transaction.
        self.autocommit = self.engine.execution_options(**AUTOCOMMIT)
        self.outage = OutageLog()

    def session(self) -> AsyncSession:
        """Return a new session, to be used with `async with`."""
        return AsyncSession(self.engine, expire_on_commit=False)

    async def ping(self) -> None:
        """Raise unless the database answers."""
        async with self.engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    async def close(self) -> None:
        """Close the pooled connections."""
        await self.engine.dispose()


def create_sync_engine(url: str) -> Engine:
    """Return an engine for the migrations and the worker's threads."""
    parsed = make_url(url)
    options = OPTIONS[parsed.get_backend_name()]
    engine = create_engine(
        _with_driver(parsed, sqlite="pysqlite"),
        hide_parameters=True,
        **options,
    )
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
    return engine


def _create_async_engine(url: URL) -> AsyncEngine:
    options = OPTIONS[url.get_backend_name()]
    if url.get_backend_name() == "postgresql":
        # Else each backend that waits for a row outlives its caller, and a
        # row locked for long uses up the server's connections.
        timeout = {"options": f"-c statement_timeout={STATEMENT_TIMEOUT}"}
        options = options | {"connect_args": options["connect_args"] | timeout}
    engine = create_async_engine(
        _with_driver(url, sqlite="aiosqlite"), hide_parameters=True, **options
    )
    if engine.dialect.name == "sqlite":
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
    else:
        event.listen(engine.sync_engine, "checkout", _start_deadline)
        event.listen(engine.sync_engine, "checkin", _end_deadline)
    return engine


def _with_driver(url: URL, *, sqlite: str) -> URL:
    backend = url.get_backend_name()
    driver = sqlite if backend == "sqlite" else "psycopg"
    return url.set(drivername=f"{backend}+{driver}")


def _prepare_sqlite(connection: Any, _: ConnectionPoolEntry) -> None:
    """Let readers and a writer work at once, and enforce foreign keys."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _start_deadline(
    connection: Any, entry: ConnectionPoolEntry, _: object
) -> None:
    entry.info["deadline"] = asyncio.get_running_loop().call_later(
        DEADLINE, _cut, connection.driver_connection
    )


def _end_deadline(_: object, entry: ConnectionPoolEntry) -> None:
    deadline = entry.info.pop("deadline", None)
    if deadline is not None:
        deadline.cancel()


def _cut(connection: AsyncConnection) -> None:
    """End both directions of the socket, so that who waits on it wakes."""
    with (
        suppress(OSError, psycopg.OperationalError),
        socket.socket(fileno=os.dup(connection.fileno())) as duplicate,
    ):
        duplicate.shutdown(socket.SHUT_RDWR)
