"""Define the tables, the schemas of orders, and their state machine.

SQLModel classes are both the schemas and the tables. Of an order, a client
writes the Base, Create checks it, Public is the answer, and the table keeps
it. A table class does not validate, so everything that a client sends passes a
Create class first.
"""

import hashlib
import json
import math
import re
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Self, TypeVar
from uuid import UUID, uuid4

import pydantic
import sqlalchemy as sa
from pydantic import (
    AfterValidator,
    AllowInfNan,
    ConfigDict,
    Strict,
    field_validator,
    model_validator,
    with_config,
)
from sqlmodel import Field, SQLModel, col
from typing_extensions import TypedDict  # pydantic needs it before 3.12

MAX_EMAIL = 254  # characters; RFC 5321, section 4.5.3.1.3
MAX_USER_ID = 2**31 - 1  # of PostgreSQL's integer
MAX_DEPTH = 20  # levels of lists and objects within an order

# --- What the schemas share -------------------------------------------------


def now() -> datetime:
    """Return the present moment, in UTC."""
    return datetime.now(UTC)


def example(**values: Any) -> Any:  # SQLModel's type for it is private
    """Return the configuration of a schema with an example for OpenAPI."""
    return ConfigDict(json_schema_extra={"examples": [values]})


class RequestBody(SQLModel):
    """The base of all that a client sends.

    The `__init__` of SQLModel has a named parameter, so that a key with its
    name in a body would be a 500. The one of pydantic takes any key.
    """

    __init__ = pydantic.BaseModel.__init__


Value = TypeVar("Value")


def check_storable(value: Value, depth: int = 0) -> Value:
    """Return `value` if JSON, PostgreSQL and UTF-8 can all hold it.

    Raise ValueError for a NUL or a lone surrogate character, for a number
    that is not finite, and for nesting deeper than `MAX_DEPTH`.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"is nested deeper than {MAX_DEPTH} levels")
    match value:
        case str() if re.search("[\0\ud800-\udfff]", value):
            raise ValueError("holds a NUL or a lone surrogate character")
        case float() if not math.isfinite(value):
            raise ValueError("holds a number that is not finite")
        case dict():
            for key, inner in value.items():
                check_storable(key, depth + 1)
                check_storable(inner, depth + 1)
        case list():
            for inner in value:
                check_storable(inner, depth + 1)
    return value


# --- Users ------------------------------------------------------------------


class User(SQLModel, table=True):
    """A registered user; `auth` has the schemas of users."""

    __tablename__ = "users"

    id: int | None = Field(default=None, primary_key=True)
    email: str = Field(max_length=MAX_EMAIL, unique=True)
    hashed_password: str


# --- The status of an order -------------------------------------------------


class OrderStatus(StrEnum):
    """Where an order stands: PENDING → PAID → SHIPPED, or CANCELED before."""

    PENDING = "PENDING"
    PAID = "PAID"
    SHIPPED = "SHIPPED"
    CANCELED = "CANCELED"


# There is no cycle, and nothing of an order but its status ever changes. So
# the status is the version of an order, and an ETag can be made of it.
TRANSITIONS: dict[OrderStatus, set[OrderStatus]] = {
    OrderStatus.PENDING: {OrderStatus.PAID, OrderStatus.CANCELED},
    OrderStatus.PAID: {OrderStatus.SHIPPED, OrderStatus.CANCELED},
    OrderStatus.SHIPPED: set(),
    OrderStatus.CANCELED: set(),
}
# Where STAFF_USER_IDS is set, only staff may set these.
STAFF_STATUSES = {OrderStatus.PAID, OrderStatus.SHIPPED}


class StatusChange(RequestBody):
    """The status that an order should take."""

    model_config = example(status="PAID")

    status: OrderStatus


# --- Orders -----------------------------------------------------------------


def _round_to_cents(price: float) -> float:
    """Return the price as the float that is nearest to a whole cent."""
    rounded = round(price, 2)
    # Binary floats add digits by themselves: 0.1 + 0.2 is a price of 0.3.
    if abs(price - rounded) > 2 * math.ulp(price):
        raise ValueError("has more than two decimals")
    return rounded


Number = Annotated[float, Strict(), AllowInfNan(False)]
Price = Annotated[
    Number,
    Field(
        ge=0,
        le=1_000_000,
        description="Price of one piece, with at most two decimals",
        schema_extra={"json_schema_extra": {"multipleOf": 0.01}},
    ),
    AfterValidator(_round_to_cents),  # last, or OpenAPI loses the bounds
]


@with_config(ConfigDict(extra="allow"))
class OrderItem(TypedDict):
    """A line of an order; other keys are kept as they are."""

    name: Annotated[str, Field(min_length=1, max_length=200)]
    quantity: Annotated[int, Strict(), Field(ge=1, le=10_000)]
    price: Price


TEA = {"name": "tea", "quantity": 3, "price": 4.5}  # in the examples


class OrderBase(SQLModel):
    """The part of an order that a client writes; it is kept as it is.

    A new field of an order is one line here, and a migration.
    """

    items: list[OrderItem] = Field(
        sa_type=sa.JSON, min_length=1, max_length=100
    )


class OrderCreate(RequestBody, OrderBase):
    """An order that a client asks for."""

    model_config = example(items=[TEA])

    total_price: Number | None = Field(
        None, description="Optional; refused if it is not the items' sum"
    )

    @field_validator("*")
    @classmethod
    def _check_storable(cls, value: object) -> object:
        """Refuse what cannot be kept, in every field."""
        return check_storable(value)

    @model_validator(mode="after")
    def _add_up(self) -> Self:
        """Set the total, exact to the cent; refuse another one."""
        prices = (
            Decimal(str(item["price"])) * item["quantity"]
            for item in self.items
        )
        # The bounds keep it under 10¹⁴ cents, which a float holds exactly.
        total = float(sum(prices))
        if (
            self.total_price is not None
            and abs(self.total_price - total) >= 0.005
        ):
            raise ValueError(f"total_price is not {total}: correct or omit it")
        self.total_price = total
        return self


STATUS_TYPE = sa.Enum(
    OrderStatus,
    name="orders_status_check",
    native_enum=False,
    create_constraint=True,
    length=16,
)


class OrderPublic(OrderBase):
    """An order as the API shows it; the table inherits its columns."""

    model_config = example(
        id="96d7d433-c31f-458f-80e0-2ca062dff923",
        user_id=1,
        items=[TEA],
        total_price=13.5,
        status="PENDING",
        created_at="2026-11-23T11:08:45.156771Z",
    )

    id: UUID = Field(primary_key=True)
    user_id: int = Field(foreign_key="users.id")
    total_price: float
    status: OrderStatus = Field(sa_type=STATUS_TYPE)
    created_at: datetime


# The form of an order's JSON. A release with another form has another tag, so
# that neither a client nor the cache takes the one form for the other.
ORDER_FORM = hashlib.sha256(
    json.dumps(OrderPublic.model_json_schema(mode="serialization")).encode()
).hexdigest()[:8]


def etag_of(status: str) -> str:
    """Return the ETag of an order in a status."""
    return f'"{status}.{ORDER_FORM}"'


def statuses_in(header: str) -> set[OrderStatus]:
    """Return the statuses whose ETags a header names; `*` names all.

    RFC 9110, section 13.1.1: the comparison is strong, and `*` stands alone.
    """
    tags = {tag.strip() for tag in header.split(",")}
    if "*" in tags:
        return set(OrderStatus) if tags == {"*"} else set()
    return {status for status in OrderStatus if etag_of(status) in tags}


NEWEST = ("user_id", "created_at", "id")
NEWEST_BY_STATUS = ("user_id", "status", "created_at", "id")


class Order(OrderPublic, table=True):
    """An order as it is kept; only its status ever changes."""

    __tablename__ = "orders"
    __table_args__ = (
        sa.CheckConstraint("total_price >= 0", "orders_total_price_check"),
        # The list of a user's orders, newest first: all of them, and those
        # in one status, which may be few among a million.
        sa.Index(f"orders_{'_'.join(NEWEST)}", *NEWEST),
        sa.Index(f"orders_{'_'.join(NEWEST_BY_STATUS)}", *NEWEST_BY_STATUS),
    )


# --- Events -----------------------------------------------------------------


class EventKind(StrEnum):
    """What can happen to an order."""

    NEW_ORDER = "new_order"
    STATUS_CHANGED = "status_changed"


class EventPublic(SQLModel):
    """An event of an order's history, as the API shows it."""

    model_config = example(
        kind="new_order",
        payload={"request_id": "8f14e45fceea167a5a36dedd4bea2543"},
        created_at="2026-11-23T11:08:45.156771Z",
        processed_at=None,
    )

    kind: str = Field(sa_type=sa.String(32), description="Its EventKind")
    payload: dict[str, str] = Field(
        sa_type=sa.JSON,
        description="The id of the request, and the status if it changed",
    )
    created_at: datetime
    processed_at: datetime | None = Field(
        None, description="When it was handled; null until then"
    )


PROCESSED_AT_IS_NULL = sa.text("processed_at IS NULL")


class Event(EventPublic, table=True):
    """Something that happened to an order; due until it was processed."""

    __tablename__ = "events"
    __table_args__ = (
        # The relay's claim reads this index, which holds unfinished work only.
        sa.Index(
            "events_due",
            "kind",
            "due_at",
            postgresql_where=PROCESSED_AT_IS_NULL,
            sqlite_where=PROCESSED_AT_IS_NULL,
        ),
    )

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    order_id: UUID = Field(foreign_key="orders.id", index=True)
    attempts: int = 0  # claims so far, without those whose delivery failed
    # The trace of the call, which the handler continues: a W3C `traceparent`.
    traceparent: str | None = Field(None, max_length=55)
    due_at: datetime  # when it is to be processed, for the first time or again


UNPROCESSED = col(Event.processed_at).is_(None)  # a condition for statements
