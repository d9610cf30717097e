"""Wrap every call: give it an id, and hold each client to its budget.

The rate limit is one budget over the whole API, counted for refused calls
too, shared by all processes through Redis; while Redis is away each process
counts in its own memory. The limits' syntax, the client's key and the counter
in memory are slowapi's; the shared counter travels with the cache's calls.
"""

import math
import random
import re
import time
from contextlib import suppress
from typing import NamedTuple

from limits import RateLimitItem, parse_many
from slowapi import Limiter
from slowapi.util import get_remote_address
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orders.cache import CacheAway, RedisLink
from orders.logs import request_id

DOCS_ASSETS = "/docs-assets"
UNLIMITED = ("/health", "/ready", "/docs", "/redoc", "/openapi.json")
MAX_BODY = 64 * 1024  # bytes
TOO_LARGE = f"The body is too large: send at most {MAX_BODY} bytes"
REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIdMiddleware:
    """Take the request's id from its header or make one, and answer it."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self.app = app

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Handle a call with its id in the context, for the log."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        own = given and REQUEST_ID.fullmatch(given)
        name = given if own else f"{random.getrandbits(128):032x}"
        request_id.set(name)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-request-id", name.encode()))
            await send(message)

        return await self.app(scope, receive, send_with_id)


class Excess(NamedTuple):
    """The limit that a call exceeds, and when to try again."""

    limit: RateLimitItem
    retry_after: int  # seconds


class RateLimiter:
    """Count the calls of each client, in fixed windows."""

    def __init__(self, limits: str, redis: RedisLink | None) -> None:
        """Take limits such as `5/minute`, and Redis where there is one."""
        self._limits = parse_many(limits) if limits else []
        self._redis = redis
        self._local = Limiter(key_func=get_remote_address).limiter

    async def exceeded(self, request: Request) -> Excess | None:
        """Count a call; return what it exceeds, if anything."""
        client = get_remote_address(request)
        for limit in self._limits:
            retry_after = await self._hit(limit, client)
            if retry_after is not None:
                return Excess(limit, max(1, retry_after))
        return None

    async def _hit(self, limit: RateLimitItem, client: str) -> int | None:
        """Count a call; return when it may come again if it is too many."""
        if self._redis is not None:
            with suppress(CacheAway):
                return await self._hit_shared(self._redis, limit, client)
        if self._local.hit(limit, client):
            return None
        end, _ = self._local.get_window_stats(limit, client)
        return math.ceil(end - time.time())

    async def _hit_shared(
        self, redis: RedisLink, limit: RateLimitItem, client: str
    ) -> int | None:
        key = limit.key_for(client)
        (count,) = await redis.call(("INCR", key))
        if 1 < count <= limit.amount:
            return None
        # Also at the excess, for a counter whose first call did not get here.
        _, remaining = await redis.call(
            ("EXPIRE", key, limit.get_expiry(), "NX"), ("TTL", key)
        )
        return remaining if count > limit.amount else None


class LimitsMiddleware:
    """Refuse a client that is over its budget, and a body that is too large.

    A body of unknown size passes here; the routes count it as it comes.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self.app = app

    async def __call__(
        self, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """Count the call, then let it through or refuse it."""
        if scope["type"] == "http" and not (
            scope["path"] in UNLIMITED or scope["path"].startswith(DOCS_ASSETS)
        ):
            request = Request(scope)
            limiter: RateLimiter = scope["app"].state.limiter
            excess = await limiter.exceeded(request)
            if excess is not None:
                return await _too_many(excess)(scope, receive, send)
            size = request.headers.get("content-length", "")
            if size.isdecimal() and int(size) > MAX_BODY:
                refusal = JSONResponse({"detail": TOO_LARGE}, status_code=413)
                return await refusal(scope, receive, send)
        return await self.app(scope, receive, send)


def _too_many(excess: Excess) -> JSONResponse:
    return JSONResponse(
        {
            "detail": f"More than {excess.limit}:"
            f" try again in {excess.retry_after} seconds"
        },
        status_code=429,
        headers={"Retry-After": str(excess.retry_after)},
    )
