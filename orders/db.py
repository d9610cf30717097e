"""Open the database, PostgreSQL or SQLite, and let calls share its trips.

Nobody waits for a hung server or a network that swallows: a connection that
is in use for longer than its deadline is cut, which its user sees as a lost
connection. A server that works has cancelled the statement before.
"""

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Generic, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg.errors import ReadOnlySqlTransaction
from sqlalchemy import event, exc
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.types import UserDefinedType

from orders.logs import Outage

POOL_SIZE = 10  # connections of one process
POOL_TIMEOUT = 2  # seconds to wait for a free connection
CONNECT_TIMEOUT = 2  # seconds
API_DEADLINE = 2.5  # seconds that the API may use a connection at a stretch
WORKER_DEADLINE = 15.0  # seconds, for the worker and the relay
STATEMENT_SHARE = 0.8  # of the deadline: a server that works ends it first
WATCH_INTERVAL = 0.1  # seconds between two looks for what is overdue
MAX_CALLS = 100  # that share a trip
AUTOCOMMIT: Any = {"isolation_level": "AUTOCOMMIT"}
ISOLATION = {"postgresql": "READ COMMITTED", "sqlite": "SERIALIZABLE"}

# What is raised while the database is away; see `is_outage`.
OUTAGES = (exc.InterfaceError, exc.OperationalError, exc.TimeoutError)

logger = logging.getLogger(__name__)


def is_outage(error: Exception) -> bool:
    """Return whether the database is away, or takes no writes."""
    lost = isinstance(error, exc.DBAPIError) and error.connection_invalidated
    return isinstance(error, OUTAGES) or lost


class JsonText(UserDefinedType[str]):
    """A JSON column that is read and written as text, never parsed.

    What comes in is validated JSON, and goes out as the bytes that were kept.
    """

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """Return the column's type in SQL."""
        return "JSON"

    def column_expression(self, column: Any) -> sa.ColumnElement[str]:
        """Select the text, which drivers leave as it is."""
        return sa.cast(column, sa.Text)


class Database:
    """The API's asynchronous engine."""

    def __init__(self, url: str) -> None:
        """Prepare the engine; it connects when it is first used."""
        options = _options(url, "aiosqlite", API_DEADLINE)
        # A statement is a transaction, unless it is one of several.
        self.engine = create_async_engine(**AUTOCOMMIT, **options)
        level = ISOLATION[self.engine.dialect.name]
        self.transactions = self.engine.execution_options(
            isolation_level=level
        )
        # For the keeper, which waits for none of those who fill the pool.
        self.aside = create_async_engine(**options)
        for engine in self.engine, self.aside:
            _listen(engine.sync_engine, API_DEADLINE)
        self.outage = Outage(logger, "The database")

    async def ping(self) -> None:
        """Raise unless the database answers and takes writes."""
        # SQLite learns that its disk is full only when it writes.
        ask = (
            "UPDATE alembic_version SET version_num = version_num RETURNING 1"
        )
        if self.engine.dialect.name == "postgresql":
            ask = "SELECT current_setting('transaction_read_only')"
        async with self.engine.connect() as connection:
            if await connection.scalar(sa.text(ask)) == "on":
                await connection.invalidate()  # or it stays so in the pool
                await self.engine.dispose()  # and so do the others
                raise exc.InterfaceError(ask, None, Exception("read-only"))

    async def close(self) -> None:
        """Close the pooled connections."""
        await self.engine.dispose()
        await self.aside.dispose()


def create_sync_engine(url: str, deadline: float | None = None) -> sa.Engine:
    """Return an engine for plain calls; a migration's has no deadline."""
    options = _options(url, "pysqlite", deadline)
    engine = sa.create_engine(**options)
    _listen(engine, deadline)
    return engine


def _options(url: str, sqlite: str, deadline: float | None) -> dict[str, Any]:
    """Return what makes an engine: its URL with the driver, and limits."""
    address = sa.make_url(url)
    options: dict[str, Any] = {"hide_parameters": True}
    if address.get_backend_name() == "sqlite":
        options["url"] = address.set(drivername=f"sqlite+{sqlite}")
        return options
    options["url"] = address.set(drivername="postgresql+psycopg")
    connect: dict[str, Any] = {"connect_timeout": CONNECT_TIMEOUT}
    if deadline is not None:
        limit = int(deadline * 1000)  # milliseconds
        # Else a session that waits for a row outlives its caller.
        timeout = int(limit * STATEMENT_SHARE)
        connect["options"] = f"-c statement_timeout={timeout}"
        # Else the system tries for a quarter of an hour.
        connect |= {"tcp_user_timeout": limit, "keepalives_idle": 5}
        connect |= {"keepalives_interval": 2, "keepalives_count": 3}
    options |= {"pool_size": POOL_SIZE, "max_overflow": 0}
    return options | {"pool_timeout": POOL_TIMEOUT, "connect_args": connect}


def _listen(engine: sa.Engine, deadline: float | None) -> None:
    """Listen to what happens to the engine's connections."""
    if engine.dialect.name == "sqlite":
        event.listen(engine, "do_connect", _create_private_file)
        event.listen(engine, "connect", _prepare_sqlite)
        return
    event.listen(engine, "handle_error", _leave_read_only)
    if deadline is None:
        return
    _start_watching()

    def begin(_: object, used: Any, __: object) -> None:
        """Note when the connection is cut."""
        _ends[used.driver_connection] = time.monotonic() + deadline

    def end(_: object, used: Any) -> None:
        """Forget the connection."""
        _ends.pop(used.driver_connection, None)

    event.listen(engine, "checkout", begin)
    event.listen(engine, "checkin", end)


def _create_private_file(_: object, __: object, to: Any, ___: object) -> None:
    """Create SQLite's file for this user's eyes: it has password hashes."""
    with suppress(OSError):  # SQLite says it, in a moment
        os.close(os.open(to[0], os.O_RDWR | os.O_CREAT, 0o600))


def _prepare_sqlite(connection: Any, _: object) -> None:
    """Let readers and a writer work at once, and enforce foreign keys."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


def _leave_read_only(context: sa.ExceptionContext) -> None:
    """Leave a server that takes no writes, with all pooled sessions."""
    # After a failover they would stay what they are: read-only.
    if isinstance(context.original_exception, ReadOnlySqlTransaction):
        context.is_disconnect = True


# Connections in use, and the time.monotonic at which each is cut.
_ends: dict[Any, float] = {}


@cache
def _start_watching() -> None:
    """Start the one thread of a process that cuts what is overdue."""
    threading.Thread(target=_cut_overdue, daemon=True).start()


def _cut_overdue() -> None:
    """End both ways of a socket in use for too long: who waits on it wakes."""
    while True:
        time.sleep(WATCH_INTERVAL)
        now = time.monotonic()
        for connection, end in list(_ends.items()):
            if now >= end and _ends.pop(connection, None) is not None:
                with suppress(OSError, psycopg.OperationalError):
                    duplicate = os.dup(connection.fileno())
                    with socket.socket(fileno=duplicate) as wire:
                        wire.shutdown(socket.SHUT_RDWR)


Question = TypeVar("Question")
Answer = TypeVar("Answer")


# What answers a list of questions, in their order; an exception among the
# answers is raised for its own caller alone.
Trip = Callable[[list[Question]], Awaitable[Sequence[Answer | Exception]]]


class Batch(Generic[Question, Answer]):
    """Calls that share round trips: a queue, and one task that makes them.

    Calls that come while a trip is under way travel together in the next one.
    A first call travels at once, so a lone caller waits for nobody.
    """

    def __init__(self, trip: Trip[Question, Answer]) -> None:
        """Wait for calls."""
        self._trip = trip
        self._waiting: list[tuple[Question, asyncio.Future[Answer]]] = []
        self._sender: asyncio.Task[None] | None = None

    def ask(self, question: Question) -> asyncio.Future[Answer]:
        """Return what will have the answer of the next trip, or its error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((question, future))
        if self._sender is None:
            self._sender = loop.create_task(self._send())
        return future

    async def _send(self) -> None:
        """Make trips until no call waits."""
        # One that fails is the failure of all who wait by then: else who came
        # last would wait for two time limits.
        while calls := self._waiting[:MAX_CALLS]:
            del self._waiting[:MAX_CALLS]
            answers: Sequence[Answer | Exception]
            try:
                answers = await self._trip([question for question, _ in calls])
            except Exception as error:
                calls += self._waiting
                self._waiting = []
                answers = [error] * len(calls)
            for (_, future), answer in zip(calls, answers, strict=True):
                if future.done():
                    pass  # its caller is gone
                elif isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        self._sender = None
