"""Wrap every call: its id, its client's budget, and errors as answers.

The rate limit is one budget over the whole API, counted for refused calls too,
and shared through Redis; while that is not trusted each process counts alone.
Every error is a problem of RFC 9457. None repeats what the client sent: it may
be a password, or text that no answer can hold.
"""

import logging
import math
import random
import re
import time
from functools import lru_cache
from http import HTTPStatus
from ipaddress import IPv6Address, ip_network
from typing import Any

import slowapi.util
import sqlmodel
from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from limits import parse_many
from opentelemetry import trace
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orders.cache import RedisCache
from orders.db import is_outage
from orders.logs import request_id
from orders.models import Refusal

DOCS_ASSETS = "/docs-assets/"
UNLIMITED = {"/", "/favicon.ico", "/health", "/ready", "/openapi.json"}
UNLIMITED |= {"/redoc", "/docs", "/docs/oauth2-redirect"}
WITH_SLASH = {"/orders", "/register", "/token"}  # as documented; both serve
MEDIA_TYPE = "application/problem+json"
MAX_BODY = 64 * 1024  # bytes
HINTS = {404: "No such address: see /docs"}  # the framework says only what
HINTS[413] = f"Send at most {MAX_BODY} bytes"
# Count a call in the windows of the limits; a key that is new, or lost its
# end, gets one.
COUNT = """
local counted = {}
for i, key in ipairs(KEYS) do
    local calls, left = redis.call('INCR', key), redis.call('TTL', key)
    if left < 0 then redis.call('EXPIRE', key, ARGV[i]) end
    counted[i] = {calls, left < 0 and tonumber(ARGV[i]) or left}
end
return counted
"""
logger = logging.getLogger(__name__)


class RateLimiter:
    """Count the calls of each client, in fixed windows."""

    def __init__(self, text: str, redis: RedisCache | None) -> None:
        """Take limits such as `5/minute`, and Redis where there is one."""
        self._limits = parse_many(text) if text else []
        self._windows = [limit.get_expiry() for limit in self._limits]
        self._keys = lru_cache(4096)(
            lambda host: [it.key_for(client_of(host)) for it in self._limits]
        )
        self._redis = redis
        limiter = slowapi.Limiter(key_func=slowapi.util.get_remote_address)
        self._memory: Any = limiter.limiter.storage

    async def count(self, request: Request) -> Any:
        """Return calls left, or -1, the seconds to a reset, and the limit."""
        keys = self._keys(slowapi.util.get_remote_address(request))
        counted: Any = None
        if keys and self._redis:
            command = "EVAL", COUNT, len(keys), *keys, *self._windows
            counted = await self._redis.ask(*command)
        if counted is None:
            memory, moment = self._memory, time.time()
            counted = [
                (memory.incr(key, window), memory.get_expiry(key) - moment)
                for key, window in zip(keys, self._windows, strict=True)
            ]
        budgets = [
            (max(-1, limit.amount - calls), max(1, math.ceil(left)), limit)
            for limit, (calls, left) in zip(self._limits, counted, strict=True)
        ]
        return min(budgets, key=lambda b: (b[0], -b[1]), default=None)


def client_of(address: str) -> str:
    """Return whose budget an address shares: an IPv6 client has a /64."""
    try:
        ip = IPv6Address(address)
    except ValueError:  # IPv4, or a name of a test's, or of a socket's
        return address
    return str(ip.ipv4_mapped or ip_network((ip, 64), strict=False))


class Frame:
    """What is around every call; CORS is between its two parts."""

    def __init__(
        self, app: ASGIApp, limiter: RateLimiter, origins: str
    ) -> None:
        """Wrap `app`."""
        self._app, self._limiter = app, limiter
        allowed = origins.replace(",", " ").split()
        methods = ["GET", "HEAD", "POST", "PATCH"]
        every: Any = {"allow_headers": ["*"], "expose_headers": ["*"]}
        self._cors = CORSMiddleware(self._admit, allowed, methods, **every)

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Handle a call with its id in the context, for the log."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        name = dict(scope["headers"]).get(b"x-request-id", b"")
        if not re.fullmatch(rb"[\x21-\x7e]{1,128}", name):
            name = b"%032x" % random.getrandbits(128)
        request_id.set(name.decode())
        trace.get_current_span().set_attribute("request.id", name.decode())
        bare = scope["path"].rstrip("/")
        headers = [(b"x-content-type-options", b"nosniff")]
        headers.append((b"x-request-id", name))
        framed = {**scope, "orders.headers": headers}
        # The server leaves the body out: RFC 9110, section 9.3.2.
        framed["method"] = scope["method"].replace("HEAD", "GET")
        framed["path"] = f"{bare}/" if bare in WITH_SLASH else bare or "/"

        async def send_framed(message: Message) -> None:
            """Add the headers that every answer has."""
            if message["type"] == "http.response.start":
                framed["orders.started"] = True
                message["headers"] = [*message.get("headers", ()), *headers]
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
        path = request.scope["path"]
        if path in UNLIMITED or path.startswith(DOCS_ASSETS):
            return None
        if budget := await self._limiter.count(request):
            remaining, reset, limit = budget
            request.scope["orders.headers"] += [  # as slowapi writes them
                (b"x-ratelimit-limit", b"%d" % limit.amount),
                (b"x-ratelimit-remaining", b"%d" % max(0, remaining)),
                (b"x-ratelimit-reset", b"%d" % (time.time() + reset)),
            ]
            if remaining < 0:
                detail = f"More than {limit}: try again in {reset} seconds"
                headers = {"Retry-After": str(reset)}
                return problem(429, detail, "too-many-calls", headers)
        size = dict(request.scope["headers"]).get(b"content-length", b"")
        # A body of unknown size passes here; the routes count it as it comes.
        too_large = size.isdigit() and int(size[:9]) > MAX_BODY
        return problem(413, HINTS[413]) if too_large else None


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
    """Answer a refusal of the framework's."""
    headers = error.headers
    if error.status_code == 405:
        # The framework names the methods of one route; there may be two.
        methods = {
            method
            for route in request.app.routes
            if route.matches(request.scope)[0] is not Match.NONE
            for method in getattr(route, "methods", ())
        } or {"GET"}
        methods |= {"HEAD"} if "GET" in methods else set()
        headers = {"Allow": ", ".join(sorted(methods))}
    detail = HINTS.get(error.status_code, error.detail)
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
    SQLAlchemyError: answer_outage,
}


class Problem(sqlmodel.SQLModel):
    """An error that says what to do (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str | list[dict[str, Any]]


def router(tag: str, *statuses: int, **options: Any) -> APIRouter:
    """Return a router whose routes may answer with these problems."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    said = {"content": {MEDIA_TYPE: schema}}
    options["responses"] = dict.fromkeys(statuses, said)
    options = {"max_body_size": MAX_BODY} | options
    # So that a generated client's methods are called as the functions.
    options["generate_unique_id_function"] = lambda route: route.name
    return APIRouter(tags=[tag], **options)
