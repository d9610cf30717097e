"""Say what each kind of event sets off: your own work goes here.

A handler is a plain function with a decorator that names its kind of event.
The relay, the publisher, the Celery worker and the embedded mode all follow
from that one line: each handler has a Celery task of its own.

A handler runs in a transaction with the mark that its event is processed. So
its work in the database happens exactly once. Other work (an e-mail, a
payment) may happen again after a crash, and should carry the id of the event,
for the other side to tell a repetition by.

On PostgreSQL a handler must end within db.WORKER_DEADLINE. Otherwise its
connection is cut, its work is rolled back, and the event is delivered again.
On SQLite nobody else can write until a handler ends.

`session.get(Order, event.order_id)` is the order. A handler that changes its
status locks the order first, by `with_for_update=True`, and asks TRANSITIONS.
The handler also adds a `new_event` of the kind STATUS_CHANGED: within a second
after the commit the cache forgets the older status.
"""

import logging
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import sqlalchemy as sa
from opentelemetry import metrics, trace
from opentelemetry.trace.propagation.tracecontext import (
    TraceContextTextMapPropagator,
)
from sqlmodel import Session, col, delete, select

from orders.logs import request_id
from orders.models import UNPROCESSED, Event, EventKind, Order, now

PRUNE_BATCH = 1000  # orders that a prune looks at in one transaction
MAX_COUNTED = 10_000  # events of a kind that a look at the backlog counts

logger = logging.getLogger(__name__)
meter = metrics.get_meter("orders")
waiting_gauge = meter.create_gauge("orders.outbox.waiting", "{event}")
oldest_gauge = meter.create_gauge("orders.outbox.oldest", "s")
tracer = trace.get_tracer("orders")
traces = TraceContextTextMapPropagator()

# Does the work, and returns the line for the log, written after the commit.
Work = Callable[[Session, Event], str]


class Handler(NamedTuple):
    """The work that a kind of event sets off."""

    task: str  # the name of its Celery task
    work: Work
    delay: timedelta  # from the event to its processing


HANDLERS: dict[str, Handler] = {}  # by the kind of event


def handles(
    kind: EventKind, *, delay: timedelta = timedelta(0)
) -> Callable[[Work], Work]:
    """Return a decorator that makes a function the handler of a kind."""
    if kind == EventKind.STATUS_CHANGED or kind in HANDLERS:
        raise ValueError(f"{kind} has a handler, or is the cache keeper's")

    def register(work: Work) -> Work:
        """Enter the function into HANDLERS, and return it as it is."""
        # The name of the function becomes the name of its Celery task: when
        # it changes, workers reject the messages that are under way.
        task = f"orders.{getattr(work, '__name__', kind)}"
        if any(handler.task == task for handler in HANDLERS.values()):
            raise ValueError(f"{task} is the task of another kind")
        HANDLERS[kind] = Handler(task, work, delay)
        return work

    return register


@handles(EventKind.NEW_ORDER, delay=timedelta(seconds=2))
def process_order(session: Session, event: Event) -> str:
    """Process a new order: today, a line in the log."""
    return f"Order {event.order_id} processed"


def new_event(order_id: UUID, kind: EventKind, **payload: str) -> Event:
    """Return an event that is due when its handler's delay has passed."""
    moment = now()
    handler = HANDLERS.get(kind)
    is_change = kind == EventKind.STATUS_CHANGED  # the keeper's
    trace_headers: dict[str, str] = {}  # filled if OpenTelemetry is on
    traces.inject(trace_headers)
    return Event(
        order_id=order_id,
        kind=kind,
        payload={**payload, "request_id": request_id.get()},
        created_at=moment,
        due_at=moment + handler.delay if handler else moment,
        traceparent=trace_headers.get("traceparent"),
        # An event without a handler is history: there is nothing to do, even
        # if a later release has a handler for its kind.
        processed_at=None if handler or is_change else moment,
    )


# The condition makes the work take effect once, however often the event is
# delivered. The kind is a part of the condition, so that a forged message
# cannot have one event handled as another kind.
MARK_PROCESSED = (
    sa.update(Event)
    .where(col(Event.id) == sa.bindparam("event_id"))
    .where(col(Event.kind) == sa.bindparam("event_kind"))
    .where(UNPROCESSED)
    .values(processed_at=sa.bindparam("moment"))
    .returning(Event)
    # The session has no older instance of the event that would have to change.
    .execution_options(synchronize_session=False)
)


def run_handler(engine: sa.Engine, kind: str, event_id: UUID) -> None:
    """Run the handler of an event, unless the event was processed already."""
    mark = {"event_id": event_id, "event_kind": kind, "moment": now()}
    with Session(engine, expire_on_commit=False) as session:
        event = session.exec(MARK_PROCESSED, params=mark).scalar_one_or_none()
        if event is None:
            return
        # The lines of the handler, too, carry the id of the request, and its
        # span belongs to the trace of the request.
        token = request_id.set(event.payload.get("request_id", "-"))
        parent = traces.extract({"traceparent": event.traceparent or ""})
        handler = HANDLERS[kind]
        try:
            with tracer.start_as_current_span(
                handler.task, parent, trace.SpanKind.CONSUMER
            ):
                line = handler.work(session, event)
                session.commit()
            logger.info(line)
        finally:
            request_id.reset(token)


# --- What waits -------------------------------------------------------------


class Backlog(NamedTuple):
    """The events that are not processed yet, as one look found them.

    A look counts no more than MAX_COUNTED events of a kind, so that it takes
    milliseconds. In a longer backlog there may be an older event.
    """

    waiting: int  # events
    oldest: datetime | None  # when the oldest of them was to be processed

    def age(self) -> float:
        """Return how late the oldest event is, in seconds; 0 if none is."""
        if self.oldest is None:
            return 0.0
        return max((now() - self.oldest).total_seconds(), 0.0)


def measure_backlog(engine: sa.Engine) -> Backlog:
    """Count the events that wait for their handlers; tell telemetry, too."""
    waiting, moments = 0, []
    with engine.connect() as connection:
        for kind, handler in HANDLERS.items():
            events = (
                sa.select(col(Event.created_at))
                .where(col(Event.kind) == kind, UNPROCESSED)
                .order_by(col(Event.due_at))  # as the index of the relay
                .limit(MAX_COUNTED)
                .subquery()
            )
            oldest = sa.func.min(events.c.created_at)
            look = sa.select(sa.func.count(), oldest).select_from(events)
            number, moment = connection.execute(look).one()
            waiting += number
            moments += [moment + handler.delay] if moment else []
    backlog = Backlog(waiting, min(moments, default=None))
    waiting_gauge.set(backlog.waiting)
    oldest_gauge.set(backlog.age())
    return backlog


# --- What is old ------------------------------------------------------------


def prune_orders(
    engine: sa.Engine, cutoff: datetime, *, dry_run: bool
) -> Iterator[tuple[int, UUID]]:
    """Delete orders that nothing has happened to since `cutoff`.

    Go through all orders by their ids, in short transactions. After each one
    yield (orders deleted, the last id). An order with an event that is not
    processed is kept. `dry_run`: delete nothing, only count.
    """
    last_id = UUID(int=0)
    while True:
        with Session(engine) as session:
            if engine.dialect.name == "sqlite":  # it cannot lock rows
                session.connection().exec_driver_sql("BEGIN IMMEDIATE")
            batch = session.exec(
                select(Order.id, Order.created_at)
                .where(Order.id > last_id)
                .order_by(col(Order.id))
                .limit(PRUNE_BATCH)
            ).all()
            if not batch:
                return
            last_id = batch[-1][0]
            old = [order_id for order_id, made in batch if made < cutoff]
            number = len(_prune_batch(session, old, cutoff, dry_run=dry_run))
            session.commit()
        yield number, last_id


def _prune_batch(
    session: Session, old: list[UUID], cutoff: datetime, *, dry_run: bool
) -> set[UUID]:
    """Delete those of the `old` orders that are not kept; return them."""
    of_old = col(Order.id).in_(old)
    if not dry_run:
        # From here on nobody can change these orders, or add an event.
        session.exec(select(Order.id).where(of_old).with_for_update()).all()
    order_id = col(Event.order_id)
    is_recent = UNPROCESSED | (col(Event.processed_at) >= cutoff)
    is_kept = order_id.in_(old), is_recent
    kept = session.exec(select(order_id).where(*is_kept)).all()
    dead = set(old) - set(kept)
    if not dry_run:
        session.exec(delete(Event).where(order_id.in_(dead)))
        session.exec(delete(Order).where(col(Order.id).in_(dead)))
    return dead
