"""The use cases of an order: create, read, list, change its status.

Creating an order or changing its status writes an event in the same
transaction, so that what was acknowledged is never lost. Creates that come
together share a transaction, and reads a query.
"""

import json
import logging
import time
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4, uuid5

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError

from orders import models
from orders.auth import INVALID_TOKEN
from orders.cache import OrderCache, OrderView
from orders.db import Batch, Database
from orders.logs import request_id
from orders.models import EVENTS, ORDERS, OrderCreate, OrderStatus, Refusal

# An idempotency key's order has the id uuid5(this, "<user id>:<key>").
KEY_NAMESPACE = UUID("b8a1c9f4-2f6e-4a5c-9f0e-6d7f5f1f6c11")
PLACE = ORDERS.c.created_at, ORDERS.c.id  # of an order in the list

# The statements that many calls share are built once. SQLite has PostgreSQL's
# clause, too.
CREATE = insert(ORDERS).on_conflict_do_nothing().returning(ORDERS.c.id)
PAGE = ORDERS.select().order_by(*(part.desc() for part in PLACE))
READ = ORDERS.select().where(ORDERS.c.id.in_(sa.bindparam("ids")))

logger = logging.getLogger(__name__)
Row = dict[str, Any]
Draft = tuple[Row, Row]  # an order to be, and its event


class OrderService:
    """What a user can do with their orders."""

    def __init__(self, database: Database, cache: OrderCache) -> None:
        """Take where orders are kept, and where they are cached."""
        self._database, self._cache = database, cache
        self._creates = Batch[Draft, bool](self._insert)
        self._reads = Batch[UUID, Any](self._select)

    async def create(
        self, user_id: int, draft: OrderCreate, *, key: str | None = None
    ) -> tuple[UUID, OrderView, bool]:
        """Keep a new order; return its id, it, and if its key had made it."""
        name = f"{user_id}:{key}"
        order: Row = {  # in the order of the table's columns
            "id": uuid5(KEY_NAMESPACE, name) if key else uuid4(),
            "user_id": user_id,
            "items": models.ITEMS.dump_json(draft.items).decode(),
            "total_price": draft.total_price,
            "status": OrderStatus.PENDING,
            "created_at": models.now(),
        }
        event = _event(order["id"], models.EventKind.NEW_ORDER)
        event["due_at"] += models.PROCESS_DELAY
        if await self._creates.ask((order, event)):
            logger.info("Order %s created", order["id"])
            return order["id"], OrderView.of(order.values()), False
        kept = await self._reads.ask(order["id"])
        if json.loads(kept.items) != json.loads(order["items"]):
            raise Refusal("key-reused")
        return kept.id, OrderView.of(kept), True

    async def get(
        self, user_id: int, order_id: UUID
    ) -> tuple[OrderView, bool]:
        """Return the caller's order, and whether it came from the cache."""
        if view := await self._cache.get(order_id):
            return _own(view, user_id), True
        read_at = time.monotonic()
        view = OrderView.of(_own(await self._reads.ask(order_id), user_id))
        self._cache.fill(order_id, view, read_at)
        return view, False

    async def list_page(
        self, user_id: int, limit: int, after: UUID | None, status: str | None
    ) -> tuple[list[OrderView], UUID | None]:
        """Return a page, newest first, and its last id if there are more."""
        page = PAGE.filter_by(user_id=user_id).limit(limit + 1)
        if status is not None:
            page = page.filter_by(status=status)
        if after is not None:
            last = sa.select(*PLACE).filter_by(id=after, user_id=user_id)
            page = page.where(sa.tuple_(*PLACE) < last.scalar_subquery())
        rows = (await self._database.execute(page)).all()
        views = [OrderView.of(row) for row in rows[:limit]]
        return views, rows[limit - 1].id if len(rows) > limit else None

    async def change_status(
        self, user_id: int, order_id: UUID, new: OrderStatus, *, known: Any
    ) -> OrderView:
        """Move the caller's order on, from one of the `known` statuses."""
        # One conditional UPDATE decides: of two racing changes only one wins.
        sources = [old for old in known if new in models.TRANSITIONS[old]]
        change = ORDERS.update().filter_by(id=order_id, user_id=user_id)
        change = change.where(ORDERS.c.status.in_(sources)).values(status=new)
        kind = models.EventKind.STATUS_CHANGED
        async with self._database.transactions.begin() as connection:
            row = (await connection.execute(change.returning(ORDERS))).first()
            if row is not None:
                # Made while the row is locked: its time is its place.
                event = _event(order_id, kind, status=new)
                await connection.execute(EVENTS.insert(), event)
                # While the row is locked: a crash after the commit must not
                # leave the old bytes readable.
                await self._cache.invalidate(order_id)
        if row is None:
            order = _own(await self._reads.ask(order_id), user_id)
            raise _explain(order.status, new, known)
        # Again, for a reader that filled in between with the old row.
        await self._cache.invalidate(order_id)
        logger.info("Order %s became %s", order_id, new)
        return OrderView.of(row)

    async def history(self, user_id: int, order_id: UUID) -> Sequence[Any]:
        """Return the caller's order's events, oldest first."""
        await self.get(user_id, order_id)
        events = EVENTS.select().filter_by(order_id=order_id)
        events = events.order_by(EVENTS.c.created_at)
        return (await self._database.execute(events)).all()

    async def _insert(self, drafts: list[Draft]) -> Sequence[bool | Exception]:
        """Write orders with their events; return which of them are new."""
        # One key may come twice: the first of them is the one. By their ids,
        # or two processes with the same keys could wait for each other.
        unique = {order["id"]: (order, event) for order, event in drafts[::-1]}
        orders = [unique[order_id][0] for order_id in sorted(unique)]
        try:
            async with self._database.transactions.begin() as connection:
                new = await connection.scalars(CREATE, orders)
                events = [unique[order_id][1] for order_id in new]
                if events:
                    await connection.execute(EVENTS.insert(), events)
        except IntegrityError:  # the user of one is gone: only that one fails
            if len(drafts) == 1:
                return [Refusal("unauthorized", headers=INVALID_TOKEN)]
            return [(await self._insert([draft]))[0] for draft in drafts]
        # Each order that is new is said to be so to the first who brought it.
        written = {event["id"] for event in events}
        return [event["id"] in written for _, event in drafts]

    async def _select(self, order_ids: list[UUID]) -> Sequence[Any]:
        """Return the rows of orders, None for each that is not there."""
        found = await self._database.execute(READ, {"ids": order_ids})
        rows = {row.id: row for row in found}
        return [rows.get(order_id) for order_id in order_ids]


def _own(order: Any, user_id: int) -> Any:
    """Return an order if it is the caller's; the only place that checks."""
    if order is None or order.user_id != user_id:
        raise Refusal("order-not-found")
    return order


def _explain(old: OrderStatus, new: OrderStatus, known: Any) -> Refusal:
    """Return what kept an order from becoming `new`."""
    if old not in known:
        return Refusal("precondition-failed")
    kind, allowed = "transition-forbidden", sorted(models.TRANSITIONS[old])
    detail = f"An order that is {old} cannot become {new}: next is "
    detail += " or ".join(allowed) or "nothing more"
    return Refusal(kind, detail, current=old, allowed=allowed)


def _event(order_id: UUID, kind: models.EventKind, **payload: Any) -> Row:
    """Return the row of an event that is due now."""
    moment = models.now()
    return {
        "id": uuid4(),
        "order_id": order_id,
        "kind": kind,
        "payload": {**payload, "request_id": request_id.get()},
        "created_at": moment,
        "attempts": 0,
        "due_at": moment,
    }
