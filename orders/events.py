"""Deliver outbox events at least once, and let effects happen exactly once.

An event is due while it is not processed and its `due_at` is reached. The
relay claims due events by pushing `due_at` into the future: a lease. Whatever
then goes wrong (a purged queue, a wiped broker, a relay killed) the lease runs
out and the event is due again. Its message may still wait, though: so what was
delivered before is delivered again only while the queues are empty, or copies
would feed an overload. Changes of status go to the cache, by the keeper.
"""

import asyncio
import logging
import threading
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

import sqlalchemy as sa
from opentelemetry import metrics

from orders.broker import DueEvent, Publisher
from orders.cache import OrderCache, RedisAway
from orders.db import Database, is_outage
from orders.logs import Outage, request_id
from orders.models import EVENTS, PROCESS_DELAY, EventKind, now

POLL_INTERVAL = 0.25  # seconds; of the relay and the keeper
BATCH = 500  # events that a relay claims at once
CHANGES_AT_ONCE = 5000  # that a keeper tells the cache
LEASE = timedelta(seconds=30)
SWEEP_INTERVAL = 5.0  # seconds between two looks for leases that ran out
# Finished events stay in the index while an old snapshot is open: only a sweep
# looks at what was due longer ago than clocks differ and transactions last.
LOOK_BACK = timedelta(minutes=1)
ALWAYS = datetime(1, 1, 1, tzinfo=UTC)
LOOK_TIMEOUT = 0.5  # seconds that the keeper waits for the database
ANSWER_AGE = 1.5  # seconds since the broker's last answer in which it is ok

logger = logging.getLogger(__name__)
lag = metrics.get_meter("orders").create_histogram("orders.outbox.lag", "s")

NOT_DONE = EVENTS.c.processed_at.is_(None)
CHANGES = sa.select(EVENTS.c.id, EVENTS.c.order_id).limit(CHANGES_AT_ONCE)
CHANGES = CHANGES.where(EVENTS.c.kind == EventKind.STATUS_CHANGED, NOT_DONE)
CHANGES = CHANGES.where(EVENTS.c.due_at >= sa.bindparam("since"))
DUE = (
    sa.select(EVENTS.c.id)
    .where(EVENTS.c.kind == EventKind.NEW_ORDER, NOT_DONE)
    .where(EVENTS.c.due_at.between(sa.bindparam("since"), sa.bindparam("til")))
    .where((EVENTS.c.attempts == 0) | sa.bindparam("again"))
    .order_by(EVENTS.c.due_at)
    .limit(BATCH)
    .with_for_update(skip_locked=True)
    .cte("due")  # so that it runs once, and LIMIT holds
)
CLAIM = (
    EVENTS.update()
    .where(EVENTS.c.id.in_(sa.select(DUE.c.id)))
    .values(attempts=EVENTS.c.attempts + 1, due_at=sa.bindparam("lease"))
    .returning(*(EVENTS.c[name] for name in DueEvent._fields))
)
# The condition makes the effect happen once, however often an event arrives.
PROCESS = (
    EVENTS.update()
    .where(EVENTS.c.id.in_(sa.bindparam("ids")))
    .where(EVENTS.c.kind == EventKind.NEW_ORDER, NOT_DONE)
    .values(processed_at=sa.bindparam("moment"))
    .returning(EVENTS.c.id, EVENTS.c.order_id)
)


def process_orders(engine: sa.Engine, requests: dict[UUID, str]) -> None:
    """Process new orders, by their events and the requests that made them."""
    done = {"ids": [*requests], "moment": now()}
    with engine.begin() as connection:
        processed = connection.execute(PROCESS, done).all()
    for event_id, order_id in processed:
        request_id.set(requests[event_id])
        logger.info("Order %s processed", order_id)
    request_id.set("-")


class Relay(threading.Thread):
    """Bring new orders to the broker; without one, process them itself."""

    def __init__(
        self, engine: sa.Engine, publisher: Publisher | None, outage: Outage
    ) -> None:
        """Take the outbox, and who says that the database is away."""
        # A daemon: a hung broker cannot hold the process.
        super().__init__(name="relay", daemon=True)
        self._engine, self._publisher = engine, publisher
        self._database_outage = outage
        what = "RabbitMQ" if publisher else "The embedded worker"
        self._outage = Outage(__name__, what)
        self._ended = threading.Event()
        self._answered_at = 0.0  # of time.monotonic
        self._sweep_at = 0.0  # of time.monotonic

    @property
    def answers(self) -> bool:
        """Return whether the broker answered, and took all, just now."""
        return time.monotonic() < self._answered_at + ANSWER_AGE

    def end(self, timeout: float) -> None:
        """Stop after the batch under way; wait for that, in seconds."""
        self._ended.set()
        self.join(timeout)

    def run(self) -> None:
        """Relay batch after batch, until it ends."""
        well = 1  # rounds; two are proof, as a full queue takes some at times
        while not self._ended.is_set():
            relayed, began = 0, time.monotonic()
            try:
                relayed = self._round()
                well += 1
            except Exception as error:  # a relay that dies loses every order
                if is_outage(error):
                    self._database_outage.report(error)
                else:
                    well = 0
                    fault = not isinstance(error, ConnectionError)
                    self._outage.report(error, fault=fault)
            self._answered_at = began if well > 1 else 0.0
            if well > 1:
                self._outage.end()
            if relayed < BATCH:
                self._ended.wait(POLL_INTERVAL)
        if self._publisher:
            self._publisher.close()
        self._engine.dispose()

    def _round(self) -> int:
        """Claim and deliver a batch; return its size."""
        until, idle = now(), True
        if self._publisher:
            until += PROCESS_DELAY  # the delay queue keeps what is not yet due
            idle = self._publisher.is_idle()
        sweeps = time.monotonic() >= self._sweep_at
        since = ALWAYS if sweeps else until - LOOK_BACK
        due = {"since": since, "til": until, "again": sweeps and idle}
        due["lease"] = now() + LEASE
        with self._engine.begin() as connection:
            rows = connection.execute(CLAIM, due).all()
        self._database_outage.end()
        events = sorted(DueEvent(*row) for row in rows)
        if sweeps and len(events) < BATCH:  # else there may be more of them
            self._sweep_at = time.monotonic() + SWEEP_INTERVAL
        if again := [event for event in events if event.attempts > 1]:
            logger.warning(
                "%d were not processed in time: of order %s, delivery %d",
                *(len(again), again[0].order_id, again[0].attempts),
            )
        if events:
            self._deliver(events)
        return len(events)

    def _deliver(self, events: list[DueEvent]) -> None:
        """Deliver the events; when that fails, they are due at once."""
        try:
            if self._publisher:
                self._publisher.deliver(events)
            else:
                made_by = {e.id: e.payload["request_id"] for e in events}
                process_orders(self._engine, made_by)
        except Exception:
            these = EVENTS.c.id.in_([event.id for event in events])
            release = EVENTS.update().where(these, NOT_DONE)
            less = EVENTS.c.attempts - 1  # as if never claimed
            with self._engine.begin() as connection:
                connection.execute(release.values(attempts=less, due_at=now()))
            raise
        for event in events:
            lag.record((now() - event.created_at).total_seconds())


class Keeper:
    """Bring changes of status to the cache, and extend the trust in it."""

    def __init__(self, database: Database, cache: OrderCache) -> None:
        """Take the outbox, and the cache."""
        self._database, self._cache = database, cache
        self._invalidated: list[UUID] = []  # events; marked by the next look
        self.look: asyncio.Task[dict[UUID, UUID] | None] | None = None
        self._look_began = 0.0  # of time.monotonic
        self._away = False  # the database, when a look ended last
        self._outage = Outage(__name__, "The keeper of the cache")
        self._sweep_at = 0.0  # of time.monotonic

    async def run(self) -> None:
        """Make round after round, until cancelled."""
        while True:
            try:
                await self._round()
                self._outage.end()
            except RedisAway:
                pass  # said by the cache
            except Exception as error:
                self._outage.report(error, fault=True)
            await asyncio.sleep(POLL_INTERVAL)

    async def _round(self) -> None:
        """Tell the cache what changed."""
        began = time.monotonic()
        if self.look is None:
            self._look_began = began
            self.look = asyncio.create_task(self._read_changes())
        # Not wait_for: to cancel a query of a hung database takes its time.
        await asyncio.wait({self.look}, timeout=LOOK_TIMEOUT)
        changes = None
        if self.look.done():
            look, self.look = self.look, None
            changes = look.result()
            self._away = changes is None
        # Nobody's change is acknowledged while the database is away, so that
        # the trust goes on. A late look proves what was when it began.
        if not self._away:
            began = self._look_began
        found = changes or {}
        complete = changes is not None and len(found) < CHANGES_AT_ONCE
        if len(found) == CHANGES_AT_ONCE:
            began = 0.0  # no trust before the last of them
        await self._cache.prove(found.values(), began=began, complete=complete)
        self._invalidated += found

    async def _read_changes(self) -> dict[UUID, UUID] | None:
        """Mark what the cache has; return events, orders that it may lack."""
        since = now() - LOOK_BACK
        if not self._cache.trusted or time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_INTERVAL
            since = ALWAYS
        mark = EVENTS.update().where(EVENTS.c.id.in_(self._invalidated))
        try:
            async with self._database.aside.begin() as connection:
                if self._invalidated:
                    await connection.execute(mark.values(processed_at=now()))
                found = await connection.execute(CHANGES, {"since": since})
        except Exception as error:
            if not is_outage(error):
                raise
            self._database.outage.report(error)
            return None
        self._invalidated.clear()
        return dict(found.all())
