"""Open the database, PostgreSQL or SQLite, and let calls share its trips.

Nobody waits for a hung server or a network that swallows: a connection that
is in use for longer than its deadline is cut, which its user sees as a lost
connection. A server that works has cancelled the statement before.
"""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import psycopg
import sqlalchemy as sa
from sqlalchemy import event, exc, types
from sqlalchemy.ext.asyncio import AsyncEngine

from orders.logs import Outage

POOL_SIZE = 10  # connections of one process
POOL_TIMEOUT = 2  # seconds to wait for a free connection
CONNECT_TIMEOUT = 2  # seconds
API_DEADLINE = 2.5  # seconds that the API may use a connection at a stretch
WORKER_DEADLINE = 15.0  # seconds, for the worker and the relay
STATEMENT_SHARE = 0.8  # of the deadline: a server that works ends it first
MAX_CALLS = 100  # that share a trip
AUTOCOMMIT: Any = {"isolation_level": "AUTOCOMMIT"}
OUTAGES = (exc.InterfaceError, exc.OperationalError, exc.TimeoutError)


def is_outage(error: Exception) -> bool:
    """Return whether the database is away, or takes no writes."""
    lost = isinstance(error, exc.DBAPIError) and error.connection_invalidated
    return isinstance(error, OUTAGES) or lost


class JsonText(types.TypeEngine[str]):
    """A JSON column that is written and read as text, never parsed."""

    __visit_name__ = "JSON"  # in SQL

    def column_expression(self, column: Any) -> sa.ColumnElement[str]:
        """Select the text, which drivers leave as it is."""
        return sa.cast(column, sa.Text)


class Database:
    """The API's asynchronous engines."""

    def __init__(self, url: str) -> None:
        """Prepare the engines; they connect when they are first used."""
        self._sqlite = url.startswith("sqlite")
        driver = "aiosqlite" if self._sqlite else "psycopg_async"
        url = url.replace(":", f"+{driver}:", 1)
        # A statement is a transaction, unless it is one of several.
        sync_engine = create_sync_engine(url, API_DEADLINE, **AUTOCOMMIT)
        self.engine = engine = AsyncEngine(sync_engine)
        level = "SERIALIZABLE" if self._sqlite else "READ COMMITTED"
        self.transactions = engine.execution_options(isolation_level=level)
        # For the keeper, which waits for none of those who fill the pool.
        self.aside = AsyncEngine(create_sync_engine(url, API_DEADLINE))
        self.outage = Outage(__name__, "The database")

    async def execute(self, sql: sa.Executable, *given: Any) -> sa.Result[Any]:
        """Return the result of a statement, which commits by itself."""
        async with self.engine.connect() as connection:
            return await connection.execute(sql, *given)

    async def ping(self) -> None:
        """Raise unless the database answers and takes writes."""
        # SQLite learns that its disk is full only when it writes; a read-only
        # PostgreSQL refuses what changes nothing, too.
        ask = "UPDATE alembic_version SET version_num = version_num"
        which = "" if self._sqlite else " WHERE false"
        await self.execute(sa.text(ask + which))

    async def close(self) -> None:
        """Close the pooled connections."""
        await self.engine.dispose()
        await self.aside.dispose()


def create_sync_engine(
    url: str, deadline: float | None = None, **options: Any
) -> sa.Engine:
    """Return an engine for plain calls; a migration's has no deadline."""
    sqlite = url.startswith("sqlite")
    if not sqlite:
        options |= {"pool_size": POOL_SIZE, "max_overflow": 0}
        connect: dict[str, Any] = {"connect_timeout": CONNECT_TIMEOUT}
        options |= {"pool_timeout": POOL_TIMEOUT, "connect_args": connect}
        if deadline is not None:
            limit = int(deadline * 1000)  # milliseconds
            # Else a session that waits for a row outlives its caller.
            timeout = int(limit * STATEMENT_SHARE)
            connect["options"] = f"-c statement_timeout={timeout}"
            # Else the system tries for a quarter of an hour.
            connect |= {"tcp_user_timeout": limit, "keepalives_idle": 5}
            connect |= {"keepalives_interval": 2, "keepalives_count": 3}
    engine = sa.create_engine(url, hide_parameters=True, **options)
    if sqlite:
        event.listen(engine, "do_connect", _connect_to_sqlite)
    elif deadline is not None:
        _watch(engine, deadline)
    return engine


def _connect_to_sqlite(dialect: Any, _: object, to: Any, options: Any) -> Any:
    """Open SQLite's file, made for this user: it has password hashes."""
    with suppress(OSError):  # SQLite says it, in a moment
        os.close(os.open(to[0], os.O_RDWR | os.O_CREAT, 0o600))
    connection = dialect.connect(*to, **options)
    # Readers and a writer work at once; it would not enforce foreign keys.
    connection.execute("PRAGMA journal_mode = WAL").close()
    connection.execute("PRAGMA foreign_keys = ON").close()
    return connection


# Connections in use, and the time.monotonic at which each is cut.
_ends: dict[Any, float] = {}


def _watch(engine: sa.Engine, deadline: float) -> None:
    """Let no connection be used for longer, or be kept if it is read-only."""
    if not _watcher.is_alive():
        _watcher.start()

    @event.listens_for(engine, "checkout")
    def begin(_: object, used: Any, __: object) -> None:
        """Note when the connection is cut."""
        _ends[used.driver_connection] = time.monotonic() + deadline

    event.listen(
        engine, "checkin", lambda _, it: _ends.pop(it.driver_connection, None)
    )

    @event.listens_for(engine, "handle_error")
    def leave_read_only(context: sa.ExceptionContext) -> None:
        """Drop all pooled sessions with a server that takes no writes."""
        # After a failover they would stay what they are: read-only.
        refused = psycopg.errors.ReadOnlySqlTransaction
        if isinstance(context.original_exception, refused):
            context.is_disconnect = True


def _cut_overdue() -> None:
    """End both ways of a socket in use for too long: who waits on it wakes."""
    while True:
        time.sleep(0.1)
        now = time.monotonic()
        for used, end in list(_ends.items()):
            if now >= end and _ends.pop(used, None) is not None:
                with suppress(OSError, psycopg.OperationalError):
                    duplicate = os.dup(used.fileno())
                    with socket.socket(fileno=duplicate) as wire:
                        wire.shutdown(socket.SHUT_RDWR)


_watcher = threading.Thread(target=_cut_overdue, daemon=True)
Question = TypeVar("Question")
Answer = TypeVar("Answer")
# What answers a list of questions, in their order; an exception among the
# answers is raised for its own caller alone.
Trip = Callable[[list[Question]], Awaitable[Sequence[Answer | Exception]]]


class Batch(Generic[Question, Answer]):
    """Calls that share trips: the first goes at once, others in the next."""

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
            try:
                answers = await self._trip([question for question, _ in calls])
            except Exception as error:
                calls, self._waiting = calls + self._waiting, []
                answers = [error] * len(calls)
            for (_, future), answer in zip(calls, answers, strict=True):
                if future.done():
                    pass  # its caller is gone
                elif isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        self._sender = None
