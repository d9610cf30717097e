"""Open the database, PostgreSQL or SQLite, and let calls share round trips.

No call waits for long, whatever happens to the server or the network:

- A statement that takes too long is canceled by a server that works.
- A connection in use beyond its deadline is cut: the server hangs, or the
  network swallows what is sent. The caller sees a lost connection.
- A connection that died while it was idle is replaced before it is used.

The parameters that a user writes into DATABASE_URL win over those here.
"""

import asyncio
import os
import select
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

import psycopg
import sqlalchemy as sa
from pydantic_core import from_json
from sqlalchemy import event, exc
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel.ext.asyncio.session import AsyncSession

from orders.logs import Outage

POOL_SIZE = 10  # connections of one engine
POOL_TIMEOUT = 2  # seconds to wait for a free connection
CONNECT_TIMEOUT = 2  # seconds
API_DEADLINE = 2.5  # seconds that the API may use a connection at a stretch
WORKER_DEADLINE = 15.0  # seconds, for the worker and the relay
STATEMENT_SHARE = 0.8  # of the deadline, after which the server cancels
WATCH_INTERVAL = 0.1  # seconds
MAX_BATCH = 100  # calls that share a round trip

# A listener of a pool gets any driver's connection, and the pool's entry.
Connection = Any
PoolEntry = Any


# --- Engines and sessions ---------------------------------------------------


class Database:
    """The API's engines and sessions; they connect when first used."""

    def __init__(self, database_url: str) -> None:
        """Prepare the engines of a database."""
        url = sa.make_url(database_url)
        self._is_sqlite = url.get_backend_name() == "sqlite"
        if self._is_sqlite:
            url = url.set(drivername="sqlite+aiosqlite")
        options = engine_options(url, API_DEADLINE)
        # AUTOCOMMIT saves one statement the round trips of BEGIN and COMMIT.
        self.engine = create_async_engine(
            url, **(options | {"isolation_level": "AUTOCOMMIT"})
        )
        _prepare(self.engine.sync_engine, API_DEADLINE)
        # For SQLite's driver the opposite of AUTOCOMMIT is SERIALIZABLE.
        self.transactions = self.engine.execution_options(
            isolation_level=(
                "SERIALIZABLE" if self._is_sqlite else "READ COMMITTED"
            )
        )
        # A pool of its own: the keeper must not wait while calls fill it.
        self.keeper_engine = create_async_engine(url, **options)
        _prepare(self.keeper_engine.sync_engine, API_DEADLINE)
        self.outage = Outage(__name__, "The database")

    def session(self) -> AsyncSession:
        """Return a session whose statements each commit by themselves."""
        return AsyncSession(self.engine, expire_on_commit=False)

    def transaction(self) -> AsyncSession:
        """Return a session whose statements commit together."""
        return AsyncSession(self.transactions, expire_on_commit=False)

    async def ping(self) -> None:
        """Raise unless the database answers and takes writes."""
        # A read-only PostgreSQL refuses an UPDATE of no row, too. SQLite has
        # to write to learn that its disk is full.
        statement = "UPDATE alembic_version SET version_num = version_num"
        if not self._is_sqlite:
            statement += " WHERE false"
        async with self.engine.connect() as connection:
            await connection.execute(sa.text(statement))

    async def close(self) -> None:
        """Close the pooled connections."""
        await self.engine.dispose()
        await self.keeper_engine.dispose()


def create_sync_engine(
    database_url: str, deadline: float | None = None
) -> sa.Engine:
    """Return an engine for plain calls; a migration's has no deadline."""
    url = sa.make_url(database_url)
    engine = sa.create_engine(url, **engine_options(url, deadline))
    _prepare(engine, deadline)
    return engine


def engine_options(url: sa.URL, deadline: float | None) -> dict[str, Any]:
    """Return the options of an engine, as SQLAlchemy names them."""
    options: dict[str, Any] = {
        "hide_parameters": True,
        "json_deserializer": from_json,  # takes a third of json's time
    }
    options["pool_timeout"] = POOL_TIMEOUT
    if url.get_backend_name() == "sqlite":
        return options
    arguments: dict[str, Any] = {
        "connect_timeout": CONNECT_TIMEOUT,
        "client_encoding": "utf8",  # a database may have another default
        # Server-side prepared statements collide under a pooler such as
        # PgBouncer, and fail when the type of a column changes.
        "prepare_threshold": None,
    }
    if deadline is not None:
        # Otherwise the system goes on sending for a quarter of an hour.
        arguments |= {
            "tcp_user_timeout": int(deadline * 1000),  # milliseconds
            "keepalives_idle": 5,  # seconds
            "keepalives_interval": 2,  # seconds
            "keepalives_count": 3,
        }
    return options | {
        # A stricter default of the database would let one of two relays fail.
        "isolation_level": "READ COMMITTED",
        "pool_size": POOL_SIZE,
        "max_overflow": 0,
        "connect_args": {
            name: value
            for name, value in arguments.items()
            if name not in url.query
        },
    }


def _prepare(engine: sa.Engine, deadline: float | None) -> None:
    """Attach to an engine what its connections need."""
    if engine.dialect.name == "sqlite":
        event.listen(engine, "do_connect", _create_private_file)
        event.listen(engine, "connect", _prepare_sqlite)
        return
    # psycopg reads no other style of dates; fewer digits would round totals.
    settings = "SET datestyle TO ISO; SET extra_float_digits TO 1"
    # PostgreSQL reads `--Statement-Timeout` as well.
    options = str(engine.url.query.get("options", ""))
    options = options.lower().replace("-", "_")
    if deadline is not None and "statement_timeout" not in options:
        # Otherwise a session that waits for a row outlives its caller.
        limit = int(deadline * STATEMENT_SHARE * 1000)  # milliseconds
        settings += f"; SET statement_timeout TO {limit}"

    @event.listens_for(engine, "connect")
    def prepare_session(connection: Connection, _: object) -> None:
        """Set what a pooler refuses while a client connects to it."""
        cursor = connection.cursor()
        cursor.execute(settings)
        cursor.close()
        connection.commit()

    event.listen(engine, "checkout", _refuse_dead_connection)
    event.listen(engine, "handle_error", _leave_read_only_server)
    if deadline is not None:
        watcher.watch(engine, deadline)


def _refuse_dead_connection(
    _: Connection, entry: PoolEntry, __: object
) -> None:
    """Let the pool replace a connection that the server has closed."""
    # A server says nothing to an idle client but that it closes the
    # connection. So an idle socket with something to read is dead. The look
    # takes microseconds, where a query would take a round trip.
    poll = select.poll()
    try:
        poll.register(entry.driver_connection.fileno(), select.POLLIN)
    except psycopg.OperationalError as error:  # the watcher has cut it
        raise exc.DisconnectionError from error
    if poll.poll(0):
        raise exc.DisconnectionError


def _leave_read_only_server(context: sa.ExceptionContext) -> None:
    """Drop all pooled sessions with a server that takes no writes."""
    # After a failover these sessions would stay read-only for ever.
    refusal = psycopg.errors.ReadOnlySqlTransaction
    if isinstance(context.original_exception, refusal):
        context.is_disconnect = True


# --- SQLite -----------------------------------------------------------------

_creating_a_file = threading.Lock()


def _create_private_file(
    _: sa.Dialect, __: object, arguments: list[str], ___: object
) -> None:
    """Create SQLite's file for this user alone: it has password hashes."""
    # Only an absent file is opened here, by one thread at a time. To close a
    # file that SQLite has open would drop the locks of this process, and
    # another process could then delete what SQLite has not merged yet.
    with _creating_a_file, suppress(OSError):  # SQLite will name the reason
        os.close(os.open(arguments[0], os.O_CREAT | os.O_EXCL, 0o600))


def _prepare_sqlite(connection: Connection, _: object) -> None:
    """Let readers and a writer work at once, and enforce foreign keys."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.close()


# --- Deadlines --------------------------------------------------------------


class Watcher:
    """Cuts connections that are in use beyond their deadline."""

    def __init__(self) -> None:
        """Start without connections, and without a thread."""
        # The time.monotonic at which each connection in use is cut.
        self._deadlines: dict[Connection, float] = {}
        self._thread: threading.Thread | None = None

    def watch(self, engine: sa.Engine, deadline: float) -> None:
        """Watch the connections of an engine; `deadline` is in seconds."""
        if self._thread is None or not self._thread.is_alive():
            # After a fork, the connections are those of the parent.
            self._deadlines.clear()
            self._thread = threading.Thread(
                target=self._cut_overdue, name="watcher", daemon=True
            )
            self._thread.start()

        def begin(_: object, entry: PoolEntry, *__: object) -> None:
            """Note when the connection is cut."""
            end = time.monotonic() + deadline
            self._deadlines[entry.driver_connection] = end

        # `insert` makes it the first of all listeners: the others make queries
        # on a new connection. A pooler accepts a connection at once, and lets
        # its first query wait for two minutes while the server is away.
        event.listen(engine, "connect", begin, insert=True)
        event.listen(engine, "checkout", begin)

        @event.listens_for(engine, "checkin")
        def end(_: object, entry: PoolEntry) -> None:
            """Forget the connection."""
            self._deadlines.pop(entry.driver_connection, None)

    def _cut_overdue(self) -> None:
        """Shut the sockets of overdue connections, which wakes their users."""
        while True:
            time.sleep(WATCH_INTERVAL)
            moment = time.monotonic()
            for connection, deadline in list(self._deadlines.items()):
                if moment < deadline:
                    continue
                # The connection may have been returned just now.
                if self._deadlines.pop(connection, None) is None:
                    continue
                with suppress(OSError, psycopg.OperationalError):
                    duplicate = os.dup(connection.fileno())
                    with socket.socket(fileno=duplicate) as wire:
                        wire.shutdown(socket.SHUT_RDWR)


watcher = Watcher()

# --- Calls that share round trips -------------------------------------------

Request = TypeVar("Request")
Answer = TypeVar("Answer")
# Answers a list of requests in their order. An exception among the answers is
# raised for its own caller alone.
Flush = Callable[[list[Request]], Awaitable[Sequence[Answer | Exception]]]


class Batcher(Generic[Request, Answer]):
    """Lets calls share round trips.

    The first call travels at once. Calls that come while it is under way
    travel together in the next round trip.
    """

    def __init__(self, flush: Flush[Request, Answer]) -> None:
        """Take what makes one round trip for a list of requests."""
        self._flush = flush
        self._waiting: list[tuple[Request, asyncio.Future[Answer]]] = []
        self._sender: asyncio.Task[None] | None = None

    def submit(self, request: Request) -> asyncio.Future[Answer]:
        """Return the future of the answer, or of the error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((request, future))
        if self._sender is None:
            self._sender = loop.create_task(self._send())
        return future

    async def _send(self) -> None:
        """Make round trips until no call waits."""
        while calls := self._waiting[:MAX_BATCH]:
            del self._waiting[:MAX_BATCH]
            try:
                answers = await self._flush([request for request, _ in calls])
                answered = list(zip(calls, answers, strict=True))
            except Exception as error:
                # A failed trip fails every call that waits, so that none of
                # them waits for two time limits.
                calls += self._waiting
                self._waiting = []
                answered = [(call, error) for call in calls]
            for (_, future), answer in answered:
                if future.done():
                    continue  # its caller has given up
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
        self._sender = None
