"""Deliver outbox events at least once, and let effects happen exactly once.

An event is due while it is not processed and its `due_at` has passed. A relay
claims due events by pushing `due_at` into the future: a lease. Whatever then
goes wrong (a purged queue, a wiped broker, a relay killed before the confirm)
the lease runs out and the event is due again, so one predicate is retry,
crash recovery and sweeper. Each kind of event has a sink that delivers it.
"""

import asyncio
import json
import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from pika import BasicProperties, DeliveryMode, URLParameters
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.channel import Channel
from pika.exceptions import AMQPError
from pika.frame import Method
from pika.spec import Basic
from sqlalchemy import case
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlmodel import col, select, update

from orders.cache import CacheAway, OrderCache
from orders.db import Database
from orders.models import Event, EventKind, now

TASK = "orders.process_order"
QUEUE = "orders"
DEAD_LETTERS = "orders.dead"
# Publisher and worker declare the queue with these same arguments, or the
# second to come is refused with a 406.
QUEUE_ARGUMENTS = {
    "x-queue-type": "quorum",
    "x-dead-letter-exchange": "",
    "x-dead-letter-routing-key": DEAD_LETTERS,
    "x-delivery-limit": 1000,  # RabbitMQ 4 gives a message up after 20
}
PROCESS_DELAY = timedelta(seconds=2)
POLL_INTERVAL = 0.25  # seconds
BATCH = 500  # events
LEASES = (30, 60, 120, 300)  # seconds, by attempts so far; then the last
RETRY = timedelta(seconds=0.5)  # from a failed delivery to the next
CONFIRM_TIMEOUT = 10  # seconds
HEARTBEAT = 10  # seconds
MAX_BACKOFF = 2.0  # seconds between two tries to connect
PING_TIMEOUT = 1  # seconds
CLOSE_TIMEOUT = 1  # seconds

logger = logging.getLogger(__name__)


class DeliveryFailed(Exception):
    """A sink did not take the whole batch; all of it is due again soon."""


class DueEvent(NamedTuple):
    """A claimed event."""

    id: UUID
    order_id: UUID
    payload: dict[str, Any]
    created_at: datetime


class Sink(Protocol):
    """Where events of one kind go."""

    kind: EventKind
    delay: timedelta  # from an event to its delivery

    async def ready(self) -> None:
        """Wait until a delivery is worth trying."""

    async def deliver(self, events: Sequence[DueEvent]) -> None:
        """Deliver the events; raise DeliveryFailed if it may not be all."""


class Publisher(Sink, Protocol):
    """The sink of new orders; `orders.api` runs and asks it."""

    async def run(self) -> None:
        """Keep what the publisher needs open, until cancelled."""

    async def ping(self) -> bool:
        """Return whether the broker answers now."""


class Relay:
    """Bring the due events of one kind to their sink."""

    def __init__(self, database: Database, sink: Sink) -> None:
        """Prepare; `run` does the work."""
        self._database = database
        self._sink = sink
        self._wake = asyncio.Event()
        self._failing = False

    def wake(self) -> None:
        """Look for due events now rather than at the next poll."""
        self._wake.set()

    async def run(self) -> None:
        """Relay batch after batch, until cancelled."""
        while True:
            await self._sink.ready()
            self._wake.clear()
            if await self._relay_batch() < BATCH:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), POLL_INTERVAL)

    async def _relay_batch(self) -> int:
        """Claim and deliver a batch; return its size, 0 when that failed."""
        try:
            events = await self._claim()
            if events:
                await self._deliver(events)
        except (DBAPIError, PoolTimeoutError, DeliveryFailed) as error:
            if not self._failing:
                logger.warning(
                    "Relay of %s events halts, it will try again: %s",
                    self._sink.kind,
                    str(error).splitlines()[0],
                )
            self._failing = True
            return 0
        if self._failing:
            self._failing = False
            logger.info("Relay of %s events goes on", self._sink.kind)
        return len(events)

    async def _deliver(self, events: list[DueEvent]) -> None:
        try:
            await self._sink.deliver(events)
        except DeliveryFailed:
            await self._release(events)
            raise

    async def _claim(self) -> list[DueEvent]:
        """Lease a batch of due events to this relay."""
        moment = now()
        due = (
            select(Event.id)
            .where(
                Event.kind == self._sink.kind,
                col(Event.processed_at).is_(None),
                Event.due_at <= moment - self._sink.delay,
            )
            .order_by(col(Event.due_at))
            .limit(BATCH)
            .with_for_update(skip_locked=True)
            .cte("due")  # so that it runs once, and LIMIT holds
        )
        leases = [moment + timedelta(seconds=lease) for lease in LEASES]
        lease_ends = case(
            dict(enumerate(leases[:-1])),
            value=col(Event.attempts),
            else_=leases[-1],
        )
        claim = (
            update(Event)
            .where(col(Event.id).in_(select(due.c.id)))
            .values(attempts=Event.attempts + 1, due_at=lease_ends)
            .returning(*(getattr(Event, name) for name in DueEvent._fields))
        )
        async with self._database.engine.begin() as connection:
            rows = (await connection.execute(claim)).all()
        return sorted(
            (DueEvent(*row) for row in rows), key=lambda e: e.created_at
        )

    async def _release(self, events: list[DueEvent]) -> None:
        """End the leases early: these events were surely not all taken."""
        release = (
            update(Event)
            .where(
                col(Event.id).in_([event.id for event in events]),
                col(Event.processed_at).is_(None),
            )
            .values(due_at=now() + RETRY)
        )
        async with self._database.engine.begin() as connection:
            await connection.execute(release)


class CacheSink:
    """Replay the invalidation of changed orders until the cache has it."""

    kind = EventKind.STATUS_CHANGED
    delay = timedelta(0)

    def __init__(self, database: Database, cache: OrderCache) -> None:
        """Take the cache to invalidate."""
        self._database = database
        self._cache = cache

    async def ready(self) -> None:
        """Wait until the cache answers."""
        while True:
            try:
                return await self._cache.ping()
            except CacheAway:
                await asyncio.sleep(RETRY.total_seconds())

    async def deliver(self, events: Sequence[DueEvent]) -> None:
        """Write the tombstones, then mark the events processed."""
        if not await self._cache.invalidate(*(e.order_id for e in events)):
            raise DeliveryFailed("the cache is away")
        processed = (
            update(Event)
            .where(col(Event.id).in_([event.id for event in events]))
            .values(processed_at=now())
        )
        async with self._database.engine.begin() as connection:
            await connection.execute(processed)


class LocalPublisher:
    """The embedded broker: orders are processed in this process."""

    kind = EventKind.NEW_ORDER
    delay = PROCESS_DELAY

    def __init__(self, process: Callable[[DueEvent], Awaitable[None]]) -> None:
        """Take what a worker would do with an event."""
        self._process = process

    async def run(self) -> None:
        """Need nothing."""

    async def ping(self) -> bool:
        """Answer always."""
        return True

    async def ready(self) -> None:
        """Be ready always."""

    async def deliver(self, events: Sequence[DueEvent]) -> None:
        """Process the events one by one."""
        for event in events:
            await self._process(event)


class RabbitPublisher:
    """Publish to RabbitMQ, mandatory and confirmed, on the event loop."""

    kind = EventKind.NEW_ORDER
    delay = timedelta(0)  # the worker waits: each message carries its `eta`

    def __init__(self, url: str) -> None:
        """Prepare; `run` connects."""
        self._parameters = URLParameters(url)
        self._parameters.heartbeat = HEARTBEAT
        self._parameters.blocked_connection_timeout = 10 * HEARTBEAT
        self._parameters.socket_timeout = CONFIRM_TIMEOUT
        self._parameters.stack_timeout = CONFIRM_TIMEOUT
        self._usable = asyncio.Event()
        self._closed: asyncio.Future[object] = asyncio.Future()
        self._channel: Channel | None = None
        self._published = 0  # delivery tag of the channel's last message
        self._unconfirmed: set[int] = set()  # delivery tags of the batch
        self._batch: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Connect, and again whenever the connection is lost."""
        tries = 0
        while True:
            try:
                reason = await self._use_connection()
                tries = 0  # it was up for a while
            except (AMQPError, TimeoutError, OSError) as error:
                reason = error
            if tries == 0:
                logger.warning("RabbitMQ is away: %r", reason)
            tries += 1
            backoff = min(MAX_BACKOFF, 0.1 * 2**tries)
            await asyncio.sleep(backoff * random.uniform(0.5, 1))

    async def _use_connection(self) -> object:
        """Connect, be usable until the connection is lost; return why."""
        self._closed = asyncio.Future()
        gone = asyncio.Event()

        def on_gone(_: object, reason: object) -> None:
            self._lose(reason)
            gone.set()

        connection = AsyncioConnection(
            self._parameters,
            on_open_error_callback=on_gone,
            on_close_callback=on_gone,
        )
        try:
            await self._set_up(connection)
            logger.info("RabbitMQ is connected")
            return await self._closed
        finally:
            self._lose("stopped")
            await _close(connection, gone)

    async def ready(self) -> None:
        """Wait until there is a channel and the broker takes messages."""
        await self._usable.wait()

    async def ping(self) -> bool:
        """Return whether the broker answers a question about the queue."""
        if self._channel is None or not self._usable.is_set():
            return False
        ask = partial(self._channel.queue_declare, QUEUE, passive=True)
        try:
            async with asyncio.timeout(PING_TIMEOUT):
                await self._reply(ask)
        except (AMQPError, TimeoutError):
            return False
        return True

    async def deliver(self, events: Sequence[DueEvent]) -> None:
        """Publish the events and await the confirm of each."""
        self._batch = asyncio.Future()
        try:
            for event in events:
                self._publish(event)
            async with asyncio.timeout(CONFIRM_TIMEOUT):
                await self._batch
        except TimeoutError:
            self._lose("no confirm in time")
            raise DeliveryFailed("RabbitMQ did not confirm in time") from None
        except AMQPError as error:
            raise DeliveryFailed(f"RabbitMQ: {error!r}") from error
        finally:
            self._unconfirmed.clear()
        logger.debug("Published %d events", len(events))

    def _publish(self, event: DueEvent) -> None:
        if self._channel is None:
            raise DeliveryFailed("RabbitMQ was lost")
        properties, body = celery_message(event)
        self._published += 1
        self._unconfirmed.add(self._published)
        self._channel.basic_publish(
            "", QUEUE, body, properties, mandatory=True
        )

    async def _set_up(self, connection: AsyncioConnection) -> None:
        """Open a confirming channel and declare the queues."""
        await self._reply(
            lambda callback: connection.add_on_open_callback(callback)
        )
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(
            lambda *_: self._usable.set()
        )
        channel = await self._reply(
            lambda callback: connection.channel(on_open_callback=callback)
        )
        channel.add_on_close_callback(lambda _, reason: self._lose(reason))
        channel.add_on_return_callback(self._on_return)
        declare = partial(channel.queue_declare, durable=True)
        await self._reply(
            partial(
                declare, DEAD_LETTERS, arguments={"x-queue-type": "quorum"}
            )
        )
        await self._reply(partial(declare, QUEUE, arguments=QUEUE_ARGUMENTS))
        await self._reply(partial(channel.confirm_delivery, self._on_confirm))
        self._channel, self._published = channel, 0
        self._usable.set()

    async def _reply(self, call: Callable[..., object]) -> Any:
        """Make a call of pika's and return what its callback is given."""
        reply: asyncio.Future[object] = asyncio.Future()
        call(callback=lambda frame: reply.done() or reply.set_result(frame))
        await asyncio.wait(
            {reply, self._closed},
            timeout=CONFIRM_TIMEOUT,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not reply.done():
            raise TimeoutError(
                repr(self._closed.result())
                if self._closed.done()
                else "no answer"
            )
        return reply.result()

    def _lose(self, reason: object) -> None:
        """Give the connection up, and the batch that waits on it."""
        self._usable.clear()
        self._channel = None
        if not self._closed.done():
            self._closed.set_result(reason)
        self._fail_batch(f"RabbitMQ was lost: {reason!r}")

    def _fail_batch(self, reason: str) -> None:
        if self._batch is not None and not self._batch.done():
            self._batch.set_exception(DeliveryFailed(reason))

    def _on_blocked(self, *_: object) -> None:
        self._usable.clear()
        self._fail_batch("RabbitMQ takes no messages: an alarm is set")

    def _on_return(self, *_: object) -> None:
        # The queue is gone: a new connection declares it again.
        self._lose("the message was returned, its queue is gone")

    def _on_confirm(self, frame: Method) -> None:
        method = frame.method
        if isinstance(method, Basic.Nack):
            return self._fail_batch("RabbitMQ refused a message")
        if method.multiple:
            confirmed = {
                tag for tag in self._unconfirmed if tag <= method.delivery_tag
            }
            self._unconfirmed -= confirmed
        else:
            self._unconfirmed.discard(method.delivery_tag)
        if not self._unconfirmed and self._batch and not self._batch.done():
            self._batch.set_result(None)
        return None


async def _close(connection: AsyncioConnection, gone: asyncio.Event) -> None:
    """Close a connection; a hung one is left to its heartbeat."""
    if not (connection.is_closing or connection.is_closed):
        connection.close()
    with suppress(TimeoutError):
        await asyncio.wait_for(gone.wait(), CLOSE_TIMEOUT)


def celery_message(event: DueEvent) -> tuple[BasicProperties, bytes]:
    """Return an event as a stock Celery worker reads it.

    Source: Celery's message protocol, version 2.
    """
    kwargs = {
        "event_id": str(event.id),
        "order_id": str(event.order_id),
        "request_id": event.payload.get("request_id", "-"),
    }
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    properties = BasicProperties(
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=DeliveryMode.Persistent,
        message_id=str(event.id),
        correlation_id=str(event.id),
        headers={
            "lang": "py",
            "task": TASK,
            "id": str(event.id),
            "eta": (event.created_at + PROCESS_DELAY).isoformat(),
        },
    )
    return properties, json.dumps([[], kwargs, embed]).encode()


def connect_publisher(
    url: str | None, process: Callable[[DueEvent], Awaitable[None]]
) -> Publisher:
    """Return the sink of new orders: RabbitMQ, or this process."""
    return RabbitPublisher(url) if url else LocalPublisher(process)
