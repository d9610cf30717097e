"""Move events on: the outbox's relay, and the keeper of the cache.

An event is *due* while it is not processed and its `due_at` is reached. The
relay claims an event, due now or soon, by moving its `due_at` to the end of a
*lease*, and delivers it. If the message is lost (a purged queue, a relay that
was killed), the lease runs out, and the event is due again. So each event is
delivered at least once, and `handlers` lets it take effect once.

A lease that ran out does not prove that a message is lost: the message may
wait behind many others. An event that was delivered before is delivered again
only while no message is ready for a worker, or copies would feed an overload.

Changes of status have no handler: the keeper brings them to the cache.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from opentelemetry import metrics
from sqlmodel import col
from sqlmodel.sql.sqltypes import UTCDateTime

from orders.broker import Message, Publisher
from orders.cache import NEVER, OrderCache, RedisAway
from orders.db import Database
from orders.handlers import HANDLERS, Backlog, measure_backlog, run_handler
from orders.logs import Outage
from orders.models import UNPROCESSED, Event, EventKind, now
from orders.problems import database_answers, is_outage, is_unreachable

POLL_INTERVAL = 0.25  # seconds between two rounds of the relay, or the keeper
CLAIM_SIZE = 500  # events of one kind that the relay claims at once
# A message is published at most this long before its event is due. Until then
# it is in the delay queue, where it holds up those behind it.
AHEAD = timedelta(seconds=2)
FIRST_LEASE = timedelta(seconds=30)  # doubles with each delivery
LAST_LEASE = timedelta(hours=1)
LEASES = [*(FIRST_LEASE * 2**doubled for doubled in range(7)), LAST_LEASE]
SWEEP_INTERVAL = 5.0  # seconds between two looks for leases that ran out
# A round looks no further back: while a long transaction is open, PostgreSQL
# keeps finished events in the index. A sweep finds what is overdue for longer.
LOOK_BACK = timedelta(minutes=1)
ALWAYS = datetime(1, 1, 1, tzinfo=UTC)
MAX_CHANGES = 5000  # changes that the keeper reads in one look
LOOK_TIMEOUT = 0.5  # seconds that the keeper waits for the database
ANSWER_AGE = 1.5  # seconds for which an answer of the broker means "ok"
MAX_ROUND = 60.0  # seconds in which the embedded relay has to make a round

BrokerState = Literal["ok", "unavailable", "embedded"]  # in /ready
logger = logging.getLogger(__name__)
lag = metrics.get_meter("orders").create_histogram("orders.outbox.lag", "s")


class ClaimedEvent(NamedTuple):
    """The columns that a claim returns; `created_at` first, to sort by it."""

    created_at: datetime
    id: UUID
    order_id: UUID
    kind: str
    attempts: int  # claims, with this one
    traceparent: str | None  # the trace of the call

    def __str__(self) -> str:
        """Return what a line of the log says of the event."""
        return f"{self.kind} {self.id} of order {self.order_id}"


CLAIMED = [getattr(Event, name) for name in ClaimedEvent.__annotations__]


def lease_end(moment: datetime) -> sa.ColumnElement[datetime]:
    """Return when the lease of a claim at `moment` ends.

    A lease begins after AHEAD, when the message has left the delay queue, and
    doubles with each delivery, so that failures become rare.
    """
    *ends, last_end = (
        sa.literal(moment + AHEAD + lease, UTCDateTime()) for lease in LEASES
    )
    end_by_attempts = dict(enumerate(ends))
    return sa.case(end_by_attempts, value=col(Event.attempts), else_=last_end)


def claim(
    kind: str, *, since: datetime, until: datetime, again: bool
) -> sa.UpdateBase:
    """Return the statement that claims events of a kind due in a time.

    `again`: claim those, too, that were claimed before: their lease ran out.
    """
    due = (
        sa.select(col(Event.id))
        .where(col(Event.kind) == kind, UNPROCESSED)
        .where(col(Event.due_at).between(since, until))
        .where((col(Event.attempts) == 0) | sa.literal(again))
        .order_by(col(Event.due_at))
        .limit(CLAIM_SIZE)
        .with_for_update(skip_locked=True)
        .cte("due")  # otherwise PostgreSQL may run it again for each row
    )
    return (
        sa.update(Event)
        .where(col(Event.id).in_(sa.select(due.c.id)))
        .values(attempts=col(Event.attempts) + 1, due_at=lease_end(now()))
        .returning(*CLAIMED)
    )


class Relay(threading.Thread):
    """Brings events to the broker; without one, it runs their handlers."""

    def __init__(
        self,
        engine: sa.Engine,
        publisher: Publisher | None,
        database_outage: Outage,
    ) -> None:
        """Take the outbox's engine, and the way to the broker if any."""
        # A daemon thread: a hung broker cannot keep the process alive.
        super().__init__(name="relay", daemon=True)
        self._engine, self._publisher = engine, publisher
        self._database_outage = database_outage
        self._outage = Outage(
            __name__, "RabbitMQ" if publisher else "The embedded worker"
        )
        self._ended = threading.Event()
        self._answered_at = NEVER  # of time.monotonic
        self._sweep_at = self._measure_at = NEVER  # of time.monotonic
        self.backlog = Backlog(0, None)

    @property
    def is_healthy(self) -> bool:
        """Return whether the relay has made a good round lately."""
        max_age = ANSWER_AGE if self._publisher else MAX_ROUND
        return time.monotonic() < self._answered_at + max_age

    @property
    def state(self) -> BrokerState:
        """Return what /ready says of the broker."""
        if self._publisher is None:
            return "embedded"
        return "ok" if self.is_healthy else "unavailable"

    def end(self, timeout: float) -> None:
        """Stop after this round; wait for that, `timeout` in seconds."""
        self._ended.set()
        self.join(timeout)

    def run(self) -> None:
        """Make round after round, until the relay is ended."""
        # After a failure, two good rounds are needed, as a full queue takes a
        # message now and then. At the start a single good round is enough.
        healthy_rounds = 1
        while not self._ended.is_set():
            began_at, is_full = time.monotonic(), False
            try:
                is_full = self._make_round()
                healthy_rounds += 1
            except Exception as error:  # without the relay nothing goes on
                if is_outage(error):  # the last word on the broker stays
                    self._database_outage.report(error)
                else:
                    healthy_rounds = 0
                    is_fault = not isinstance(error, ConnectionError)
                    self._outage.report(error, fault=is_fault)
            is_steady = healthy_rounds > 1
            self._answered_at = began_at if is_steady else NEVER
            if is_steady:
                self._outage.end()
            if not is_full:
                self._ended.wait(POLL_INTERVAL)
        if self._publisher:
            self._publisher.close()
        self._engine.dispose()

    def _make_round(self) -> bool:
        """Claim events and deliver them; return whether there may be more."""
        queue_is_empty = True
        try:  # first, because without the database, too, heartbeats are due
            if self._publisher:
                queue_is_empty = self._publisher.count_ready() == 0
        finally:  # without the broker, too
            if time.monotonic() >= self._measure_at:
                self.backlog = measure_backlog(self._engine)
                self._measure_at = time.monotonic() + SWEEP_INTERVAL
        until = now() + AHEAD if self._publisher else now()
        is_full, is_sweep = False, time.monotonic() >= self._sweep_at
        since = ALWAYS if is_sweep else until - LOOK_BACK
        again = is_sweep and queue_is_empty
        for kind in HANDLERS:
            statement = claim(kind, since=since, until=until, again=again)
            with self._engine.begin() as connection:
                rows = connection.execute(statement).all()
            self._database_outage.end()
            events = sorted(ClaimedEvent(*row) for row in rows)
            self._warn_of_late(events)
            self._deliver(events)
            is_full |= len(events) == CLAIM_SIZE
        if is_sweep and not is_full:
            self._sweep_at = time.monotonic() + SWEEP_INTERVAL
        return is_full

    def _warn_of_late(self, events: Sequence[ClaimedEvent]) -> None:
        """Say how many events are delivered again, and name one of them."""
        late = [event for event in events if event.attempts > 1]
        if late:
            logger.warning(
                "%d events were not processed in time, and are delivered"
                " again, such as %s (delivery %d)",
                *(len(late), late[0], late[0].attempts),
            )

    def _deliver(self, events: Sequence[ClaimedEvent]) -> None:
        """Deliver claimed events; if that fails, they are due at once."""
        try:
            if self._publisher is None:
                self._run_handlers(events)
            elif events:
                self._publisher.deliver([_message(e) for e in events])
        except Exception:
            release = (
                sa.update(Event)
                .where(col(Event.id).in_([event.id for event in events]))
                .where(UNPROCESSED)
                # A delivery that failed does not lengthen the lease.
                .values(attempts=col(Event.attempts) - 1, due_at=now())
            )
            with self._engine.begin() as connection:
                connection.execute(release)
            raise
        for event in events:
            lag.record((now() - event.created_at).total_seconds())

    def _run_handlers(self, events: Sequence[ClaimedEvent]) -> None:
        """Run the handlers of events; a failure holds up no other event."""
        for event in events:
            try:
                run_handler(self._engine, event.kind, event.id)
            except Exception as error:
                if is_outage(error) and not database_answers(self._engine):
                    raise
                # The lease of the event is the pause until the next try.
                logger.exception(
                    "%s failed, delivery %d", event, event.attempts
                )


def _message(event: ClaimedEvent) -> Message:
    """Return the message of an event, with the rest of the delay."""
    handler = HANDLERS[event.kind]
    # The claim has put the end of the lease into `due_at`.
    left = event.created_at + handler.delay - now()
    # At most AHEAD: a new release may have given the handler a longer delay.
    return Message(event.id, handler.task, min(left, AHEAD), event.traceparent)


class Keeper:
    """Tells the cache what changed, and renews the trust in it."""

    def __init__(self, database: Database, cache: OrderCache) -> None:
        """Take the database, where events tell of changes, and the cache."""
        self._database, self._cache = database, cache
        self._told: list[UUID] = []  # events; the next look marks them
        # The look into the database that is under way. None: no look is.
        self.look: asyncio.Task[dict[UUID, UUID] | None] | None = None
        self._looked_at = NEVER  # of time.monotonic; the look's begin
        self._database_is_away = False  # as the last look found
        self._outage = Outage(__name__, "The keeper of the cache")
        self._sweep_at = NEVER  # of time.monotonic

    async def run(self) -> None:
        """Make round after round, until cancelled."""
        while True:
            try:
                await self._make_round()
                self._outage.end()
            except RedisAway:
                pass  # the cache has reported it
            except Exception as error:  # an end of this task ends the trust
                self._outage.report(error, fault=True)
            await asyncio.sleep(POLL_INTERVAL)

    async def _make_round(self) -> None:
        """Tell the cache what changed, and renew the trust in it."""
        round_began_at = time.monotonic()
        if self.look is None:
            self._looked_at = round_began_at
            self.look = asyncio.create_task(self._read_changes())
        # A database that is away need not be waited for. (asyncio.wait_for
        # would block until a hung database cancels its query.)
        timeout = 0.0 if self._database_is_away else LOOK_TIMEOUT
        await asyncio.wait({self.look}, timeout=timeout)
        changes = None
        if self.look.done():
            look, self.look = self.look, None
            changes = look.result()
        if changes is None and not self._database_is_away:
            return  # the look is late or failed, and says nothing
        await self._cache.write_tombstones((changes or {}).values())
        if changes is None:
            # While the database is away nobody can commit a change, so that a
            # cache that was right stays right.
            if self._cache.was_trusted:
                self._cache.trust_from(round_began_at)
            return
        is_all = len(changes) < MAX_CHANGES
        self._cache.trust_from(self._looked_at if is_all else NEVER)
        self._told.extend(changes)

    async def _read_changes(self) -> dict[UUID, UUID] | None:
        """Mark changes that the cache knows; return those it may lack.

        Return order ids by event ids; None if the database did not answer.
        """
        since = now() - LOOK_BACK
        if not self._cache.trusted or time.monotonic() >= self._sweep_at:
            self._sweep_at = time.monotonic() + SWEEP_INTERVAL
            since = ALWAYS
        told = col(Event.id).in_(self._told)
        mark = sa.update(Event).where(told, UNPROCESSED)
        changes = (
            sa.select(col(Event.id), col(Event.order_id))
            .where(col(Event.kind) == EventKind.STATUS_CHANGED, UNPROCESSED)
            .where(col(Event.due_at) >= since)
            .limit(MAX_CHANGES)
        )
        try:
            async with self._database.keeper_engine.begin() as connection:
                if self._told:
                    await connection.execute(mark.values(processed_at=now()))
                found = (await connection.execute(changes)).all()
        except Exception as error:
            if not is_outage(error):
                raise
            self._database.outage.report(error)
            self._database_is_away = is_unreachable(error)
            return None
        self._database_is_away = False
        self._told.clear()
        return dict(found)
