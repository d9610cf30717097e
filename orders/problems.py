"""Answer every error as JSON with a `detail` that says what to do.

No answer repeats what the client sent: it may be a password, or text that no
answer can hold. Here stands also what OpenAPI says of the error answers.
"""

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import compile_path

from orders.db import OUTAGES
from orders.middleware import MAX_BODY, TOO_LARGE
from orders.models import Invalid, OrdersError, Problem

RETRY_AFTER = 2  # seconds that a client should wait out an outage

DESCRIPTIONS = {
    400: "The body is not readable",
    401: "No valid token, or a wrong password",
    403: "Another user's",
    404: "No such order, or another user's",
    409: "The e-mail is taken, or the status is not a next one",
    412: "The order is no longer in the status that If-Match names",
    413: f"The body is larger than {MAX_BODY // 1024} KiB",
    422: "Something sent is senseless: each detail says what, and where",
    429: "Over the rate limit",
    503: "The database is away",
}


RETRY = {"Retry-After": "Seconds to wait before the next try"}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: RETRY, 503: RETRY}


def answer(
    description: str, headers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return OpenAPI's entry for an answer with these headers."""
    described = {
        **(headers or {}),
        "X-Request-ID": "The request's id, as the log has it",
    }
    return {
        "description": description,
        "headers": {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in described.items()
        },
    }


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's entries for the error answers of a route."""
    return {
        status: {
            "model": Invalid if status == 422 else Problem,
            **answer(DESCRIPTIONS[status], HEADERS.get(status)),
        }
        for status in (*statuses, 422, 429, 503)
    }


HINTS = {
    400: "The body could not be read: send valid JSON, or a valid form",
    404: "No such address: see /docs",
    405: "This address does not take this method: see /docs",
    413: TOO_LARGE,
}


def _problem(status: int, detail: object, headers: Any = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)


async def refuse(_: Request, error: OrdersError) -> Response:
    """Render a refusal of ours."""
    return _problem(error.status_code, error.detail, error.headers)


async def refuse_http(request: Request, error: HTTPException) -> Response:
    """Render a refusal of the framework's, with a detail that helps."""
    detail = HINTS.get(error.status_code, error.detail)
    headers = error.headers
    if error.status_code == 405 and (methods := _methods(request)):
        # The framework names those of one route; an address may have two.
        headers = {"Allow": ", ".join(methods)}
    return _problem(error.status_code, detail, headers)


def _methods(request: Request) -> list[str]:
    """Return the methods that the API documents for the address."""
    return [
        method.upper()
        for path, operations in request.app.openapi()["paths"].items()
        if compile_path(path)[0].match(request.url.path)
        for method in operations
    ]


async def refuse_invalid(
    _: Request, error: RequestValidationError
) -> Response:
    """Say what is wrong where, without repeating what was sent.

    The input may be a password, or text that no answer can hold; keys of the
    client's own are made ASCII for that.
    """
    detail = [
        {
            "type": item["type"],
            "loc": [
                part if isinstance(part, int) else ascii(part)[1:-1]
                for part in item["loc"]
            ],
            "msg": ascii(item["msg"])[1:-1],
        }
        for item in error.errors()
    ]
    return _problem(422, detail)


async def refuse_unavailable(request: Request, error: Exception) -> Response:
    """Ask the client to come back when the database does."""
    request.app.state.database.outage.report(error)
    return _problem(
        503,
        f"The database is away: try again in {RETRY_AFTER} seconds",
        {"Retry-After": str(RETRY_AFTER)},
    )


async def fail(_: Request, error: Exception) -> Response:
    """Answer a fault of ours; the server logs it with its traceback."""
    return _problem(500, "The service failed: it was logged, please report it")


HANDLERS: dict[type[Exception], Any] = {
    OrdersError: refuse,
    HTTPException: refuse_http,
    RequestValidationError: refuse_invalid,
    **dict.fromkeys(OUTAGES, refuse_unavailable),
    Exception: fail,
}
