"""Wrap every call: its id, its path, its client's budget, and failures.

Each middleware does the one thing that its name says. `add_middlewares`, at
the end, says in which order they wrap the app, and why.
"""

import logging
import math
import random
import re
import time
from collections.abc import Awaitable
from functools import lru_cache
from ipaddress import IPv6Address, ip_network
from typing import Any, NamedTuple, cast

import slowapi
from limits import RateLimitItem, parse_many
from opentelemetry import trace
from slowapi.util import get_remote_address
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orders.cache import RedisCache
from orders.logs import request_id
from orders.problems import MAX_BODY, STATUS_HINTS, problem

DOCS_ASSETS = "/docs-assets/"
UNCOUNTED = {
    *("/", "/favicon.ico", "/health", "/ready", "/openapi.json"),
    *("/redoc", "/docs", "/docs/oauth2-redirect"),
}
TOKEN = "/token/"  # noqa: S105
# Only the paths here are documented with a slash at the end.
WITH_SLASH = {"/orders", "/register", TOKEN.rstrip("/")}
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
MAX_CLIENTS = 4096  # clients; their keys in Redis are remembered

Header = tuple[bytes, bytes]
NOSNIFF: Header = (b"x-content-type-options", b"nosniff")
NO_STORE: Header = (b"cache-control", b"no-store")

logger = logging.getLogger(__name__)


class HttpMiddleware:
    """A middleware for HTTP calls only; anything else goes past it."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap `app`."""
        self.app = app

    def __call__(
        self, scope: Scope, receive: Receive, send: Send
    ) -> Awaitable[None]:
        """Handle a call, or pass on the lifespan, or a websocket."""
        handle = self.handle if scope["type"] == "http" else self.app
        return handle(scope, receive, send)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call; each subclass has its own way."""
        raise NotImplementedError


def find_header(scope: Scope, wanted: bytes) -> bytes:
    """Return the value of a header; empty if it was not sent."""
    # To make a dictionary of all headers takes three times as long.
    for name, value in scope["headers"]:
        if name == wanted:
            return cast(bytes, value)
    return b""


def split_path(scope: Scope) -> tuple[str, str]:
    """Return the root path and the rest, which is the app's own path.

    With `--root-path /shop` uvicorn writes `/shop` in front of every path. As
    in Starlette, a path without it is understood, too.
    """
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and f"{path}/".startswith(f"{root}/"):
        return root, path[len(root) :]
    return "", path


def add_headers(send: Send, *headers: Header) -> Send:
    """Return a `send` that adds headers to the answer."""

    async def send_with_headers(message: Message) -> None:
        """Send a message; the first one carries the headers."""
        if message["type"] == "http.response.start":
            # A new list: several answers may share the old one.
            message["headers"] = [*message.get("headers", ()), *headers]
        await send(message)

    return send_with_headers


# --- Ids and paths ----------------------------------------------------------


class RequestIdMiddleware(HttpMiddleware):
    """Gives every call an id, which its log lines and its answer carry."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Take the client's `X-Request-ID` if it is printable, or make one."""
        value = find_header(scope, b"x-request-id")
        if not REQUEST_ID.fullmatch(value):
            value = b"%032x" % random.getrandbits(128)
        request_id.set(value.decode())
        trace.get_current_span().set_attribute("request.id", value.decode())
        send = add_headers(send, NOSNIFF, (b"x-request-id", value))
        await self.app(scope, receive, send)


class PathMiddleware(HttpMiddleware):
    """Serves a path with or without a slash at its end, and HEAD as GET.

    A redirect to the other form would name the Host header's address, which
    anybody writes. A body that answers a HEAD is dropped by uvicorn.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call in the form that the routes know."""
        root, path = split_path(scope)
        bare = path.rstrip("/")
        known = f"{bare}/" if bare in WITH_SLASH or not bare else bare
        method = scope["method"]
        if path != known or method == "HEAD":
            # A copy: uvicorn reads the method again when it answers.
            method = "GET" if method == "HEAD" else method
            scope = {**scope, "path": root + known, "method": method}
        await self.app(scope, receive, send)


class NoStoreMiddleware(HttpMiddleware):
    """Keeps every answer about a token out of caches (RFC 6749, 5.1)."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call, and forbid to keep the answer if it is a login."""
        if split_path(scope)[1] == TOKEN:
            send = add_headers(send, NO_STORE)
        await self.app(scope, receive, send)


# --- Limits -----------------------------------------------------------------

# Count a call in the window of each limit. Any key without an expiry gets one,
# new or not: without an expiry the key would refuse its client for ever.
COUNT = """
local counted = {}
for i, key in ipairs(KEYS) do
    local calls, left = redis.call('INCR', key), redis.call('TTL', key)
    if left < 0 then redis.call('EXPIRE', key, ARGV[i]) end
    counted[i] = {calls, left < 0 and tonumber(ARGV[i]) or left}
end
return counted
"""


class Limiter(slowapi.Limiter):
    """slowapi's limiter, which no variable of the environment changes.

    `RATELIMIT_STORAGE_URL` would replace its memory by a server, for which
    every call would wait; a wrong value of others would stop the start.
    """

    # slowapi's values have several types.
    def get_app_config(self, key: str, default_value: Any = None) -> Any:
        """Return the default of a setting."""
        return default_value


class Budget(NamedTuple):
    """The calls that a client has left of a limit."""

    remaining: int  # calls; -1 if this call was too many
    reset: int  # seconds until the window ends
    limit: RateLimitItem

    def headers(self) -> list[Header]:
        """Return the headers that slowapi would write."""
        return [
            (b"x-ratelimit-limit", b"%d" % self.limit.amount),
            (b"x-ratelimit-remaining", b"%d" % max(0, self.remaining)),
            (b"x-ratelimit-reset", b"%d" % (time.time() + self.reset)),
        ]


class RateLimiter:
    """Counts the calls of each client in fixed windows.

    All processes count in Redis. While Redis is not trusted, each process
    counts by itself.
    """

    def __init__(self, text: str, redis: RedisCache | None) -> None:
        """Take limits such as `5/minute;100/hour`; empty means no limit."""
        self.limits = parse_many(text) if text else []
        self._windows = [limit.get_expiry() for limit in self.limits]
        self._keys_of = lru_cache(MAX_CLIENTS)(self._make_keys)
        self._redis = redis
        self._memory = Limiter(key_func=get_remote_address).limiter.storage

    async def count(self, request: Request) -> Budget | None:
        """Count a call; return the budget that will be used up first."""
        if not self.limits:
            return None
        keys = self._keys_of(get_remote_address(request))
        counted: list[tuple[int, float]] | None = None
        if self._redis:
            counted = await self._redis.execute(
                "EVAL", COUNT, len(keys), *keys, *self._windows
            )
        if counted is None:
            counted = self._count_in_memory(keys)
        budgets = [
            Budget(
                max(-1, limit.amount - calls), max(1, math.ceil(left)), limit
            )
            for limit, (calls, left) in zip(self.limits, counted, strict=True)
        ]
        return min(budgets, key=lambda b: (b.remaining, -b.reset))

    def _make_keys(self, host: str) -> list[str]:
        """Return under which keys a client is counted."""
        return [limit.key_for(client_of(host)) for limit in self.limits]

    def _count_in_memory(self, keys: list[str]) -> list[tuple[int, float]]:
        """Return the calls in each window, and the seconds to its end."""
        moment = time.time()
        return [
            (
                self._memory.incr(key, window),
                self._memory.get_expiry(key) - moment,
            )
            for key, window in zip(keys, self._windows, strict=True)
        ]


def client_of(address: str) -> str:
    """Return whose budget an address shares: an IPv6 client has a /64."""
    try:
        ip = IPv6Address(address)
    except ValueError:  # IPv4, or a name that a proxy wrote
        return address
    return str(ip.ipv4_mapped or ip_network((ip, 64), strict=False))


class RateLimitMiddleware(HttpMiddleware):
    """Counts every call, and refuses those beyond a client's budget."""

    def __init__(self, app: ASGIApp, limiter: RateLimiter) -> None:
        """Wrap `app`."""
        super().__init__(app)
        self.limiter = limiter

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call, and say what is left of the budget."""
        path = split_path(scope)[1]
        app = self.app
        if path not in UNCOUNTED and not path.startswith(DOCS_ASSETS):
            budget = await self.limiter.count(Request(scope))
            if budget is not None:
                send = add_headers(send, *budget.headers())
                if budget.remaining < 0:
                    app = refuse_call(budget)
        await app(scope, receive, send)


def refuse_call(budget: Budget) -> ASGIApp:
    """Return the answer to a call beyond a budget."""
    return problem(
        429,
        f"More than {budget.limit}: try again in {budget.reset} seconds",
        kind="too-many-calls",
        headers={"Retry-After": str(budget.reset)},
    )


class SizeLimitMiddleware(HttpMiddleware):
    """Refuses a body that says it is too large, before it is read.

    The routes count a body of unknown size while it comes.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call, or 413."""
        size = find_header(scope, b"content-length")
        app = self.app
        # Python reads no number of thousands of digits.
        if size.isdigit() and (len(size) > 18 or int(size) > MAX_BODY):
            app = problem(413, STATUS_HINTS[413])
        await app(scope, receive, send)


# --- Failures ---------------------------------------------------------------


class ErrorMiddleware(HttpMiddleware):
    """Answers a failure of the service, and logs it.

    Starlette would do so outside of all middlewares, and a browser could not
    read the answer.
    """

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call, or 500."""
        has_begun = False

        async def send_and_note(message: Message) -> None:
            """Send a message, and note that the answer has begun."""
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception:
            if has_begun:
                raise  # uvicorn closes the connection
            logger.exception("The service failed")
            detail = "The service failed: it was logged, please report it"
            await problem(500, detail)(scope, receive, send)


def add_middlewares(
    app: Starlette, limiter: RateLimiter, origins: str
) -> None:
    """Wrap an app; `origins` are the web sites whose pages may call it."""
    # The middleware that is added last is the outermost: it sees a call first.
    app.add_middleware(SizeLimitMiddleware)
    app.add_middleware(ErrorMiddleware)
    # Outside of ErrorMiddleware: a 500 is counted, and says what is left.
    app.add_middleware(RateLimitMiddleware, limiter)
    # Around refusals: a browser hides an answer that lacks CORS's headers.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins.replace(",", " ").split(),
        allow_methods=["GET", "HEAD", "POST", "PATCH"],
        allow_headers=["*"],
        expose_headers=["*"],
    )
    app.add_middleware(NoStoreMiddleware)
    app.add_middleware(PathMiddleware)
    app.add_middleware(RequestIdMiddleware)
