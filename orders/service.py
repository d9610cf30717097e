"""The use cases of an order: create, read, list, change its status.

Creating an order or changing its status writes an event in the same
transaction, so that an order that was acknowledged is never forgotten. Creates
that come together share one transaction, and reads share one query.
"""

import asyncio
import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Literal, NamedTuple
from uuid import UUID, uuid4, uuid5

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DataError, IntegrityError
from sqlmodel import Field, SQLModel, col, select

from orders.auth import INVALID_TOKEN
from orders.cache import TRUST, CacheState, OrderCache, OrderView
from orders.db import Batcher, Database
from orders.events import BrokerState, Relay
from orders.handlers import new_event
from orders.models import (
    MAX_USER_ID,
    STAFF_STATUSES,
    TRANSITIONS,
    Event,
    EventKind,
    EventPublic,
    Order,
    OrderBase,
    OrderCreate,
    OrderPublic,
    OrderStatus,
    now,
)
from orders.problems import Refusal

# An idempotency key's order has the id uuid5(this, "<user id>:<key>").
KEY_NAMESPACE = UUID("b8a1c9f4-2f6e-4a5c-9f0e-6d7f5f1f6c11")
PING_TIMEOUT = 1.0  # seconds that a look at the readiness may take
# More than the 38 s within which an order is processed whose message is lost.
MAX_BACKLOG_AGE = 60.0  # seconds; if an event is later, /ready says degraded

logger = logging.getLogger(__name__)
# The columns of a row by their names, which SQLAlchemy types as Any.
Row = Mapping[Any, Any]

# The statements of the most frequent calls are built once, and read and write
# columns: instances would take twice the time. SQLite knows PostgreSQL's ON
# CONFLICT, too.
COLUMNS = [getattr(Order, name) for name in OrderPublic.model_fields]
READ = sa.select(*COLUMNS).where(col(Order.id).in_(sa.bindparam("ids")))
PAGE = sa.select(*COLUMNS).order_by(
    col(Order.created_at).desc(), col(Order.id).desc()
)
CREATE = insert(Order).on_conflict_do_nothing().returning(col(Order.id))


class NewOrder(NamedTuple):
    """An order to be created, and the event that tells of it."""

    order: Row
    event: Event


class OrderService:
    """The use cases: users act on their own orders, and staff on all."""

    def __init__(
        self, database: Database, cache: OrderCache, staff: AbstractSet[int]
    ) -> None:
        """Take the database, the cache of its orders, and staff's user ids."""
        self._database, self._cache, self.staff = database, cache, staff
        self._creates = Batcher[NewOrder, bool](self._insert)
        self._reads = Batcher[UUID, Row | None](self._select)

    async def create(
        self, user_id: int, draft: OrderCreate, *, key: str | None = None
    ) -> tuple[UUID, OrderView, bool]:
        """Keep a new order.

        Return (order id, view, whether the key was used before). A key that
        was used before returns the order that it made; raise Refusal if that
        order was another one.
        """
        name = f"{user_id}:{key}"
        order = {
            **draft.model_dump(),
            "id": uuid5(KEY_NAMESPACE, name) if key else uuid4(),
            "user_id": user_id,
            "status": OrderStatus.PENDING,
            "created_at": now(),
        }
        event = new_event(order["id"], EventKind.NEW_ORDER)
        if await self._creates.submit(NewOrder(order, event)):
            if key and await self._cache.get(order["id"]):
                # An order that had the key was pruned, and is still cached.
                await self._cache.invalidate(order["id"])
            logger.info("Order %s created", order["id"])
            return order["id"], OrderView.of(order), False
        kept = await self._reads.submit(order["id"])
        if kept is None or _said(kept) != _said(order):
            raise Refusal("key-reused")
        return order["id"], OrderView.of(kept), True

    async def get(
        self, user_id: int, order_id: UUID
    ) -> tuple[OrderView, bool]:
        """Return the caller's order, and whether it came from the cache."""
        if view := await self._cache.get(order_id):
            self.require_access(view.user_id, user_id)
            return view, True
        read_at = time.monotonic()
        view = await self._read(user_id, order_id)
        self._cache.fill(order_id, view, read_at)
        return view, False

    async def list_page(
        self,
        user_id: int,
        *,
        limit: int,
        after: UUID | None,
        status: OrderStatus | None,
    ) -> tuple[list[OrderPublic], UUID | None]:
        """Return (orders, newest first; the last one's id if more follow).

        `after` is the last order of the page before; raise Refusal if it is
        no order of the user.
        """
        if not 0 < user_id <= MAX_USER_ID:
            return [], None  # the database would refuse the number
        page = PAGE.where(col(Order.user_id) == user_id).limit(limit + 1)
        if status is not None:
            page = page.where(col(Order.status) == status)
        if after is not None:
            last = await self._reads.submit(after)
            if last is None or last["user_id"] != user_id:
                raise Refusal("unknown-cursor")
            place = sa.tuple_(col(Order.created_at), col(Order.id))
            last_place = sa.tuple_(last["created_at"], last["id"])
            page = page.where(place < last_place)
        async with self._database.engine.connect() as connection:
            rows = (await connection.execute(page)).mappings().all()
        orders = [OrderPublic.model_construct(**row) for row in rows[:limit]]
        return orders, orders[-1].id if len(rows) > limit else None

    async def change_status(
        self,
        user_id: int,
        order_id: UUID,
        new: OrderStatus,
        *,
        expected: Collection[OrderStatus],
    ) -> OrderView:
        """Move the caller's order on, if its status is one of `expected`.

        Raise Refusal if the order is not there, or cannot take the status, or
        if only staff may set it.
        """
        if self.staff and new in STAFF_STATUSES and user_id not in self.staff:
            raise Refusal("staff-only")
        sources = [old for old in expected if new in TRANSITIONS[old]]
        while not (
            order := await self._change(user_id, order_id, new, sources)
        ):
            view = await self._read(user_id, order_id)
            status = OrderStatus(view.status)
            if status not in sources:
                raise _explain(status, new, expected)
            # Another change has just made this one possible: try again.
        # The second tombstone, as `_change` wrote the first one before the
        # commit: a reader may have cached the old row in between.
        if not await self._cache.invalidate(order_id):
            # Other processes may still trust Redis, which lacks the tombstone.
            # Within one TRUST the keeper of each process finds the change, or
            # its trust ends, so that no later read is older.
            await asyncio.sleep(TRUST)
        logger.info("Order %s became %s", order_id, new)
        return OrderView.of_order(order)

    async def _change(
        self,
        user_id: int,
        order_id: UUID,
        new: OrderStatus,
        sources: Collection[OrderStatus],
    ) -> Order | None:
        """Change an order in one of the `sources`, and return it."""
        # A conditional UPDATE decides which of two racing changes wins.
        change = (
            sa.update(Order)
            .where(col(Order.id) == order_id, col(Order.status).in_(sources))
            .values(status=new)
            .returning(Order)
        )
        if user_id not in self.staff:
            change = change.where(col(Order.user_id) == user_id)
        async with self._database.transaction() as session:
            found = await session.exec(change)
            order: Order | None = found.scalar_one_or_none()
            if order is None:
                return None
            # Made while the row is locked, so that events and changes have the
            # same sequence.
            event = new_event(order_id, EventKind.STATUS_CHANGED, status=new)
            session.add(event)
            await session.flush()
            # Tombstone first: a crash after the commit must not leave the old
            # bytes readable. If it fails, the second tombstone counts.
            await self._cache.invalidate(order_id)
            await session.commit()
            return order

    async def history(
        self, user_id: int, order_id: UUID
    ) -> Sequence[EventPublic]:
        """Return the events of the caller's order, oldest first."""
        await self.get(user_id, order_id)  # or the refusal that it raises
        events = (
            select(Event)
            .where(Event.order_id == order_id)
            .order_by(col(Event.created_at))
        )
        async with self._database.session() as session:
            found = (await session.exec(events)).all()
        return [EventPublic(**event.model_dump()) for event in found]

    def require_access(
        self, owner_id: int, user_id: int, refusal: str = "order-not-found"
    ) -> None:
        """Raise Refusal unless a user owns the orders, or is staff."""
        if owner_id != user_id and user_id not in self.staff:
            raise Refusal(refusal)

    async def _read(self, user_id: int, order_id: UUID) -> OrderView:
        """Return the caller's order from the database."""
        row = await self._reads.submit(order_id)
        if row is None:
            raise Refusal("order-not-found")
        self.require_access(row["user_id"], user_id)
        return OrderView.of(row)

    async def _insert(
        self, new_orders: list[NewOrder]
    ) -> Sequence[bool | Exception]:
        """Write orders with their events; return which orders are new."""
        # A key may come twice: its first order counts. Sorted by their ids,
        # or two processes with the same keys could wait for each other.
        first = {new.order["id"]: new for new in reversed(new_orders)}
        orders = [first[order_id].order for order_id in sorted(first)]
        try:
            async with self._database.transactions.begin() as connection:
                created = (await connection.scalars(CREATE, orders)).all()
                events = [first[order_id].event for order_id in created]
                if events:
                    rows = [event.model_dump() for event in events]
                    await connection.execute(sa.insert(Event), rows)
        except (IntegrityError, DataError) as error:
            # A single order is at fault. To find it, try each alone.
            if len(new_orders) == 1 and isinstance(error, DataError):
                return [error]
            if len(new_orders) == 1:  # its user is gone
                return [Refusal("unauthorized", headers=INVALID_TOKEN)]
            return [(await self._insert([new]))[0] for new in new_orders]
        written = {event.id for event in events}
        return [new.event.id in written for new in new_orders]

    async def _select(self, order_ids: list[UUID]) -> Sequence[Row | None]:
        """Return the rows of orders, None for each that is not there."""
        async with self._database.engine.connect() as connection:
            found = await connection.execute(READ, {"ids": order_ids})
        rows = {row["id"]: row for row in found.mappings()}
        return [rows.get(order_id) for order_id in order_ids]


def _said(order: Row) -> str:
    """Return what a client said of an order, as one text to compare.

    As JSON, 1 and true differ, which in Python are equal.
    """
    said = {name: order[name] for name in OrderBase.model_fields}
    return json.dumps(said, sort_keys=True, default=str)


def _explain(
    old: OrderStatus, new: OrderStatus, expected: Collection[OrderStatus]
) -> Refusal:
    """Return what kept an order from becoming `new`."""
    if old not in expected:
        return Refusal("precondition-failed")
    allowed = sorted(TRANSITIONS[old])
    ways = " or ".join(allowed) or "nothing more"
    return Refusal(
        "transition-forbidden",
        f"An order that is {old} cannot become {new}: next is {ways}",
        current=old,
        allowed=[*allowed],
    )


# --- Readiness --------------------------------------------------------------


class Readiness(SQLModel):
    """The state of the service, and of each part."""

    status: Literal["ok", "degraded", "unavailable"]
    database: Literal["ok", "unavailable"]
    cache: CacheState
    broker: BrokerState
    backlog: int = Field(description="Orders' events that wait")
    oldest_seconds: float = Field(description="How late the oldest of them is")


async def check_readiness(
    database: Database, cache: OrderCache, relay: Relay
) -> Readiness:
    """Return what the service can do now; wait a second at the most."""
    ping = asyncio.gather(database.ping(), return_exceptions=True)
    # Not asyncio.wait_for: to cancel a query of a hung database, it would
    # wait for the database.
    await asyncio.wait({ping}, timeout=PING_TIMEOUT)
    is_away = not ping.done() or any(ping.result())
    age = relay.backlog.age()
    is_well = cache.trusted and relay.is_healthy and age <= MAX_BACKLOG_AGE
    return Readiness(
        status="unavailable" if is_away else "ok" if is_well else "degraded",
        database="unavailable" if is_away else "ok",
        cache=cache.state,
        broker=relay.state,
        backlog=relay.backlog.waiting,
        oldest_seconds=round(age, 1),
    )
