"""Cache orders so that a read is fast and never stale.

Nothing is ever deleted: to invalidate is to write a tombstone, which reads as
a miss and refuses to be filled. `service` says why before and after a commit.

The cache is trusted for a second at a time: a keeper in each process extends
it once Redis took the tombstone of every change, and a probe. While it is not
trusted nobody waits for Redis: hung, refused, slow, full and read-only are one
case. What a process could not tell Redis, the next keeper that can tells it.
"""

import asyncio
import re
import time
from collections.abc import Iterable
from typing import Any, NamedTuple
from uuid import UUID

import hiredis
from cachetools import TLRUCache
from redis.asyncio import ConnectionPool
from redis.exceptions import ResponseError

from orders.db import Batch
from orders.logs import Outage
from orders.models import OrderStatus

CACHE_TTL = 300  # seconds
TOMBSTONE_TTL = 10  # seconds
MAX_FILL_AGE = 5  # seconds; well under TOMBSTONE_TTL
TRUST = 1.0  # seconds
# A change holds a connection to the database meanwhile, which others want:
TRIP_TIMEOUT = 0.2  # seconds; well under db.POOL_TIMEOUT
CONNECT_TIMEOUT = 1.0  # seconds; only the keeper connects
MEMORY_SIZE = 32 * 1024 * 1024  # bytes of the embedded cache
ENTRY_SIZE = 384  # bytes that an entry takes beside its value


class OrderView(NamedTuple):
    """An order as it is cached and answered: its JSON, and what guards it."""

    user_id: int
    status: str
    body: bytes

    @classmethod
    def of(cls, order: Iterable[Any]) -> "OrderView":
        """Serialise an order's row: the only place that does."""
        order_id, user_id, items, total_price, status, created_at = order
        body = (
            f'{{"id":"{order_id}","user_id":{user_id},"items":{items},'
            f'"total_price":{total_price!r},"status":"{status}",'
            f'"created_at":"{created_at.isoformat()[:-6]}Z"}}'
        )
        return cls(user_id, status, body.encode())

    @classmethod
    def decode(cls, cached: bytes) -> "OrderView | None":
        """Read owner, status, body; a tombstone, or no order, is a miss."""
        try:
            user_id, status, body = cached.split(b" ", 2)
            return cls(int(user_id), OrderStatus(status.decode()), body)
        except ValueError:
            return None


class MemoryCache:
    """The embedded cache, in this process's memory: always trusted."""

    trusted = True

    def __init__(self) -> None:
        """Start empty."""
        self._entries = TLRUCache[UUID, OrderView | None](
            MEMORY_SIZE,
            lambda _, it, now: now + (CACHE_TTL if it else TOMBSTONE_TTL),
            time.monotonic,
            lambda it: ENTRY_SIZE + (len(it.body) if it else 0),
        )

    async def get(self, order_id: UUID) -> OrderView | None:
        """Return the cached order, or None."""
        return self._entries.get(order_id)

    def fill(self, order_id: UUID, view: OrderView, read_at: float) -> None:
        """Cache a row unless something is there or the row is too old."""
        if time.monotonic() - read_at < MAX_FILL_AGE:
            self._entries.setdefault(order_id, view)

    async def invalidate(self, order_id: UUID) -> None:
        """Write a tombstone."""
        self._entries[order_id] = None

    async def prove(self, changed: Iterable[UUID], **_: object) -> None:
        """Write tombstones, for changes of a process that is gone."""
        self._entries.update(dict.fromkeys(changed))

    async def close(self) -> None:
        """Keep nothing open."""


class RedisAway(Exception):
    """Redis is not trusted, did not answer in time, or refused."""


# A probe: may Redis be written? It takes tombstones, keeps since when it has
# all of them, which a flush takes, and returns the server's time.
PROBE = f"""
local t = redis.call('TIME')
local since = redis.call('GET', KEYS[1]) or t[1] + t[2] / 1000000
redis.call('SET', KEYS[1], since, 'EX', {CACHE_TTL})
for i = 2, #KEYS do redis.call('SET', KEYS[i], '', 'EX', ARGV[1]) end
return t
"""
# Redis compares its own clock, for a fill that the network held back.
FILL = f"""
local t = redis.call('TIME')
local since = redis.call('GET', KEYS[2])
local age = t[1] + t[2] / 1000000 - ARGV[2]
if age < {MAX_FILL_AGE} and since and ARGV[2] - since > 0 then
    redis.call('SET', KEYS[1], ARGV[1], 'EX', {CACHE_TTL}, 'NX')
end
"""


class RedisCache:
    """The cache that all processes share, over one connection a process."""

    def __init__(self, url: str) -> None:
        """Prepare; only the keeper connects."""
        pool: Any = ConnectionPool.from_url(url, socket_timeout=None)
        self._connection = pool.make_connection()
        self._batch = Batch[tuple[Any, ...], Any](self._trip)
        self._outage = Outage(__name__, "Redis")
        self._run = ""  # the server's epoch; none without a connection
        self._clock = 0.0  # the server's less time.monotonic, never more
        self._proved_at = 0.0  # of time.monotonic; 0: it may lack a change

    @property
    def trusted(self) -> bool:
        """Return whether the keeper's last round was a moment ago."""
        return time.monotonic() < self._proved_at + TRUST

    async def get(self, order_id: UUID) -> OrderView | None:
        """Return the cached order, or None; Redis away is a miss."""
        value = await self.ask("GET", self._key(order_id))
        return OrderView.decode(value) if value else None

    def fill(self, order_id: UUID, view: OrderView, read_at: float) -> None:
        """Send a row to the cache, and wait for nothing."""
        if self.trusted:
            read = f"{read_at + self._clock:f}"  # by the server's clock
            keys = self._key(order_id), self._key("since")
            value = f"{view.user_id} {view.status} ".encode() + view.body
            sent = self._batch.ask(("EVAL", FILL, 2, *keys, value, read))
            sent.add_done_callback(lambda t: t.cancelled() or t.exception())

    async def invalidate(self, order_id: UUID) -> None:
        """Write a tombstone, or lose the trust: then the keepers write it."""
        if not self._run:
            return
        key = self._key(order_id)
        # Who refuses may be a replica by now, and another epoch begun.
        try:
            await self._batch.ask(("SET", key, "", "EX", TOMBSTONE_TTL))
        except RedisAway as refused:
            await self._lose(refused)

    async def prove(
        self, changed: Iterable[UUID], *, began: float, complete: bool
    ) -> None:
        """Trust Redis for a second if it takes tombstones, and a probe."""
        try:
            if not self._run:
                async with asyncio.timeout(CONNECT_TIMEOUT):
                    self._run = await self._connect()
            keys = [self._key("since"), *map(self._key, changed)]
            probe = "EVAL", PROBE, len(keys), *keys, TOMBSTONE_TTL
            seconds, micros = await self._batch.ask(probe)
        except Exception as error:
            raise await self._lose(error) from error
        self._clock = int(seconds) + int(micros) / 1e6 - time.monotonic()
        # A round that does not know all changes goes on from one that did.
        if complete or self._proved_at:
            self._proved_at = began
            self._outage.end()

    async def ask(self, *command: Any) -> Any:
        """Return the answer; None if Redis is not trusted, or not well."""
        try:
            return await self._batch.ask(command) if self.trusted else None
        except RedisAway:  # said by the trip, or its call's own
            return None

    async def close(self) -> None:
        """Close the connection, and trust nothing."""
        self._run, self._proved_at = "", 0.0
        await self._connection.disconnect(nowait=True)

    async def _trip(self, commands: list[tuple[Any, ...]]) -> list[Any]:
        """Make one round trip; a refusal is its command's own."""
        if not self._run:  # else it would connect, whatever epoch it is
            raise RedisAway
        # Not asyncio.timeout, which takes longer than all else here.
        trip: Any = asyncio.current_task()
        loop = trip.get_loop()
        late = loop.call_later(TRIP_TIMEOUT, trip.cancel, "it hangs")
        try:
            packed = [hiredis.pack_command(command) for command in commands]
            await self._connection.send_packed_command(packed)
            return [await self._read() for _ in commands]
        except (Exception, asyncio.CancelledError) as error:
            reason = error
        finally:
            late.cancel()  # nor may it interrupt what ends the connection
        raise await self._lose(reason) from reason

    async def _read(self) -> Any:
        """Return the next answer, or the exception of who is refused."""
        try:
            return await self._connection.read_response()
        except ResponseError as error:
            return RedisAway(error)

    async def _connect(self) -> str:
        """Connect, and return whose keys there are: the server's epoch."""
        # A server that comes back with a snapshot, or a replica that is
        # promoted, begins with an empty cache. Also who led before: its run
        # is the same, its replication is not.
        await self._connection.connect()
        await self._connection.send_command("INFO")
        info = bytes(await self._connection.read_response()).decode()
        return "-".join(re.findall(r"\b(?:run_id|master_replid):(\w+)", info))

    async def _lose(self, error: BaseException) -> RedisAway:
        """Give the connection up: whatever it is, nobody may wait on."""
        await self.close()
        self._outage.report(error)
        return RedisAway(repr(error))

    def _key(self, name: UUID | str) -> str:
        """Return the key of an order, or another, in this run."""
        return f"order:{self._run}:{name}"


OrderCache = MemoryCache | RedisCache
