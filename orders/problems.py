"""Define the errors: how they are answered, and what OpenAPI says of them.

Every error is a problem of RFC 9457 (`application/problem+json`). The type
ends in one of the kinds below. No answer repeats a value that the client sent:
the value may be a password, or a text that no answer can hold.

    Exception
    ├── Refusal                   ours: a kind of REFUSALS
    ├── HTTPException             Starlette's: no such address, no such method
    ├── RequestValidationError    FastAPI's: a body or a parameter is invalid
    └── SQLAlchemyError           an outage of the database, or a fault of ours
"""

import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, NamedTuple

import sqlalchemy as sa
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import JsonValue
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    OperationalError,
    SQLAlchemyError,
    TimeoutError,
)
from sqlmodel import Field, SQLModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Match

MEDIA_TYPE = "application/problem+json"
MAX_BODY = 64 * 1024  # bytes
RETRY_AFTER = 2  # seconds, when the database is away or logins are too many
# The framework's own text says only what is wrong, not what to do.
STATUS_HINTS = {
    404: "No such address: see /docs",
    413: f"Send at most {MAX_BODY} bytes",
}


class Kind(NamedTuple):
    """The parts of an error that a client can act on."""

    status: int
    advice: str


REFUSALS = {
    "unauthorized": Kind(401, "Send a valid token: log in with POST /token/"),
    "wrong-password": Kind(401, "Incorrect e-mail or password"),
    "forbidden": Kind(403, "Another user's orders: ask for your own user id"),
    "staff-only": Kind(403, "Only staff may set this status: ask the shop"),
    "order-not-found": Kind(404, "No such order of yours: check its id"),
    "email-taken": Kind(409, "Registered already: log in with POST /token/"),
    "transition-forbidden": Kind(409, "The order cannot take this status"),
    "precondition-failed": Kind(
        412, "The order has changed since: read it again, then decide"
    ),
    "key-reused": Kind(422, "This key made another order: use a new key"),
    "unknown-cursor": Kind(422, "None of your orders: begin at page one"),
    "invalid": Kind(422, "Correct what `detail` names"),
    "too-many-calls": Kind(429, "Wait as long as `Retry-After` says"),
    "overloaded": Kind(503, "Too many passwords at once: wait a moment"),
    "database-away": Kind(503, "Try again, a create with an Idempotency-Key"),
}


class Problem(SQLModel):
    """An error that says what to do (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str | list[dict[str, Any]]  # FastAPI's errors are any JSON
    # The members of a refused change of status, and of a refused login.
    current: str | None = Field(None, description="The order's status")
    allowed: list[str] | None = Field(None, description="The next statuses")
    error: str | None = Field(None, description="RFC 6749, section 5.2")


class Refusal(Exception):
    """An answer that is an error, of a kind in REFUSALS."""

    def __init__(
        self,
        kind: str,
        detail: str = "",
        *,
        headers: Mapping[str, str] | None = None,
        **members: JsonValue,
    ) -> None:
        """Take a more telling text, headers, and further members."""
        super().__init__(kind)
        self.kind = kind
        self.status, advice = REFUSALS[kind]
        self.detail = detail or advice
        self.headers = headers
        self.members = members


def problem(
    status: int,
    detail: JsonValue,
    *,
    kind: str = "",
    headers: Mapping[str, str] | None = None,
    **members: JsonValue,
) -> Response:
    """Return an error as RFC 9457 writes it; /docs explains its kind."""
    content = {
        "type": f"/docs#{kind}" if kind else "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        **members,
    }
    return JSONResponse(content, status, headers, MEDIA_TYPE)


async def answer_refusal(_: Request, error: Refusal) -> Response:
    """Answer a refusal of ours."""
    return problem(
        error.status,
        error.detail,
        kind=error.kind,
        headers=error.headers,
        **error.members,
    )


async def answer_http(request: Request, error: HTTPException) -> Response:
    """Answer a refusal of the framework's."""
    headers = error.headers
    if error.status_code == 405:
        headers = {"Allow": ", ".join(sorted(allowed_methods(request)))}
    detail = STATUS_HINTS.get(error.status_code, error.detail)
    return problem(error.status_code, detail, headers=headers)


def allowed_methods(request: Request) -> set[str]:
    """Return the methods of an address (RFC 9110, section 15.5.6).

    Starlette names the methods of one route; an address may have two routes.
    """
    methods = {
        method
        for route in request.app.routes
        if route.matches(request.scope)[0] is not Match.NONE
        for method in getattr(route, "methods", None) or ()
    } or {"GET"}
    if "GET" in methods:
        methods.add("HEAD")
    return methods


async def answer_invalid(
    request: Request, error: RequestValidationError
) -> Response:
    """Say what is wrong and where, without repeating what was sent."""
    details: list[JsonValue] = []
    for fault in error.errors():
        # A key of the client's is made ASCII, as not every text can be sent.
        place: list[JsonValue] = [
            part if isinstance(part, int) else ascii(part)[1:-1]
            for part in fault["loc"]
        ]
        message = ascii(fault["msg"])[1:-1]
        details.append({"type": fault["type"], "loc": place, "msg": message})
    is_login = request.url.path.endswith("/token/")
    wanted = "x-www-form-urlencoded" if is_login else "json"
    sent = request.headers.get("content-type", "").lower()
    is_good = ("form" if is_login else "json") in sent
    if error.errors()[0]["loc"][0] == "body" and not is_good:
        details.insert(
            0,
            {
                "type": "content_type",
                "loc": ["header", "Content-Type"],
                "msg": "Send the body with Content-Type:"
                f" application/{wanted}",
            },
        )
    return problem(422, details, kind="invalid")


# --- Outages of the database ------------------------------------------------

OUTAGES = (InterfaceError, OperationalError, TimeoutError)


def is_outage(error: Exception) -> bool:
    """Return whether the database is away, or takes no writes."""
    if not isinstance(error, DBAPIError):
        return isinstance(error, OUTAGES)
    if getattr(error.orig, "sqlite_errorname", None) == "SQLITE_ERROR":
        return False  # a wrong statement; SQLite's driver has one class
    return isinstance(error, OUTAGES) or error.connection_invalidated


def is_unreachable(error: Exception) -> bool:
    """Return whether no connection can be had, or the one there was is lost.

    Other outages concern one statement: it was canceled, or in a deadlock.
    """
    original = getattr(error, "orig", None)
    if isinstance(original, sqlite3.Error):
        return False  # a file is locked or full, but never away
    state = getattr(original, "sqlstate", None)
    # SQLSTATE classes: connection exception, operator intervention.
    return is_outage(error) and (
        state is None or state.startswith(("08", "57P"))
    )


def database_answers(engine: sa.Engine) -> bool:
    """Return whether the database answers a query."""
    try:
        with engine.connect() as connection:
            connection.execute(sa.text("SELECT 1"))
    except SQLAlchemyError:
        return False
    return True


async def answer_outage(request: Request, error: SQLAlchemyError) -> Response:
    """Ask the client to come back when the database does."""
    if not is_outage(error):
        raise error
    request.state.services.database.outage.report(error)
    detail = (
        f"The database is away: try again in {RETRY_AFTER} seconds, a create"
        " with its Idempotency-Key; before you repeat a PATCH, read the order"
    )
    headers = {"Retry-After": str(RETRY_AFTER)}
    return problem(503, detail, kind="database-away", headers=headers)


# Starlette's type of a handler takes any Exception, ours their own ones.
Answer = Callable[[Request, Any], Awaitable[Response]]
ANSWERS: dict[int | type[Exception], Answer] = {
    Refusal: answer_refusal,
    HTTPException: answer_http,
    RequestValidationError: answer_invalid,
    SQLAlchemyError: answer_outage,
}

# --- What OpenAPI says of the answers ---------------------------------------

HEADERS = {
    "Location": "Where the order is",
    "ETag": "The version of the order, for If-Match and If-None-Match",
    "X-Cache": "`hit` if the order came from the cache, otherwise `miss`",
    "Link": 'The next page, with `rel="next"`, if there is one',
    "Idempotency-Replayed": "`true` if the key had made the order before",
    "Retry-After": "Seconds until a repetition makes sense",
    "WWW-Authenticate": "The scheme, and what is wrong with the token",
    "X-RateLimit-Limit": "Calls in a window",
    "X-RateLimit-Remaining": "Calls that are left in this window",
    "X-RateLimit-Reset": "When the window ends, in seconds since 1970",
}
HEADERS_OF_ERRORS = {
    401: ["WWW-Authenticate"],
    429: ["Retry-After", *(name for name in HEADERS if "RateLimit" in name)],
    503: ["Retry-After"],
}
Responses = dict[int | str, dict[str, Any]]  # as FastAPI types them


def with_headers(*names: str) -> dict[str, Any]:
    """Return the description of an answer that has these headers."""
    described = {
        name: {"description": HEADERS[name], "schema": {"type": "string"}}
        for name in names
    }
    return {"headers": described}


def errors(*statuses: int) -> Responses:
    """Return the descriptions of answers that are problems."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": schema}},
            **with_headers(*HEADERS_OF_ERRORS.get(status, ())),
        }
        for status in statuses
    }


def new_router(
    tag: str,
    *statuses: int,
    prefix: str = "",
    route_class: type[APIRoute] = APIRoute,
) -> APIRouter:
    """Return a router whose routes may answer with these errors."""
    return APIRouter(
        prefix=prefix,
        tags=[tag],
        route_class=route_class,
        responses=errors(*statuses),
        # To count a body would cost the cached read a tenth; it has none.
        max_body_size=MAX_BODY if route_class is APIRoute else None,
        # The methods of a generated client are named like the functions.
        generate_unique_id_function=lambda route: route.name,
    )


TAGS = [
    {"name": "users", "description": "Register, and log in."},
    {"name": "orders", "description": "Create, read, change and list them."},
    {
        "name": "service",
        "description": "Probes for an operator.\n\nEvery error is a problem"
        " (RFC 9457) whose `type` ends in its kind:\n\n"
        "| kind | status | what to do |\n|---|---|---|\n"
        + "\n".join(
            f"| {kind} | {status} | {advice} |"
            for kind, (status, advice) in REFUSALS.items()
        ),
    },
]


def describe(rate_limit: str) -> str:
    """Return the text at the top of /docs."""
    budget = "The number of calls is not limited: `RATE_LIMIT=` is empty."
    if rate_limit:
        budget = (
            f"A client's limit is {rate_limit}; start the service with an"
            " empty `RATE_LIMIT=` to lift the limit while you try."
        )
    return f"""\
1. **Register** with `POST /register/`.
2. Press **Authorize** and log in: the username is your e-mail.
3. **Create** an order with `POST /orders/`, and read it with its id.

{budget}
"""
