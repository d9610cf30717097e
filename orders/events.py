"""Deliver outbox events at least once, and let effects happen exactly once.

An event is due while it is not processed and its `due_at` is reached. The
relay claims due events by pushing `due_at` into the future: a lease. Whatever
then goes wrong (a purged queue, a wiped broker, a relay killed before the
commit) the lease runs out and the event is due again. That is no proof that
its message is lost: it may wait. So what was delivered before is delivered
again only while the queues are empty, or copies would feed an overload.

New orders go to the worker, by a thread; changes of status to the cache, by
the keeper.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from opentelemetry import metrics

from orders.cache import OrderCache, RedisAway
from orders.db import Database, is_outage
from orders.logs import Outage
from orders.models import EVENTS, EventKind, now

PROCESS_DELAY = timedelta(seconds=2)  # from an order to its processing
POLL_INTERVAL = 0.25  # seconds; of the relay and the keeper
BATCH = 500  # events
MANY = 2**31 - 1  # attempts; the largest integer of PostgreSQL
LEASE = 30  # seconds
SWEEP_INTERVAL = 5.0  # seconds between two looks for leases that ran out
# Finished events stay in the index while an old snapshot is open: a look
# begins at what was due a while ago, which is longer than clocks differ and
# transactions last. Only a sweep looks at all.
LOOK_BACK = timedelta(minutes=1)
ALWAYS = datetime(1, 1, 1, tzinfo=UTC)
LOOK_TIMEOUT = 0.5  # seconds that the keeper waits for the database
ANSWER_AGE = 1.5  # seconds since the broker's last answer in which it is ok

logger = logging.getLogger(__name__)
lag = metrics.get_meter("orders").create_histogram("orders.outbox.lag", "s")


class DueEvent(NamedTuple):
    """A claimed event; the columns that the claim returns."""

    created_at: datetime  # first: it sorts them
    id: UUID
    order_id: UUID
    payload: dict[str, Any]
    attempts: int  # this one included


class Destination:
    """Where new orders go; this much of it holds when nothing is between."""

    name: str  # for the log
    lead = timedelta(0)  # how long before they are due

    def is_idle(self) -> bool:
        """Return whether nothing waits there; ConnectionError: it is away."""
        return True

    def deliver(self, events: Sequence[DueEvent]) -> None:
        """Deliver the events; raise if it may be that not all arrived."""
        raise NotImplementedError

    def close(self) -> None:
        """Close what is open."""


NOT_DONE = EVENTS.c.processed_at.is_(None)
CHANGES = sa.select(EVENTS.c.id, EVENTS.c.order_id).limit(BATCH)
CHANGES = CHANGES.where(EVENTS.c.kind == EventKind.STATUS_CHANGED, NOT_DONE)
CHANGES = CHANGES.where(EVENTS.c.due_at >= sa.bindparam("since"))
DUE = (
    sa.select(EVENTS.c.id)
    .where(EVENTS.c.kind == EventKind.NEW_ORDER, NOT_DONE)
    .where(EVENTS.c.due_at.between(sa.bindparam("since"), sa.bindparam("til")))
    .where(EVENTS.c.attempts <= sa.bindparam("attempts"))
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


class Relay(threading.Thread):
    """Bring new orders to their destination, in a thread of its own.

    It is a daemon: a hung broker cannot hold the process.
    """

    def __init__(
        self, engine: sa.Engine, destination: Destination, outage: Outage
    ) -> None:
        """Take the outbox, and who says that the database is away."""
        super().__init__(name="relay", daemon=True)
        self._engine, self._destination = engine, destination
        self._database_outage = outage
        self._outage = Outage(logger, destination.name)
        self._ended = threading.Event()
        self._answered_at = 0.0  # of time.monotonic
        self._since = ALWAYS  # all that was due before is claimed
        self._sweep_at = 0.0  # of time.monotonic

    @property
    def answers(self) -> bool:
        """Return whether the destination answered, and took all, just now."""
        return time.monotonic() < self._answered_at + ANSWER_AGE

    def end(self, timeout: float) -> None:
        """Stop after the batch under way; wait for that, in seconds."""
        self._ended.set()
        self.join(timeout)

    def run(self) -> None:
        """Relay batch after batch, until it ends."""
        failed = False
        while not self._ended.is_set():
            relayed, failed_before, began = 0, failed, time.monotonic()
            try:
                relayed, failed = self._round(), False
            except Exception as error:  # a relay that dies loses every order
                failed = not is_outage(error)
                if failed:
                    fault = not isinstance(error, ConnectionError)
                    self._outage.report(error, fault=fault)
                else:
                    self._database_outage.report(error)
            # Twice, as a full queue takes some now and then.
            well = not failed and not failed_before
            self._answered_at = began if well else 0.0
            if well:
                self._outage.end()
            if relayed < BATCH:
                self._ended.wait(POLL_INTERVAL)
        self._destination.close()
        self._engine.dispose()

    def _round(self) -> int:
        """Claim and deliver a batch; return its size."""
        idle = self._destination.is_idle()
        moment, attempts = now(), 0
        if time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_INTERVAL
            self._since = ALWAYS
            attempts = MANY if idle else 0
        until = moment + self._destination.lead
        due = {"since": self._since, "til": until, "attempts": attempts}
        due["lease"] = moment + timedelta(seconds=LEASE)
        with self._engine.begin() as connection:
            rows = connection.execute(CLAIM, due).all()
        self._database_outage.end()
        events = sorted(DueEvent(*row) for row in rows)
        if len(events) < BATCH:  # else there may be more, that is as old
            self._since = until - LOOK_BACK
        if again := [event for event in events if event.attempts > 1]:
            logger.warning(
                "%d events were not processed in time, and are delivered"
                " again; one is of order %s, delivery %d",
                *(len(again), again[0].order_id, again[0].attempts),
            )
        if events:
            self._deliver(events)
        return len(events)

    def _deliver(self, events: list[DueEvent]) -> None:
        """Deliver the events; when that fails, they are due at once."""
        try:
            self._destination.deliver(events)
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
    """Bring changes of status to the cache, and extend the trust in it.

    A database that is away does not end the trust: nobody's change is
    acknowledged meanwhile, and cached reads go on.
    """

    def __init__(self, database: Database, cache: OrderCache) -> None:
        """Take the outbox, and the cache."""
        self._database, self._cache = database, cache
        self._invalidated: list[UUID] = []  # events; marked by the next look
        self._look: asyncio.Task[Sequence[Any] | None] | None = None
        self._look_began = 0.0  # of time.monotonic
        self._away = False  # the database, when a look ended last
        self._outage = Outage(logger, "The keeper of the cache")
        self._sweep_at = 0.0  # of time.monotonic

    async def run(self) -> None:
        """Make round after round, until cancelled."""
        while True:
            more = False
            try:
                more = await self._round()
                self._outage.end()
            except RedisAway:
                pass  # said by the cache
            except Exception as error:
                self._outage.report(error, fault=True)
            if not more:
                await asyncio.sleep(POLL_INTERVAL)

    async def _round(self) -> bool:
        """Tell the cache what changed; return whether there is more."""
        began = time.monotonic()
        if self._look is None:
            self._look_began = began
            self._look = asyncio.create_task(self._read_changes())
        # Not wait_for: to cancel a query of a hung database takes its time.
        await asyncio.wait({self._look}, timeout=LOOK_TIMEOUT)
        changes = None
        if self._look.done():
            look, self._look = self._look, None
            changes = look.result()
            self._away = changes is None
        if not self._away:  # a late look proves what was when it began
            began = self._look_began
        found = changes or ()
        if more := len(found) == BATCH:
            began = 0.0  # no trust before the last of them
        complete = changes is not None and not more
        orders = [change.order_id for change in found]
        await self._cache.prove(orders, began=began, complete=complete)
        self._invalidated += [change.id for change in found]
        return more

    async def _read_changes(self) -> Sequence[Any] | None:
        """Mark what the cache has, and read what it may not have."""
        since = now() - LOOK_BACK
        if not self._cache.trusted or time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_INTERVAL
            since = ALWAYS
        done = self._invalidated.copy()
        mark = EVENTS.update().where(EVENTS.c.id.in_(done))
        try:
            async with self._database.aside.begin() as connection:
                if done:
                    await connection.execute(mark.values(processed_at=now()))
                found = await connection.execute(CHANGES, {"since": since})
        except Exception as error:
            if not is_outage(error):
                raise
            self._database.outage.report(error)
            return None
        del self._invalidated[: len(done)]
        return found.all()
