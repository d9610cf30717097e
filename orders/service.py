"""The use cases of an order: create, read, list, change, process.

Each commits once, last. Creating an order or changing its status writes an
event in the same transaction, so that what was acknowledged is never lost.
"""

import base64
import logging
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import Connection, Update, bindparam, insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlmodel import col, select, tuple_, update

from orders.cache import OrderCache
from orders.db import Database
from orders.logs import request_id
from orders.models import (
    TRANSITIONS,
    CursorBroken,
    Event,
    EventKind,
    Forbidden,
    KeyReused,
    NotFound,
    Order,
    OrderCreate,
    OrderStatus,
    OrderView,
    PreconditionFailed,
    TransitionForbidden,
    Unauthorized,
    now,
)

# An idempotency key's order has the id uuid5(this, "<user id>:<key>").
KEY_NAMESPACE = UUID("b8a1c9f4-2f6e-4a5c-9f0e-6d7f5f1f6c11")

READ = select(*Order.__table__.c).where(  # type: ignore[attr-defined]
    col(Order.id) == bindparam("order_id")
)

logger = logging.getLogger(__name__)


class Page(NamedTuple):
    """Some of a user's orders, newest first, and where the next page is."""

    orders: list[OrderView]
    next_cursor: str | None


class OrderService:
    """What a user can do with their orders."""

    def __init__(
        self,
        database: Database,
        cache: OrderCache,
        wake: dict[EventKind, Callable[[], None]],
    ) -> None:
        """Take what the use cases need; `wake` calls the relay of a kind."""
        self._database = database
        self._cache = cache
        self._wake = wake

    async def create(
        self, user_id: int, draft: OrderCreate, *, key: str | None = None
    ) -> tuple[UUID, OrderView, bool]:
        """Keep a new order; return its id, it, and if it was there before.

        With an idempotency key, the same draft yields the same order again;
        another draft under the same key raises KeyReused.
        """
        order = Order(
            id=uuid.uuid5(KEY_NAMESPACE, f"{user_id}:{key}")
            if key
            else uuid.uuid4(),
            user_id=user_id,
            items=[item.model_dump() for item in draft.items],
            total_price=draft.total,
        )
        try:
            await self._insert(order)
        except IntegrityError:
            return order.id, await self._replay(order), True
        logger.info("Order %s created", order.id)
        self._wake[EventKind.NEW_ORDER]()
        return order.id, OrderView.of(order), False

    async def get(
        self, user_id: int, order_id: UUID
    ) -> tuple[OrderView, bool]:
        """Return the caller's order, and whether it came from the cache."""
        cached = await self._cache.get(order_id)
        if cached is not None:
            view = OrderView.decode(cached)
            _check_owner(view.user_id, user_id)
            return view, True
        read_at = time.monotonic()
        view = OrderView.of(await self._read(order_id))
        await self._cache.fill(order_id, view.encode(), read_at)
        _check_owner(view.user_id, user_id)
        return view, False

    async def list_page(
        self,
        user_id: int,
        of_user: int,
        *,
        limit: int,
        cursor: str | None = None,
        status: OrderStatus | None = None,
    ) -> Page:
        """Return a page of the caller's orders, newest first."""
        if of_user != user_id:
            raise Forbidden
        newest = (col(Order.created_at).desc(), col(Order.id).desc())
        statement = select(Order).where(Order.user_id == user_id)
        if status is not None:
            statement = statement.where(Order.status == status)
        if cursor is not None:
            after = tuple_(*_decode_cursor(cursor))
            statement = statement.where(
                tuple_(Order.created_at, Order.id) < after
            )
        async with self._database.session() as session:
            found = await session.exec(
                statement.order_by(*newest).limit(limit + 1)
            )
            orders = found.all()
        more = len(orders) > limit
        return Page(
            [OrderView.of(order) for order in orders[:limit]],
            _encode_cursor(orders[limit - 1]) if more else None,
        )

    async def change_status(
        self,
        user_id: int,
        order_id: UUID,
        new: OrderStatus,
        *,
        expected: set[str] | None = None,
    ) -> OrderView:
        """Move the caller's order on; `expected` is what `If-Match` allows.

        One conditional UPDATE decides: of two racing changes only one wins.
        """
        sources = {old for old, after in TRANSITIONS.items() if new in after}
        if expected is not None:
            sources &= expected
        change = _change(user_id, order_id, sources, new)
        async with self._database.engine.begin() as connection:
            row = (await connection.execute(change)).first()
            if row is None:
                order = await _find(connection, order_id)
            else:
                event = _event(order_id, new).model_dump()
                await connection.execute(insert(Event), event)
                # While the row is locked: a crash after the commit must not
                # leave the old bytes readable.
                await self._cache.invalidate(order_id)
        if row is None:
            return await self._explain(user_id, order, new, expected)
        # Again, for a reader that filled in between with the old row.
        await self._cache.invalidate(order_id)
        logger.info("Order %s became %s", order_id, new)
        self._wake[EventKind.STATUS_CHANGED]()
        return OrderView.of(Order.model_construct(**row._mapping))

    async def history(self, user_id: int, order_id: UUID) -> list[Event]:
        """Return what happened to the caller's order, oldest first."""
        await self.get(user_id, order_id)
        statement = (
            select(Event)
            .where(Event.order_id == order_id)
            .order_by(col(Event.created_at))
        )
        async with self._database.session() as session:
            return list((await session.exec(statement)).all())

    async def _insert(self, order: Order) -> None:
        """Write the order and its event in one transaction."""
        event = _event(order.id)
        async with self._database.engine.begin() as connection:
            await connection.execute(insert(Order), order.model_dump())
            await connection.execute(insert(Event), event.model_dump())

    async def _replay(self, draft: Order) -> OrderView:
        """Return the order that the draft's key made before."""
        try:
            order = await self._read(draft.id)
        except NotFound:
            # The other constraint failed: there is no such user any more.
            raise Unauthorized from None
        if order.items != draft.items:
            raise KeyReused
        return OrderView.of(order)

    async def _read(self, order_id: UUID) -> Order:
        async with self._database.autocommit.connect() as connection:
            return await _find(connection, order_id)

    async def _explain(
        self,
        user_id: int,
        order: Order,
        new: OrderStatus,
        expected: set[str] | None,
    ) -> OrderView:
        """Raise what kept an order from becoming `new`."""
        _check_owner(order.user_id, user_id)
        if expected is not None and order.status not in expected:
            raise PreconditionFailed
        if new in TRANSITIONS[order.status]:  # it became possible just now
            return await self.change_status(
                user_id, order.id, new, expected=expected
            )
        raise TransitionForbidden(order.status, new)


def _change(
    user_id: int, order_id: UUID, sources: set[str], new: OrderStatus
) -> Update:
    """Return the UPDATE of a user's order from one of the sources."""
    return (
        update(Order)
        .where(
            col(Order.id) == order_id,
            col(Order.user_id) == user_id,
            col(Order.status).in_(sources),
        )
        .values(status=new)
        .returning(*Order.__table__.c)  # type: ignore[attr-defined]
    )


async def _find(connection: AsyncConnection, order_id: UUID) -> Order:
    found = await connection.execute(READ, {"order_id": order_id})
    row = found.first()
    if row is None:
        raise NotFound
    return Order.model_construct(**row._mapping)


PROCESS = (
    update(Event)
    .where(
        col(Event.id) == bindparam("event_id"),
        col(Event.processed_at).is_(None),
    )
    .values(processed_at=bindparam("moment"))
    .returning(col(Event.order_id))
)


def process_order(connection: Connection, event_id: UUID) -> bool:
    """Process a new order; return False if that was done before.

    The worker and the embedded mode both end here, with a connection that
    commits each statement. The condition in the UPDATE makes the effect
    happen once, however often the event arrives.
    """
    order_id = connection.execute(
        PROCESS, {"event_id": event_id, "moment": now()}
    ).scalar()
    if order_id is None:
        return False
    logger.info("Order %s processed", order_id)
    return True


def _check_owner(owner_id: int, user_id: int) -> None:
    """Raise NotFound unless both are the same; the only place that checks."""
    if owner_id != user_id:
        raise NotFound


def _event(order_id: UUID, status: OrderStatus | None = None) -> Event:
    """Return the event of a new order, or of an order's new status."""
    payload = {"request_id": request_id.get()}
    if status is None:
        return Event(
            order_id=order_id, kind=EventKind.NEW_ORDER, payload=payload
        )
    return Event(
        order_id=order_id,
        kind=EventKind.STATUS_CHANGED,
        payload={"status": status, **payload},
    )


def _encode_cursor(order: Order) -> str:
    """Return where the page after `order` starts, as URL-safe text."""
    text = f"{order.created_at.isoformat()} {order.id}"
    return base64.urlsafe_b64encode(text.encode()).decode()


def _decode_cursor(cursor: str) -> tuple[datetime, UUID]:
    """Undo `_encode_cursor`; raise CursorBroken for anything else."""
    try:
        text = base64.b64decode(cursor, b"-_", validate=True).decode()
        moment, _, order_id = text.partition(" ")
        created_at = datetime.fromisoformat(moment)
        created_at.astimezone(now().tzinfo)  # OverflowError: out of range
        if created_at.tzinfo is None:
            raise ValueError
        return created_at, UUID(order_id)
    except (ValueError, OverflowError):
        raise CursorBroken from None
