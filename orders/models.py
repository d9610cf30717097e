"""Say what an order is: tables, schemas, the state machine, the errors.

SQLModel classes are both the schemas and the tables, read as Create, Public,
table: what is answered is what is kept, and more. A table class does not
validate, so what a client sends is checked in its Create schema.
"""

import math
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Self
from uuid import UUID

import pydantic
import sqlalchemy as sa
from pydantic import AfterValidator, AllowInfNan, Strict, model_validator
from sqlmodel import Field, SQLModel

from orders.db import JsonText

PROCESS_DELAY = timedelta(seconds=2)  # from an order to its processing


def now() -> datetime:
    """Return the present moment, in UTC."""
    return datetime.now(UTC)


# What a client can act on, by the last part of its RFC 9457 type: the status
# code, and what to do. /docs shows this table.
REFUSALS = {
    "unauthorized": (401, "Send a valid token: log in with POST /token/"),
    "wrong-password": (401, "Incorrect e-mail or password"),
    "forbidden": (403, "Another user's orders: ask for your own user id"),
    "order-not-found": (404, "No such order of yours: check its id"),
    "email-taken": (409, "Registered already: log in with POST /token/"),
    "transition-forbidden": (409, "The order cannot take this status"),
    "precondition-failed": (412, "It has moved on: read it again, decide"),
    "key-reused": (422, "This key made another order: use a new key"),
    "invalid": (422, "Correct what `detail` names"),
    "too-many-calls": (429, "Wait as long as `Retry-After` says"),
    "overloaded": (503, "Too many log in at once: try again in a moment"),
    "database-away": (503, "Try again, a create with an Idempotency-Key"),
}


class Refusal(Exception):
    """An answer that is an error, of a kind in REFUSALS."""

    def __init__(self, kind: str, detail: str = "", **more: Any) -> None:
        """Take a more telling text, headers, and members that it adds."""
        self.status, usual = REFUSALS[kind]
        self.kind, self.detail = kind, detail or usual
        self.headers, self.more = more.pop("headers", None), more


class Schema(SQLModel):
    """What a client sends; SQLModel itself fails at a key named `cls`."""

    __init__ = pydantic.BaseModel.__init__


def storable(value: Any, depth: int = 0) -> Any:
    """Return `value` if JSON, PostgreSQL and UTF-8 can all hold it."""
    if depth > 20:
        raise ValueError("is nested deeper than 20 levels")
    match value:
        case str() if re.search("[\0\ud800-\udfff]", value):
            raise ValueError("holds a NUL or a lone surrogate character")
        case float() if not math.isfinite(value):
            raise ValueError("holds a number that is not finite")
        case dict():
            storable([*value, *value.values()], depth)
        case list():
            for inner in value:
                storable(inner, depth + 1)
    return value


def _whole_cents(price: float) -> float:
    """Return the price as the double nearest to a whole cent."""
    # What binary floats add by themselves (0.1 + 0.2) is no finer price.
    rounded = round(price, 2)
    if abs(price - rounded) > 2 * math.ulp(price):
        raise ValueError("has more than two decimals")
    return rounded


def example(**values: Any) -> Any:
    """Return the configuration of a schema with an example in OpenAPI."""
    return {"json_schema_extra": {"examples": [values]}}


TEA = [{"name": "tea", "quantity": 3, "price": 4.5}]  # of OpenAPI's examples
MOMENT = "2026-11-23T11:08:45.156771Z"
SAMPLE = {"user_id": 1, "items": TEA, "total_price": 13.5, "status": "PENDING"}
Text = Annotated[str, AfterValidator(storable)]
Number = Annotated[float, Strict(), AllowInfNan(False)]


class OrderStatus(StrEnum):
    """Where an order stands: it goes PENDING → PAID → SHIPPED / CANCELED."""

    PENDING = "PENDING"
    PAID = "PAID"
    SHIPPED = "SHIPPED"
    CANCELED = "CANCELED"


# No cycle, and nothing but the status ever changes: so the status is the
# order's version, and an ETag made of it a true validator.
TRANSITIONS: dict[OrderStatus, set[OrderStatus]] = {
    OrderStatus.PENDING: {OrderStatus.PAID, OrderStatus.CANCELED},
    OrderStatus.PAID: {OrderStatus.SHIPPED, OrderStatus.CANCELED},
    OrderStatus.SHIPPED: set(),
    OrderStatus.CANCELED: set(),
}


class OrderItem(Schema):
    """One line of an order; keys beyond these are kept as they are."""

    model_config = {"extra": "allow"}
    __pydantic_extra__: dict[Text, Annotated[Any, AfterValidator(storable)]]

    name: Text = Field(min_length=1, max_length=200)
    quantity: Annotated[int, Strict()] = Field(ge=1, le=10_000)
    price: Annotated[Number, AfterValidator(_whole_cents)] = Field(
        ge=0,
        le=1_000_000,
        description="Price of one piece, with at most two decimals",
        schema_extra={"json_schema_extra": {"multipleOf": 0.01}},
    )


class OrderCreate(Schema):
    """A wish for an order."""

    model_config = example(items=TEA)

    items: list[OrderItem] = Field(min_length=1, max_length=100)
    total_price: Number | None = Field(
        None, description="Optional; refused if it is not the items' sum"
    )

    @model_validator(mode="after")
    def _add_up(self) -> Self:
        """Set the sum, exact to the cent; refuse another that was sent."""
        # The bounds keep it under 10¹⁴ cents, which a double holds exactly.
        prices = (Decimal(str(it.price)) * it.quantity for it in self.items)
        said, total = self.total_price, float(sum(prices))
        if said is not None and abs(said - total) >= 0.005:
            raise ValueError(f"total_price is not {total}: correct or omit it")
        self.total_price = total
        return self


ITEMS = pydantic.TypeAdapter(list[OrderItem])
TEXT: Any = {"native_enum": False, "create_constraint": True, "length": 16}
STATUS: Any = sa.Enum(OrderStatus, name="orders_status_check", **TEXT)
KIND: Any = sa.String(32)
NEWEST = ("user_id", "created_at", "id")
NEWEST_BY_STATUS = ("user_id", "status", "created_at", "id")
NOT_DONE: Any = dict.fromkeys(
    ("postgresql_where", "sqlite_where"), sa.text("processed_at IS NULL")
)


class Order(SQLModel, table=True):
    """An order, as it is kept and shown; only its status ever changes."""

    __tablename__ = "orders"
    __table_args__ = (
        sa.CheckConstraint("total_price >= 0", "orders_total_price_check"),
        # Serve the list of a user's orders, newest first: all, and those in
        # a status, which may be few among a million.
        sa.Index(f"orders_{'_'.join(NEWEST)}", *NEWEST),
        sa.Index(f"orders_{'_'.join(NEWEST_BY_STATUS)}", *NEWEST_BY_STATUS),
    )

    model_config = example(
        id="96d7d433-c31f-458f-80e0-2ca062dff923", created_at=MOMENT, **SAMPLE
    )

    id: UUID = Field(primary_key=True)
    user_id: int = Field(foreign_key="users.id")
    items: list[OrderItem] = Field(sa_type=JsonText)
    total_price: float
    status: OrderStatus = Field(sa_type=STATUS)
    created_at: datetime


class StatusChange(Schema):
    """The status that an order should take."""

    model_config = example(status="PAID")

    status: OrderStatus


class EventKind(StrEnum):
    """What can happen to an order."""

    NEW_ORDER = "new_order"
    STATUS_CHANGED = "status_changed"


class EventPublic(SQLModel):
    """An event of an order's history as the API shows it."""

    model_config = example(
        kind="new_order", payload={}, created_at=MOMENT, processed_at=None
    )

    kind: EventKind = Field(sa_type=KIND)
    payload: dict[str, Any] = Field(
        sa_type=sa.JSON,
        description="The id of the request, and the status if it changed",
    )
    created_at: datetime
    processed_at: datetime | None = Field(
        description="When it took effect; null until then"
    )


class Event(EventPublic, table=True):
    """Something that happened to an order, due until it was processed."""

    __tablename__ = "events"
    __table_args__ = (
        # Serves the relay's claim; it holds only what is still to be done.
        sa.Index("events_due", "kind", "due_at", **NOT_DONE),
    )

    id: UUID = Field(primary_key=True)
    order_id: UUID = Field(foreign_key="orders.id", index=True)
    attempts: int
    due_at: datetime  # when to process it first, or again: see `events`


# Statements are built once from these, without instances of the models.
ORDERS = SQLModel.metadata.tables["orders"]
EVENTS = SQLModel.metadata.tables["events"]
