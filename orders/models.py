"""Say what an order is: tables, schemas, the state machine, the errors.

SQLModel classes are both the tables and the schemas, read as Base, table,
Create, Public. A table class does not validate, so what a client sends is
checked in its Create schema, and the tables carry CHECK constraints besides.
"""

import json
import math
import unicodedata
import uuid
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Literal, NamedTuple, Self

from email_validator import EmailNotValidError, validate_email
from pydantic import (
    AfterValidator,
    AllowInfNan,
    ConfigDict,
    Strict,
    model_validator,
)
from sqlalchemy import JSON, CheckConstraint, Column, Enum, Index, text
from sqlmodel import Field, SQLModel

MAX_ITEMS = 100
MAX_QUANTITY = 10_000
MAX_PRICE = 1_000_000
MAX_NESTING = 20  # levels of lists and objects in an item's extra keys
MAX_EMAIL = 254  # characters; RFC 5321, section 4.5.3.1.3


def now() -> datetime:
    """Return the present moment, in UTC."""
    return datetime.now(UTC)


# --- Errors -----------------------------------------------------------------
#
# OrdersError
# ├── Unauthorized        401
# ├── Forbidden           403
# ├── NotFound            404
# ├── EmailTaken          409
# ├── TransitionForbidden 409
# ├── PreconditionFailed  412
# ├── KeyReused           422
# └── CursorBroken        422


class OrdersError(Exception):
    """A refusal that the client can act on; it owns its status code."""

    status_code: int
    detail: str | list[dict[str, Any]]
    headers: dict[str, str] | None = None

    def __init__(self, detail: str | None = None) -> None:
        """Take a more telling `detail` than the class's own."""
        self.detail = detail or self.detail
        super().__init__(self.detail)


class Unauthorized(OrdersError):
    """The caller is not known."""

    status_code = 401
    detail = "Not authenticated: send a valid token from POST /token/"
    headers: dict[str, str] | None = {"WWW-Authenticate": "Bearer"}  # noqa: RUF012


class Forbidden(OrdersError):
    """The caller is known, and it is not theirs."""

    status_code = 403
    detail = "These are another user's orders: ask for your own user id"


class NotFound(OrdersError):
    """There is no such order, or it is another user's: both look alike."""

    status_code = 404
    detail = "No such order: check the id, and that the order is yours"


class EmailTaken(OrdersError):
    """Somebody registered this e-mail address before."""

    status_code = 409
    detail = "This e-mail is registered already: log in with POST /token/"


class TransitionForbidden(OrdersError):
    """The order cannot go from its status to the wanted one."""

    status_code = 409

    def __init__(self, old: "OrderStatus", new: "OrderStatus") -> None:
        """Name the statuses that the order can still take."""
        after = " or ".join(sorted(TRANSITIONS[old])) or "nothing more"
        super().__init__(
            f"An order that is {old} cannot become {new}: next is {after}"
        )


class PreconditionFailed(OrdersError):
    """The order is no longer in the status that `If-Match` names."""

    status_code = 412
    detail = "The order has moved on: read it again, then decide"


class KeyReused(OrdersError):
    """The same idempotency key came with another order."""

    status_code = 422
    detail: str | list[dict[str, Any]] = [  # noqa: RUF012
        {
            "type": "idempotency_key_reused",
            "loc": ["header", "Idempotency-Key"],
            "msg": "This key made another order: use a new key for this one",
        }
    ]


class CursorBroken(OrdersError):
    """The cursor is not one that a page's `Link` header gave."""

    status_code = 422
    detail: str | list[dict[str, Any]] = [  # noqa: RUF012
        {
            "type": "cursor_broken",
            "loc": ["query", "cursor"],
            "msg": "Take the cursor from a page's Link header, unchanged",
        }
    ]


# --- Text from outside ------------------------------------------------------


def canonical_email(address: str) -> str:
    """Return the one spelling of an address; ValueError if it is none.

    Case and Unicode form do not tell two users apart.
    """
    if len(address) > MAX_EMAIL:
        raise ValueError(f"an e-mail has at most {MAX_EMAIL} characters")
    try:
        checked = validate_email(address, check_deliverability=False)
    except EmailNotValidError as error:
        raise ValueError(str(error)) from None
    return unicodedata.normalize("NFKC", checked.normalized.casefold())


def _storable(value: Any, depth: int = 0) -> Any:
    """Return `value` if JSON, PostgreSQL and UTF-8 can all hold it."""
    if depth > MAX_NESTING:
        raise ValueError(f"is nested deeper than {MAX_NESTING} levels")
    if isinstance(value, str):
        if "\0" in value or any(
            "\ud800" <= char <= "\udfff" for char in value
        ):
            raise ValueError("holds a NUL or a lone surrogate character")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError("holds a number that is not finite")
    elif isinstance(value, dict):
        for key, inner in value.items():
            _storable(key, depth)
            _storable(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _storable(inner, depth + 1)
    return value


def _whole_cents(price: float) -> float:
    """Return the price as the double nearest to a whole cent.

    What binary floats add by themselves (0.1 + 0.2) is no finer price.
    """
    rounded = round(price, 2)
    if abs(price - rounded) > 2 * math.ulp(price):
        raise ValueError("has more than two decimals")
    return rounded


def _example(**values: Any) -> ConfigDict:
    """Return the configuration of a schema with an example in OpenAPI."""
    return ConfigDict(json_schema_extra={"examples": [values]})


Money = Annotated[
    float, Strict(), AllowInfNan(False), AfterValidator(_whole_cents)
]


# --- Users ------------------------------------------------------------------


class UserBase(SQLModel):
    """What a user shows and sends alike."""

    email: Annotated[str, AfterValidator(canonical_email)] = Field(
        max_length=MAX_EMAIL,
        unique=True,
        schema_extra={"json_schema_extra": {"format": "email"}},
    )


class User(UserBase, table=True):
    """A registered user."""

    __tablename__ = "users"

    id: int | None = Field(default=None, primary_key=True)
    hashed_password: str


class UserCreate(UserBase):
    """A registration."""

    model_config = _example(email="ada@example.com", password="correct horse")

    password: str = Field(min_length=8, max_length=128)


class UserPublic(SQLModel):
    """A user as the API shows it."""

    model_config = _example(id=1, email="ada@example.com")

    id: int
    email: str


class Token(SQLModel):
    """An OAuth2 access token response (RFC 6749, section 5.1)."""

    access_token: str
    token_type: str = "bearer"
    expires_in: int = Field(description="Seconds that the token is valid")


# --- Orders -----------------------------------------------------------------


class OrderStatus(StrEnum):
    """Where an order stands: it goes PENDING → PAID → SHIPPED / CANCELED."""

    PENDING = "PENDING"
    PAID = "PAID"
    SHIPPED = "SHIPPED"
    CANCELED = "CANCELED"


# No cycle, and nothing but the status ever changes: so the status is the
# order's version, and `ETag: "<status>"` a true validator.
TRANSITIONS: dict[OrderStatus, set[OrderStatus]] = {
    OrderStatus.PENDING: {OrderStatus.PAID, OrderStatus.CANCELED},
    OrderStatus.PAID: {OrderStatus.SHIPPED, OrderStatus.CANCELED},
    OrderStatus.SHIPPED: set(),
    OrderStatus.CANCELED: set(),
}


class OrderItem(SQLModel):
    """One line of an order; keys beyond these are kept as they are."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1, max_length=200)
    quantity: Annotated[int, Strict()] = Field(ge=1, le=MAX_QUANTITY)
    price: Money = Field(
        ge=0,
        le=MAX_PRICE,
        description="Price of one piece, with at most two decimals",
        schema_extra={"json_schema_extra": {"multipleOf": 0.01}},
    )

    @model_validator(mode="after")
    def _check_storable(self) -> Self:
        _storable(self.model_dump())
        return self


class OrderCreate(SQLModel):
    """A wish for an order."""

    model_config = _example(
        items=[{"name": "tea", "quantity": 3, "price": 4.5}]
    )

    items: list[OrderItem] = Field(min_length=1, max_length=MAX_ITEMS)
    total_price: Annotated[float, Strict(), AllowInfNan(False)] | None = Field(
        default=None,
        description="Optional; refused if it is not the sum of the items",
    )

    @property
    def total(self) -> float:
        """Return the sum of quantity times price, exact to the cent.

        The bounds keep it under 10¹⁴ cents, which a double holds exactly.
        """
        return float(
            sum(
                item.quantity * Decimal(str(item.price)) for item in self.items
            )
        )

    @model_validator(mode="after")
    def _check_total(self) -> Self:
        if self.total_price is not None and (
            abs(self.total_price - self.total) >= 0.005
        ):
            raise ValueError(
                f"total_price is {self.total_price}, but the items sum up"
                f" to {self.total}: correct it or leave it out"
            )
        return self


class Order(SQLModel, table=True):
    """An order; only its status ever changes."""

    __tablename__ = "orders"
    __table_args__ = (
        CheckConstraint("total_price >= 0", name="orders_total_price_check"),
        # Serve the list of a user's orders, newest first: all, and those in
        # a status, which may be few among a million.
        Index("orders_user_id_created_at_id", "user_id", "created_at", "id"),
        Index(
            "orders_user_id_status_created_at_id",
            "user_id",
            "status",
            "created_at",
            "id",
        ),
    )

    id: uuid.UUID = Field(default_factory=uuid.uuid4, primary_key=True)
    user_id: int = Field(foreign_key="users.id")
    items: list[dict[str, Any]] = Field(sa_column=Column(JSON, nullable=False))
    total_price: float
    status: OrderStatus = Field(
        default=OrderStatus.PENDING,
        sa_column=Column(
            Enum(
                OrderStatus,
                native_enum=False,
                create_constraint=True,
                name="orders_status_check",
                length=16,
            ),
            nullable=False,
        ),
    )
    created_at: datetime = Field(default_factory=now)


class OrderPublic(SQLModel):
    """An order as the API shows it."""

    model_config = _example(
        id="96d7d433-c31f-458f-80e0-2ca062dff923",
        user_id=1,
        items=[{"name": "tea", "quantity": 3, "price": 4.5}],
        total_price=13.5,
        status="PENDING",
        created_at="2026-11-23T11:08:45.156771+00:00",
    )

    id: uuid.UUID
    user_id: int
    items: list[OrderItem]
    total_price: float
    status: OrderStatus
    created_at: datetime


class StatusChange(SQLModel):
    """The status that an order should take."""

    model_config = _example(status="PAID")

    status: OrderStatus


class OrderView(NamedTuple):
    """An order as it is cached and answered: its JSON, and what guards it."""

    user_id: int
    status: str
    body: bytes

    @classmethod
    def of(cls, order: Order) -> "OrderView":
        """Serialise an order: the only place that does."""
        body = json.dumps(
            {
                "id": str(order.id),
                "user_id": order.user_id,
                "items": order.items,
                "total_price": order.total_price,
                "status": order.status,
                "created_at": order.created_at.isoformat(),
            },
            ensure_ascii=False,
            separators=(",", ":"),
        )
        return cls(order.user_id, order.status, body.encode())

    def encode(self) -> bytes:
        """Return the bytes to cache: owner, status, body."""
        return b"%d %s %s" % (self.user_id, self.status.encode(), self.body)

    @classmethod
    def decode(cls, cached: bytes) -> "OrderView":
        """Undo `encode`."""
        user_id, status, body = cached.split(b" ", 2)
        return cls(int(user_id), status.decode(), body)


# --- Events -----------------------------------------------------------------


class EventKind(StrEnum):
    """What can happen to an order."""

    NEW_ORDER = "new_order"
    STATUS_CHANGED = "status_changed"


class Event(SQLModel, table=True):
    """Something that happened to an order, due until it was processed."""

    __tablename__ = "events"
    __table_args__ = (
        # Serves the relay's claim; it holds only what is still to be done.
        Index(
            "events_due",
            "kind",
            "due_at",
            postgresql_where=text("processed_at IS NULL"),
            sqlite_where=text("processed_at IS NULL"),
        ),
    )

    id: uuid.UUID = Field(default_factory=uuid.uuid4, primary_key=True)
    order_id: uuid.UUID = Field(foreign_key="orders.id", index=True)
    kind: str = Field(max_length=32)
    payload: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    created_at: datetime = Field(default_factory=now)
    attempts: int = 0
    due_at: datetime = Field(default_factory=now)
    processed_at: datetime | None = None


class EventPublic(SQLModel):
    """An event of an order's history as the API shows it."""

    model_config = _example(
        kind="status_changed",
        payload={"status": "PAID", "request_id": "my-request-7"},
        created_at="2026-11-23T11:08:45.156771+00:00",
        processed_at=None,
    )

    kind: EventKind
    payload: dict[str, Any] = Field(
        description="The id of the request, and the status if it changed"
    )
    created_at: datetime
    processed_at: datetime | None = Field(
        description="When it took effect; null until then"
    )


# --- The service's own state ------------------------------------------------


class Health(SQLModel):
    """The process lives."""

    status: str = "ok"


class Readiness(SQLModel):
    """What the service can do now, and how each dependency is."""

    status: Literal["ok", "degraded", "unavailable"]
    database: Literal["ok", "unavailable"]
    cache: Literal["ok", "embedded", "unavailable"]
    broker: Literal["ok", "embedded", "unavailable"]


class Problem(SQLModel):
    """An error that says what to do."""

    model_config = _example(detail=NotFound.detail)

    detail: str


class InvalidPart(SQLModel):
    """What is senseless, and where."""

    type: str
    loc: list[str | int]
    msg: str


class Invalid(SQLModel):
    """Why something that was sent is refused."""

    detail: list[InvalidPart]
