"""Cache orders so that a read is fast and never stale.

Nothing is ever deleted. To invalidate is to write a tombstone, which reads as
a miss and refuses to be filled; it is written before the commit, so that a
crash after it leaves no old bytes, and again after it. A fill never replaces
what is there, and is refused once its row was read longer ago than a
tombstone surely lives. Redis away or hung is a miss, not an error.
"""

import asyncio
import logging
import time
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from redis.asyncio import ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

CACHE_TTL = 300  # seconds
TOMBSTONE_TTL = 10  # seconds
MAX_FILL_AGE = 5  # seconds; well under TOMBSTONE_TTL
TOMBSTONE = b""
READ_TIMEOUT = 0.2  # seconds; a read has the database to fall back on
WRITE_TIMEOUT = 2  # seconds; an invalidation is worth waiting for
PAUSE = 0.5  # seconds that Redis is left alone after it failed
REPORT_INTERVAL = 10  # seconds without a failure before the next is news
MEMORY_SIZE = 10_000  # orders in the embedded cache

logger = logging.getLogger(__name__)
Command = tuple[str | bytes | int, ...]


class CacheAway(Exception):
    """Redis did not answer, or failed a moment ago."""


class Call(NamedTuple):
    """Commands for Redis, and who waits for their answers."""

    commands: tuple[Command, ...]
    answers: asyncio.Future[list[Any]]


class OrderCache(Protocol):
    """What the service asks of a cache; None is a miss."""

    async def get(self, order_id: UUID) -> bytes | None:
        """Return the cached bytes, or None."""

    async def fill(self, order_id: UUID, value: bytes, read_at: float) -> None:
        """Cache a row that was read at `read_at` (`time.monotonic`)."""

    async def invalidate(self, *order_ids: UUID) -> bool:
        """Write tombstones; return whether the cache has taken them."""

    async def ping(self) -> None:
        """Raise CacheAway unless the cache answers."""


class MemoryCache:
    """The embedded cache, in this process's memory."""

    def __init__(self) -> None:
        """Start empty."""
        self._entries: dict[UUID, tuple[bytes, float]] = {}

    async def get(self, order_id: UUID) -> bytes | None:
        """Return the cached bytes, or None."""
        value, expires_at = self._entries.get(order_id, (TOMBSTONE, 0.0))
        return value or None if time.monotonic() < expires_at else None

    async def fill(self, order_id: UUID, value: bytes, read_at: float) -> None:
        """Cache a row unless something is there or the row is too old."""
        moment = time.monotonic()
        _, expires_at = self._entries.get(order_id, (TOMBSTONE, 0.0))
        if moment >= expires_at and moment - read_at < MAX_FILL_AGE:
            self._put(order_id, value, moment + CACHE_TTL)

    async def invalidate(self, *order_ids: UUID) -> bool:
        """Write tombstones."""
        for order_id in order_ids:
            self._put(order_id, TOMBSTONE, time.monotonic() + TOMBSTONE_TTL)
        return True

    async def ping(self) -> None:
        """Answer always."""

    def _put(self, order_id: UUID, value: bytes, expires_at: float) -> None:
        # The oldest entry goes first; a dict keeps the order of insertion.
        self._entries.pop(order_id, None)
        if len(self._entries) >= MEMORY_SIZE:
            del self._entries[next(iter(self._entries))]
        self._entries[order_id] = (value, expires_at)


class RedisLink:
    """One connection to Redis, which all calls of a process share.

    Calls that come while a round trip is under way travel together in the
    next. After a failure, calls raise CacheAway at once for PAUSE seconds;
    then one tries again while the others still skip.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        """Prepare, with the time limit of a round trip; nothing connects."""
        self._pool = ConnectionPool.from_url(
            url, socket_timeout=None, retry=Retry(NoBackoff(), 0)
        )
        self._connection = self._pool.make_connection()
        self._timeout = timeout
        self._calls: list[Call] = []
        self._sender: asyncio.Task[None] | None = None
        self._failed = False
        self._retry_at = 0.0
        self._report_at = 0.0

    async def call(self, *commands: Command) -> list[Any]:
        """Return the answer to each command; CacheAway when one failed."""
        if self._failed:
            if time.monotonic() < self._retry_at:
                raise CacheAway
            self._retry_at = time.monotonic() + PAUSE
        call = Call(commands, asyncio.get_running_loop().create_future())
        self._calls.append(call)
        if self._sender is None:
            self._sender = asyncio.create_task(self._send())
        return await call.answers

    async def close(self) -> None:
        """Close the connection."""
        if self._sender is not None:
            self._sender.cancel()
        await self._connection.disconnect()

    async def _send(self) -> None:
        """Make round trips until no call waits."""
        calls: list[Call] = []
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout) as limit:
                await self._pool.ensure_connection(self._connection)
                while self._calls:
                    calls, self._calls = self._calls, []
                    await self._round_trip(calls)
                    limit.reschedule(loop.time() + self._timeout)
        except Exception as error:  # whatever it is, nobody may wait on
            await self._connection.disconnect(nowait=True)
            self._fail(error, calls)
        finally:
            self._sender = None

    async def _round_trip(self, calls: list[Call]) -> None:
        commands = [command for call in calls for command in call.commands]
        await self._connection.send_packed_command(
            self._connection.pack_commands(commands)
        )
        for call in calls:
            answers = [
                await self._connection.read_response() for _ in call.commands
            ]
            if not call.answers.done():  # its caller may be gone
                call.answers.set_result(answers)
        if self._failed:
            self._failed = False
            logger.info("Redis answers again")

    def _fail(self, error: Exception, calls: list[Call]) -> None:
        """Fail these calls, and those that waited behind them."""
        moment, reason = time.monotonic(), str(error) or type(error).__name__
        if moment >= self._report_at:  # a slow Redis fails now and then
            logger.warning("Redis is away, working without it: %s", reason)
        self._failed = True
        self._retry_at = moment + PAUSE
        self._report_at = moment + REPORT_INTERVAL
        calls += self._calls
        self._calls = []
        for call in calls:
            if not call.answers.done():
                call.answers.set_exception(CacheAway(reason))


class RedisCache:
    """The cache that all processes share."""

    def __init__(self, reads: RedisLink, writes: RedisLink) -> None:
        """Take one link for reads and fills, one for invalidations."""
        self._reads = reads
        self._writes = writes

    async def get(self, order_id: UUID) -> bytes | None:
        """Return the cached bytes, or None; Redis away is a miss."""
        try:
            (value,) = await self._reads.call(("GET", _key(order_id)))
        except CacheAway:
            return None
        return value or None

    async def fill(self, order_id: UUID, value: bytes, read_at: float) -> None:
        """Cache a row unless something is there or the row is too old."""
        if time.monotonic() - read_at >= MAX_FILL_AGE:
            return
        try:
            await self._reads.call(
                ("SET", _key(order_id), value, "EX", CACHE_TTL, "NX")
            )
        except CacheAway:
            return

    async def invalidate(self, *order_ids: UUID) -> bool:
        """Write tombstones, in one round trip; False when Redis is away."""
        tombstones = (
            ("SET", _key(order_id), TOMBSTONE, "EX", TOMBSTONE_TTL)
            for order_id in order_ids
        )
        try:
            await self._writes.call(*tombstones)
        except CacheAway:
            return False
        return True

    async def ping(self) -> None:
        """Raise CacheAway unless Redis answers in time."""
        # On the link that invalidates: the relay asks before it replays.
        await self._writes.call(("PING",))


def connect_cache(
    reads: RedisLink | None, writes: RedisLink | None
) -> OrderCache:
    """Return the shared cache where there is a Redis, else the embedded."""
    if reads is None or writes is None:
        return MemoryCache()
    return RedisCache(reads, writes)


def _key(order_id: UUID) -> str:
    return f"order:{order_id}"
