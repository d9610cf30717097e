"""Cache orders, so that a read is fast and never older than a change.

No command deletes a key, as a late fill could then restore an older order. To
invalidate an order is to write a *tombstone*: an empty value that reads as a
miss, and that a fill does not overwrite. Every key expires. A change of an
order goes like this:

1. In its transaction, it writes a tombstone, for a crash after the commit.
2. The change commits, with an event that stays unprocessed for now.
3. The change writes a tombstone again, for a reader that has cached the old
   row meanwhile. If Redis does not take it, the change waits for one TRUST.
4. The change is acknowledged.
5. The keeper (in `events`) of each process reads the events of changes that
   are not processed, writes their tombstones once more, and marks them. When
   Redis took them all, this process *trusts* the cache for one TRUST. All
   processes share one Redis, so that the tombstones of one keeper serve all.

No read asks a Redis that is not trusted. So for a read, a server that hangs,
refuses, is slow, full, read-only or cut off is one case: a miss after at most
TRIP_TIMEOUT. The first failure ends the trust, and later reads do not wait.
"""

import asyncio
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple
from uuid import UUID

import hiredis
from cachetools import TLRUCache
from pydantic import TypeAdapter
from redis.asyncio import ConnectionPool
from redis.exceptions import ResponseError

from orders.db import Batcher
from orders.logs import Outage
from orders.models import ORDER_FORM, Order, OrderPublic, OrderStatus

CACHE_TTL = 300  # seconds
TOMBSTONE_TTL = 10  # seconds
MAX_FILL_AGE = 5  # seconds; well under TOMBSTONE_TTL
TRUST = 1.0  # seconds
# A change holds a connection to the database while it waits for Redis, so the
# limit is well under db.POOL_TIMEOUT.
TRIP_TIMEOUT = 0.2  # seconds of a round trip
REDIS_CONNECT_TIMEOUT = 1.0  # seconds; only the keeper connects
NEVER = 0.0  # of time.monotonic: long ago
MEMORY_SIZE = 32 * 1024 * 1024  # bytes of the embedded cache
ENTRY_SIZE = 384  # bytes that an entry takes beside its value

ORDER_JSON = TypeAdapter(OrderPublic)
CacheState = Literal["trusted", "untrusted", "embedded", "off"]  # in /ready


class OrderView(NamedTuple):
    """An order as it is cached and answered: its JSON, and what guards it."""

    user_id: int
    status: str
    body: bytes

    @classmethod
    def of(cls, row: Mapping[Any, Any]) -> "OrderView":
        """Return the view of an order's columns, by their names.

        Names are text, but SQLAlchemy types them as Any.
        """
        # The members are written in the sequence of the class. SQLAlchemy
        # fills an instance in a sequence that differs between processes, and
        # then the bytes under one strong ETag would differ, too.
        order = OrderPublic.model_construct(**row)
        return cls(order.user_id, order.status, ORDER_JSON.dump_json(order))

    @classmethod
    def of_order(cls, order: Order) -> "OrderView":
        """Return the view of an instance, as a session returns it."""
        return cls.of(order.model_dump())

    def encode(self) -> bytes:
        """Return the cached value."""
        return f"{ORDER_FORM} {self.user_id} {self.status} ".encode() + (
            self.body
        )

    @classmethod
    def decode(cls, value: bytes) -> "OrderView | None":
        """Return the view in a cached value, or None for anything else.

        A tombstone is a miss, and so is an order in the form of another
        release. The form is in the value and not in the key: otherwise the
        tombstones of one release would not be seen by the other.
        """
        try:
            form, user_id, status, body = value.split(b" ", 3)
            view = cls(int(user_id), OrderStatus(status.decode()), body)
        except ValueError:
            return None
        return view if form == ORDER_FORM.encode() else None


class MemoryCache:
    """The embedded cache, in the memory of the one process: always trusted."""

    state: CacheState = "embedded"
    trusted = was_trusted = True

    def __init__(self) -> None:
        """Start empty."""
        self._entries = TLRUCache[UUID, OrderView | None](
            MEMORY_SIZE,
            lambda _, view, now: now + (CACHE_TTL if view else TOMBSTONE_TTL),
            time.monotonic,
            lambda view: ENTRY_SIZE + (len(view.body) if view else 0),
        )

    async def get(self, order_id: UUID) -> OrderView | None:
        """Return the cached order, or None."""
        return self._entries.get(order_id)

    def fill(self, order_id: UUID, view: OrderView, read_at: float) -> None:
        """Cache a row unless there is an entry, or the row is too old."""
        if time.monotonic() - read_at < MAX_FILL_AGE:
            self._entries.setdefault(order_id, view)

    async def invalidate(self, order_id: UUID) -> bool:
        """Write a tombstone; return whether it was written."""
        self._entries[order_id] = None
        return True

    async def write_tombstones(self, changed: Iterable[UUID]) -> None:
        """Write tombstones for changes that an earlier process left."""
        self._entries.update(dict.fromkeys(changed))

    def trust_from(self, moment: float) -> None:
        """Do nothing: the cache of the only process is always right."""

    async def close(self) -> None:
        """Do nothing: there is no connection."""


class NoCache(MemoryCache):
    """No cache: one of several processes would not see others' changes."""

    state = "off"

    def fill(self, order_id: UUID, view: OrderView, read_at: float) -> None:
        """Forget the row."""


class RedisAway(Exception):
    """Redis is not connected, did not answer in time, or refused."""


class RedisRefused(RedisAway):
    """Redis answered one command with an error; the connection is good."""


# Writes tombstones, and proves by the key `since` that Redis takes writes.
# KEYS: since, then the orders; ARGV: the tombstones' seconds. Answers Redis's
# time. `since` is when the first probe came after Redis was empty: Redis has
# every tombstone that was written later. A flush deletes `since`, and then
# nothing is cached until the next probe.
PROBE = f"""
local t = redis.call('TIME')
local since = redis.call('GET', KEYS[1]) or t[1] + t[2] / 1000000
redis.call('SET', KEYS[1], since, 'EX', {CACHE_TTL})
for i = 2, #KEYS do redis.call('SET', KEYS[i], '', 'EX', ARGV[1]) end
return t
"""
# Caches a row unless there is a value. KEYS: the order, since; ARGV: the
# value, and when its row was read. Redis compares by its own clock: the
# network may hold a fill back until the tombstone of a later change is gone.
# Tombstones from before `since` may be missing, so older rows are refused.
FILL = f"""
local t = redis.call('TIME')
local since = redis.call('GET', KEYS[2])
local age = t[1] + t[2] / 1000000 - ARGV[2]
if age < {MAX_FILL_AGE} and since and ARGV[2] - since > 0 then
    redis.call('SET', KEYS[1], ARGV[1], 'EX', {CACHE_TTL}, 'NX')
end
"""
Command = tuple[Any, ...]  # text, bytes and numbers; hiredis says one value
Reply = Any  # what Redis answers depends on the command


class RedisCache:
    """The cache that all processes share, over one connection a process.

    A connection of redis-py is used without its client, for two reasons. The
    client connects by itself, also to another server, for which the keys of
    this process are wrong. And its pipeline takes more than twice the time.
    """

    def __init__(self, url: str) -> None:
        """Prepare the connection; only the keeper connects."""
        pool = ConnectionPool.from_url(url, socket_timeout=None)
        self._connection = pool.make_connection()  # type: ignore[no-untyped-call]  # by redis-py
        self._batcher = Batcher[Command, Reply](self._make_trip)
        self._outage = Outage(__name__, "Redis")
        self._epoch = ""  # the identity of the server; empty: not connected
        # Redis's clock, read during a trip, minus ours, read after it. So the
        # difference is too small: a row looks older than it is, never younger.
        self._clock_offset = 0.0
        self._trusted_from = NEVER  # of time.monotonic

    @property
    def trusted(self) -> bool:
        """Return whether the keeper renewed the trust a moment ago."""
        return time.monotonic() < self._trusted_from + TRUST

    @property
    def state(self) -> CacheState:
        """Return what /ready says of the cache."""
        return "trusted" if self.trusted else "untrusted"

    async def get(self, order_id: UUID) -> OrderView | None:
        """Return the cached order, or None; Redis away is a miss."""
        value = await self.execute("GET", self._key(order_id))
        return OrderView.decode(value) if value else None

    def fill(self, order_id: UUID, view: OrderView, read_at: float) -> None:
        """Send a row to the cache, without waiting for an answer."""
        if self.trusted:
            read = f"{read_at + self._clock_offset:f}"  # by Redis's clock
            keys = self._key(order_id), self._key("since")
            command = ("EVAL", FILL, 2, *keys, view.encode(), read)
            sent = self._batcher.submit(command)
            sent.add_done_callback(_ignore_error)

    async def invalidate(self, order_id: UUID) -> bool:
        """Write a tombstone; return whether it was written.

        Unlike a read, a change asks a Redis that is connected even if it is
        not trusted. If Redis refuses, this process trusts nothing until its
        keeper has written the tombstone.
        """
        if not self._epoch:
            return False  # the name of the key would lack the epoch
        key = self._key(order_id)
        try:
            await self._batcher.submit(("SET", key, "", "EX", TOMBSTONE_TTL))
        except RedisRefused as error:
            # The server may have been demoted to a replica. Drop the
            # connection, so that the keeper reads its identity again.
            await self._lose(error)
            return False
        except RedisAway:
            return False
        return True

    async def write_tombstones(self, changed: Iterable[UUID]) -> None:
        """Write the tombstones of changed orders, and a probe.

        Connect before, if need be. Raise RedisAway, and trust nothing, unless
        Redis takes them all.
        """
        try:
            if not self._epoch:
                async with asyncio.timeout(REDIS_CONNECT_TIMEOUT):
                    self._epoch = await self._connect()
            keys = [self._key("since"), *map(self._key, changed)]
            probe: Command = ("EVAL", PROBE, len(keys), *keys, TOMBSTONE_TTL)
            seconds, micros = await self._batcher.submit(probe)
        except Exception as error:  # whatever fails, the trust is lost
            await self._lose(error)
            raise RedisAway(repr(error)) from error
        redis_time = int(seconds) + int(micros) / 1e6
        self._clock_offset = redis_time - time.monotonic()

    def trust_from(self, moment: float) -> None:
        """Trust the cache for one TRUST from a moment of time.monotonic.

        Redis now has the tombstone of every change committed before it. NEVER
        ends the trust.
        """
        self._trusted_from = moment
        self._outage.end()

    @property
    def was_trusted(self) -> bool:
        """Return whether the cache was trusted since it was last lost."""
        return self._trusted_from > NEVER

    async def execute(self, *command: str | bytes | int) -> Reply:
        """Return the answer; None if Redis is untrusted, away, or refuses."""
        try:
            if self.trusted:
                return await self._batcher.submit(command)
        except RedisAway:
            pass  # `_lose` has reported it; or this command was refused
        return None

    async def close(self) -> None:
        """Close the connection, and trust nothing."""
        self._epoch, self._trusted_from = "", NEVER
        await self._connection.disconnect(nowait=True)

    async def _make_trip(self, commands: list[Command]) -> list[Reply]:
        """Return the answers to commands, which share one round trip."""
        # redis-py would connect by itself, and maybe to another server, but
        # only `_connect` reads the epoch of a server.
        if not self._epoch:
            raise RedisAway("not connected")
        try:
            async with asyncio.timeout(TRIP_TIMEOUT):
                packed = [hiredis.pack_command(each) for each in commands]
                await self._connection.send_packed_command(packed)
                return [await self._read_answer() for _ in commands]
        except Exception as error:  # whatever fails, the trust is lost
            await self._lose(error)
            raise RedisAway(repr(error)) from error

    async def _read_answer(self) -> Reply:
        """Return the next answer, or a refusal, for Batcher to raise."""
        try:
            return await self._connection.read_response()
        except ResponseError as error:
            return RedisRefused(error)

    async def _connect(self) -> str:
        """Connect, and return the server's epoch, which is in every key.

        A server that was restarted with a snapshot lacks tombstones, and so
        does a replica that was promoted. A restart changes the run's id, and
        a promotion the replication's, so that no value from before is read.
        """
        await self._connection.connect()
        await self._connection.send_command("INFO")
        info = bytes(await self._connection.read_response()).decode()
        return "-".join(re.findall(r"\b(?:run_id|master_replid):(\w+)", info))

    async def _lose(self, error: Exception) -> None:
        """Close the connection, trust nothing, and report why."""
        await self.close()
        self._outage.report(error)

    def _key(self, name: UUID | str) -> str:
        """Return the key of an order, or of `since`, in this epoch."""
        return f"order:{self._epoch}:{name}"


def _ignore_error(sent: asyncio.Future[Reply]) -> None:
    """Take the error of a fill, which nobody waits for."""
    if not sent.cancelled():
        sent.exception()


OrderCache = MemoryCache | RedisCache
