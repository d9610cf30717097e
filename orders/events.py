"""Deliver outbox events at least once, and let effects happen exactly once.

An event is due while it is not processed and its `due_at` has passed. A relay
claims due events by pushing `due_at` into the future: a lease. Whatever then
goes wrong (a purged queue, a wiped broker, a relay killed before the confirm)
the lease runs out and the event is due again, so one predicate is retry,
crash recovery and sweeper. Each kind of event has a sink that delivers it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from sqlalchemy import case
from sqlmodel import col, select, update

from orders.cache import CacheAway, OrderCache
from orders.db import OUTAGES, Database
from orders.models import Event, EventKind, now

PROCESS_DELAY = timedelta(seconds=2)
POLL_INTERVAL = 0.25  # seconds
BATCH = 500  # events
LEASES = (30, 60, 120, 300)  # seconds, by attempts so far; then the last
RETRY = timedelta(seconds=0.5)  # from a failed delivery to the next
ASK_INTERVAL = 0.1  # seconds; till the replay, what is cached may be old

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
        except Exception as error:  # a relay that dies loses every order
            self._report(error)
            return 0
        if self._failing:
            self._failing = False
            logger.info("Relay of %s events goes on", self._sink.kind)
        return len(events)

    def _report(self, error: Exception) -> None:
        """Log the first of a row of failures; a fault with its traceback."""
        if isinstance(error, OUTAGES):  # as the calls' failures are
            self._database.outage.report(error)
        elif not self._failing:
            logger.warning(
                "Relay of %s events halts, it will try again: %s",
                self._sink.kind,
                str(error).split("\n")[0],
                exc_info=None if isinstance(error, DeliveryFailed) else error,
            )
        self._failing = True

    async def _deliver(self, events: list[DueEvent]) -> None:
        try:
            await self._sink.deliver(events)
        except BaseException:  # being stopped, too
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
                await asyncio.sleep(ASK_INTERVAL)

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
