"""Wrap every call: its id, its client's budget, and errors as answers.

The rate limit is one budget over the whole API, counted for refused calls
too, shared by all processes through Redis; while Redis is not trusted each
process counts in its own memory. The limits' syntax, the client's address and
the counter in memory are slowapi's; the shared counter is one round trip.

Every error is a problem of RFC 9457. None repeats what the client sent: it
may be a password, or text that no answer can hold.
"""

import logging
import math
import random
import re
import time
from collections.abc import Callable
from functools import lru_cache
from http import HTTPStatus
from ipaddress import ip_address, ip_network
from typing import Any, NamedTuple

import slowapi.util
import sqlmodel
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from limits import RateLimitItem, parse_many
from opentelemetry import trace
from sqlalchemy.exc import InternalError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orders.cache import Command, RedisAway, RedisCache
from orders.db import OUTAGES, is_outage
from orders.logs import request_id
from orders.models import Refusal

DOCS_ASSETS = "/docs-assets"
REDIRECTS = {"/": "/docs", "/favicon.ico": f"{DOCS_ASSETS}/favicon.png"}
UNLIMITED = re.compile(
    rf"/|/favicon\.ico|/health|/ready|/openapi\.json|/redoc|{DOCS_ASSETS}/.*"
    r"|/docs(/oauth2-redirect)?"
)
WITH_SLASH = {"/orders", "/register", "/token"}  # as documented; both serve
MEDIA_TYPE = "application/problem+json"
MAX_BODY = 64 * 1024  # bytes
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
ORDER = ("create_order", "get_order", "change_order_status")
HEADERS = {  # what they say, and on which answers they are
    "ETag": ("The order's version: its status, and the answer's form", ORDER),
    "Idempotency-Replayed": ("true, if it was made before", ORDER[:1]),
    "Link": ('The next page, as rel="next"', ("list_orders",)),
    "Location": ("The order's address", ORDER[:1]),
    "Retry-After": ("Seconds to wait before the next try", ("429", "503")),
    "WWW-Authenticate": ("Bearer, and what is wrong with it", ("401",)),
    "X-Cache": ("hit or miss", ORDER[1:2]),
    "X-RateLimit-Limit": ("Calls of the tightest limit", ()),
    "X-RateLimit-Remaining": ("Calls that are left of it", ()),
    "X-RateLimit-Reset": ("When it is whole again, in epoch seconds", ()),
    "X-Request-ID": ("The request's id, as the log has it", ()),
}

logger = logging.getLogger(__name__)


class Budget(NamedTuple):
    """What a limit leaves to a client."""

    limit: RateLimitItem
    remaining: int  # calls; below 0 when this one was too many
    reset: int  # seconds until it is whole again


class RateLimiter:
    """Count the calls of each client, in fixed windows."""

    def __init__(self, text: str, redis: RedisCache | None) -> None:
        """Take limits such as `5/minute`, and Redis where there is one."""
        self._limits = parse_many(text) if text else []
        self._redis = redis
        by_address = slowapi.util.get_remote_address
        self._local = slowapi.Limiter(key_func=by_address).limiter

    async def count(self, request: Request) -> Budget | None:
        """Count a call; return the tightest limit's budget, if any."""
        if not self._limits:
            return None
        client = client_of(slowapi.util.get_remote_address(request))
        try:
            budgets = await self._count_shared(client)
        except RedisAway:
            budgets = [self._count_locally(it, client) for it in self._limits]
        return min(budgets, key=lambda b: (max(-1, b.remaining), -b.reset))

    async def _count_shared(self, client: str) -> list[Budget]:
        """Count in Redis, in one round trip."""
        if self._redis is None:
            raise RedisAway
        commands: list[Command] = []
        for limit in self._limits:
            key, window = limit.key_for(client), limit.get_expiry()
            commands.append(("SET", key, 0, "EX", window, "NX"))
            commands += ("INCR", key), ("TTL", key)
        answers = await self._redis.ask(*commands)
        budgets = []
        counted = zip(self._limits, answers[1::3], answers[2::3], strict=True)
        for limit, count, left in counted:
            if left < 0:  # the key ended between the two, and has no end now
                left = limit.get_expiry()
                await self._redis.ask(("EXPIRE", limit.key_for(client), left))
            budgets.append(Budget(limit, limit.amount - count, max(1, left)))
        return budgets

    def _count_locally(self, limit: RateLimitItem, client: str) -> Budget:
        """Count in this process."""
        allowed = self._local.hit(limit, client)
        end, remaining = self._local.get_window_stats(limit, client)
        reset = max(1, math.ceil(end - time.time()))
        return Budget(limit, remaining if allowed else -1, reset)


@lru_cache(4096)
def client_of(address: str) -> str:
    """Return whose budget an address shares: an IPv6 client has a /64."""
    try:
        ip = ip_address(address)
    except ValueError:  # a name of a test's, or of a socket's
        return address
    if ip.version == 6:
        return str(ip.ipv4_mapped or ip_network((ip, 64), strict=False))
    return address


class Frame:
    """What is around every call; CORS is between its two parts."""

    def __init__(
        self, app: ASGIApp, limiter: RateLimiter, origins: tuple[str, ...]
    ) -> None:
        """Wrap `app`."""
        self._app, self._limiter = app, limiter
        methods = ["GET", "HEAD", "POST", "PATCH"]
        allowed: Any = {"allow_methods": methods, "allow_headers": ["*"]}
        allowed |= {"allow_origins": origins, "expose_headers": [*HEADERS]}
        self._cors = CORSMiddleware(self._admit, **allowed)

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Handle a call with its id in the context, for the log."""
        # HEAD is answered as GET without the body: RFC 9110, section 9.3.2.
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        name = Request(scope).headers.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(name):
            name = f"{random.getrandbits(128):032x}"
        request_id.set(name)
        trace.get_current_span().set_attribute("request.id", name)
        head = scope["method"] == "HEAD"
        headers = [(b"x-content-type-options", b"nosniff")]
        headers.append((b"x-request-id", name.encode()))
        framed = {**scope, "orders.headers": headers}
        framed["path"] = canonical_path(scope["path"])
        framed["method"] = "GET" if head else scope["method"]

        async def send_framed(message: Message) -> None:
            """Add the headers that every answer has."""
            if message["type"] == "http.response.start":
                framed["orders.started"] = True
                message["headers"] = [*message.get("headers", ()), *headers]
            elif head:
                message = {**message, "body": b""}
            await send(message)

        return await self._cors(framed, receive, send_framed)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count the call, then let it through or refuse it."""
        try:
            answer = await self._refuse(Request(scope)) or self._app
            await answer(scope, receive, send)
        except Exception:
            if "orders.started" in scope:
                raise
            # Here, not in Starlette, which answers outside of this frame.
            logger.exception("The service failed")
            detail = "The service failed: it was logged, please report it"
            await problem(500, detail)(scope, receive, send)

    async def _refuse(self, request: Request) -> Response | None:
        """Return why a call is not answered: its budget, or its size."""
        if UNLIMITED.fullmatch(request.scope["path"]):
            return None
        if budget := await self._limiter.count(request):
            limit, remaining, reset = budget
            request.scope["orders.headers"] += [  # as slowapi writes them
                (b"x-ratelimit-limit", b"%d" % limit.amount),
                (b"x-ratelimit-remaining", b"%d" % max(0, remaining)),
                (b"x-ratelimit-reset", b"%d" % (time.time() + reset)),
            ]
            if remaining < 0:
                detail = f"More than {limit}: try again in {reset} seconds"
                headers = {"Retry-After": str(reset)}
                return problem(429, detail, "too-many-calls", headers)
        size = request.headers.get("content-length", "")
        # A body of unknown size passes here; the routes count it as it comes.
        too_large = size.isdecimal() and int(size[:9]) > MAX_BODY
        return problem(413, HINTS[413]) if too_large else None


def canonical_path(path: str) -> str:
    """Return a path as it is routed, with or without its last slash."""
    if path in WITH_SLASH:
        return path + "/"
    bare = path.rstrip("/")
    return path if not bare or bare in WITH_SLASH else bare


HINTS = {
    400: "The body could not be read: send valid JSON, or a valid form",
    404: "No such address: see /docs",
    405: "This address does not take this method: see /docs",
    413: f"The body is too large: send at most {MAX_BODY} bytes",
}


def problem(
    status: int, detail: Any, kind: str = "", headers: Any = None, **more: Any
) -> JSONResponse:
    """Return an error as RFC 9457 writes it, its kind explained in /docs."""
    content = {
        "type": f"/docs#{kind}" if kind else "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }
    return JSONResponse(content | more, status, headers, MEDIA_TYPE)


async def answer_refusal(_: Request, it: Refusal) -> Response:
    """Answer a refusal of ours."""
    return problem(it.status, it.detail, it.kind, it.headers, **it.more)


async def answer_http(request: Request, error: HTTPException) -> Response:
    """Answer a refusal of the framework's, with a detail that helps."""
    detail = HINTS.get(error.status_code, error.detail)
    headers = error.headers
    if error.status_code == 405:
        # The framework names the methods of one route; there may be two.
        methods = [
            method.upper()
            for path, operations in request.app.openapi()["paths"].items()
            if compile_path(path)[0].match(request.scope["path"])
            for method in operations
        ] or ["GET"]
        methods += ["HEAD"] * ("GET" in methods)
        headers = {"Allow": ", ".join(methods)}
    return problem(error.status_code, detail, headers=headers)


async def answer_invalid(request: Request, error: Any) -> Response:
    """Say what is wrong where, without repeating what was sent."""
    # Keys of the client's own are made ASCII, as an answer cannot hold all.
    detail: list[Any] = []
    for it in error.errors():
        loc = [p if isinstance(p, int) else ascii(p)[1:-1] for p in it["loc"]]
        msg = ascii(it["msg"])[1:-1]
        detail.append({"type": it["type"], "loc": loc, "msg": msg})
    form = request.scope["path"] == "/token/"
    wanted = "x-www-form-urlencoded" if form else "json"
    sent = request.headers.get("content-type", "")
    if detail[0]["loc"][0] == "body" and f"application/{wanted}" not in sent:
        hint = f"Send the body with Content-Type: application/{wanted}"
        where = ["header", "Content-Type"]
        detail.insert(0, {"type": "content_type", "loc": where, "msg": hint})
    return problem(422, detail, "invalid")


async def answer_outage(request: Request, error: Exception) -> Response:
    """Ask the client to come back when the database does."""
    if not is_outage(error):
        raise error
    request.state.parts.database.outage.report(error)
    detail = (
        "The database is away: try again in 2 seconds, a create with its"
        " Idempotency-Key; before you repeat a PATCH, read the order"
    )
    return problem(503, detail, "database-away", {"Retry-After": "2"})


HANDLERS: Any = {
    Refusal: answer_refusal,
    HTTPException: answer_http,
    RequestValidationError: answer_invalid,
    **dict.fromkeys((*OUTAGES, InternalError), answer_outage),
}
PROBLEMS = {
    400: "The body is not readable",
    401: "No token, or a wrong password",
    403: "Another user's",
    404: "No such order, or another user's",
    409: "The e-mail is taken, or the status is not a next one",
    412: "The order has not the ETag of If-Match",
    413: f"The body is larger than {MAX_BODY // 1024} KiB",
    422: "What is sent is senseless: `detail` says what, and where",
    429: "Over the rate limit",
    503: "The database is away, or too many log in",
}


class Problem(sqlmodel.SQLModel):
    """An error that says what to do (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str | list[dict[str, Any]]


def router(*statuses: int, **options: Any) -> APIRouter:
    """Return a router whose routes may answer with these problems."""
    said: dict[int | str, Any] = {}
    for status in statuses:
        said[status] = {"model": Problem, "description": PROBLEMS[status]}
    # So that a generated client's methods are called as the functions.
    options["generate_unique_id_function"] = lambda route: route.name
    return APIRouter(responses=said, max_body_size=MAX_BODY, **options)


def complete(openapi: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Say what FastAPI cannot know: headers, the media type of problems."""
    schema = openapi()
    for operations in schema["paths"].values():
        for operation in operations.values():
            for status, answer in operation["responses"].items():
                answer["headers"] = {
                    name: {"description": text, "schema": {"type": "string"}}
                    for name, (text, where) in HEADERS.items()
                    if not where
                    or status in where
                    or (status < "4" and operation["operationId"] in where)
                }
                content = answer.get("content", {})
                if "Problem" in str(content):
                    content[MEDIA_TYPE] = content.pop("application/json")
    return schema
