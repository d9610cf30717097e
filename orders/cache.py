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
from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar
from uuid import UUID

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import MaxConnectionsError, RedisError

CACHE_TTL = 300  # seconds
TOMBSTONE_TTL = 10  # seconds
MAX_FILL_AGE = 5  # seconds; well under TOMBSTONE_TTL
TOMBSTONE = b""
READ_TIMEOUT = 0.2  # seconds; a read has the database to fall back on
WRITE_TIMEOUT = 2  # seconds; an invalidation is worth waiting for
PAUSE = 1  # seconds that Redis is left alone after it failed
MAX_CONNECTIONS = 100  # of one process, for reads and for writes each
MEMORY_SIZE = 10_000  # orders in the embedded cache

logger = logging.getLogger(__name__)
T = TypeVar("T")


class CacheAway(Exception):
    """Redis did not answer, or failed a moment ago."""


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
    """A Redis client with a time limit that leaves a failed Redis alone.

    After a failure, calls raise CacheAway at once for PAUSE seconds; then one
    call tries again while the others still skip.
    """

    def __init__(self, url: str, *, timeout: float) -> None:
        """Prepare a pool of connections; none is opened yet."""
        self.pool = ConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
        )
        self.client = Redis(connection_pool=self.pool)
        self.timeout = timeout
        self._failed = False
        self._retry_at = 0.0

    async def call(self, operation: Callable[[Redis], Awaitable[T]]) -> T:
        """Return what the operation returns; CacheAway when it fails."""
        if self._failed:
            if time.monotonic() < self._retry_at:
                raise CacheAway
            self._retry_at = time.monotonic() + PAUSE
        try:
            async with asyncio.timeout(self.timeout):
                result = await operation(self.client)
        except MaxConnectionsError as error:
            raise CacheAway from error  # busy here, not away
        except (RedisError, OSError) as error:
            self._fail(error)
            raise CacheAway from error
        if self._failed:
            self._failed = False
            logger.info("Redis answers again")
        return result

    async def close(self) -> None:
        """Close the connections."""
        await self.pool.aclose()

    def _fail(self, error: Exception) -> None:
        if not self._failed:
            reason = str(error) or type(error).__name__
            logger.warning("Redis is away, working without it: %s", reason)
        self._failed = True
        self._retry_at = time.monotonic() + PAUSE


class RedisCache:
    """The cache that all processes share."""

    def __init__(self, reads: RedisLink, writes: RedisLink) -> None:
        """Take one link for reads and fills, one for invalidations."""
        self._reads = reads
        self._writes = writes

    async def get(self, order_id: UUID) -> bytes | None:
        """Return the cached bytes, or None; Redis away is a miss."""
        try:
            value = await self._reads.call(lambda r: r.get(_key(order_id)))
        except CacheAway:
            return None
        return value or None

    async def fill(self, order_id: UUID, value: bytes, read_at: float) -> None:
        """Cache a row unless something is there or the row is too old."""
        if time.monotonic() - read_at >= MAX_FILL_AGE:
            return
        try:
            await self._reads.call(
                lambda r: r.set(_key(order_id), value, nx=True, ex=CACHE_TTL)
            )
        except CacheAway:
            return

    async def invalidate(self, *order_ids: UUID) -> bool:
        """Write tombstones, in one round trip; False when Redis is away."""

        async def write(redis: Redis) -> None:
            async with redis.pipeline(transaction=False) as pipe:
                for order_id in order_ids:
                    pipe.set(_key(order_id), TOMBSTONE, ex=TOMBSTONE_TTL)
                await pipe.execute()

        try:
            await self._writes.call(write)
        except CacheAway:
            return False
        return True

    async def ping(self) -> None:
        """Raise CacheAway unless Redis answers in time."""
        # On the link that invalidates: the relay asks before it replays.
        await self._writes.call(lambda redis: redis.ping())


def connect_cache(
    reads: RedisLink | None, writes: RedisLink | None
) -> OrderCache:
    """Return the shared cache where there is a Redis, else the embedded."""
    if reads is None or writes is None:
        return MemoryCache()
    return RedisCache(reads, writes)


def _key(order_id: UUID) -> str:
    return f"order:{order_id}"
