"""The HTTP API: the routes, and the app in which everything is wired.

Routes translate between HTTP and the use cases; they hold no SQL.
"""

import asyncio
import gc
import logging
import multiprocessing
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial
from importlib.metadata import version
from typing import Annotated, Any, NamedTuple, cast
from uuid import UUID

from fastapi import Depends, FastAPI, Header, Path, Query, Request
from fastapi.responses import RedirectResponse, Response
from fastapi.security import OAuth2PasswordBearer, OAuth2PasswordRequestForm
from fastapi_offline import FastAPIOffline

from orders import auth, db, http, models
from orders.broker import Publisher
from orders.cache import MemoryCache, OrderView, RedisCache
from orders.events import Destination, Keeper, Relay
from orders.logs import PROBES, configure_logging
from orders.models import OrderPublic, OrderStatus
from orders.service import LocalWorker, OrderService
from orders.settings import Settings, load_settings

STOP_TIMEOUT = 1.5  # seconds that the relay gets to finish
READY_TIMEOUT = 1  # seconds that /ready waits for the database
FORM = 1  # of OrderPublic; another form, another ETag

logger = logging.getLogger(__name__)


class Parts:
    """What an app is made of; nothing connects before it runs."""

    def __init__(self, settings: Settings) -> None:
        """Choose each part by its URL."""
        url, redis = settings.database_url, settings.redis_url
        engine = db.create_sync_engine(url, db.WORKER_DEADLINE)
        worker: Destination = LocalWorker(engine)
        if settings.rabbitmq_url:
            worker = Publisher(settings.rabbitmq_url)
        self.settings = settings
        self.database = db.Database(url)
        shared = RedisCache(redis) if redis else None
        self.cache = shared or MemoryCache()
        self.limiter = http.RateLimiter(settings.rate_limit, shared)
        self.accounts = auth.Accounts(self.database, settings)
        self.orders = OrderService(self.database, self.cache)
        self.relay = Relay(engine, worker, self.database.outage)


class Caller(NamedTuple):
    """Who calls, and what they can do."""

    id: int
    orders: OrderService


def parts_of(request: Request) -> Parts:
    """Return the parts of the app that was called."""
    return cast(Parts, request.state.parts)


class OwnBearer(OAuth2PasswordBearer):
    """The framework's bearer: one dependency a call, where two cost more."""

    async def __call__(  # type: ignore[override]  # it knows more than a text
        self, request: Request
    ) -> Caller:
        """Return the user whose token was sent."""
        parts, token = parts_of(request), await super().__call__(request)
        return Caller(parts.accounts.verify(token), parts.orders)


caller_of = OwnBearer("token/", "OAuth2PasswordBearer", auto_error=False)
CallerDep = Annotated[Caller, Depends(caller_of)]
FormDep = Annotated[OAuth2PasswordRequestForm, Depends()]
OrderId = Annotated[UUID, Path(description="From the answer that made it")]
UserId = Annotated[int, Path(description="Your own, from logging in")]
Limit = Annotated[int, Query(ge=1, le=100, description="Orders on a page")]
Cursor = Query(description="The id of the last page's last order")
Status = Query(description="Only orders in this status")
IfMatch = Header(alias="If-Match", description="Change only this version")
IfNoneMatch = Header(alias="If-None-Match", description="304 to this version")
IdempotencyKey = Header(
    alias="Idempotency-Key",
    min_length=1,
    max_length=255,
    pattern=r"^[\x21-\x7e]+$",
    description="Repeat a create with the same key, and it is made once; keys"
    " never expire",
)
users = http.router(400, 401, 409, 413, 422, 429, 503, tags=["users"])
own = http.router(*http.PROBLEMS, prefix="/orders", tags=["orders"])
probes = http.router(tags=["service"])


@users.post("/register/", status_code=201, response_description="The new user")
async def register(
    draft: auth.UserCreate, request: Request
) -> auth.UserPublic:
    """Register a user."""
    return await parts_of(request).accounts.register(draft)


@users.post("/token/", response_description="A token")
async def login(
    form: FormDep, request: Request, response: Response
) -> auth.Token:
    """Log in with the OAuth2 password flow; the username is the e-mail."""
    response.headers.update(auth.NO_STORE)
    accounts = parts_of(request).accounts
    return await accounts.log_in(form.username, form.password)


@own.post(
    "/",
    status_code=201,
    response_model=OrderPublic,
    response_description="The order, new or made before with the same key",
)
async def create_order(
    draft: models.OrderCreate,
    caller: CallerDep,
    key: Annotated[str | None, IdempotencyKey] = None,
) -> Response:
    """Create an order; it is processed about two seconds later."""
    made = await caller.orders.create(caller.id, draft, key=key)
    order_id, view, replayed = made
    headers = {"Location": f"/orders/{order_id}"}
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    return answer_order(view, 201, headers)


@own.get(
    "/{order_id}",
    response_model=OrderPublic,
    response_description="The order",
    responses={304: {"description": "The order is as the client knows it"}},
)
async def get_order(
    order_id: OrderId,
    caller: CallerDep,
    known: Annotated[str | None, IfNoneMatch] = None,
) -> Response:
    """Read an order, from the cache when it can."""
    view, hit = await caller.orders.get(caller.id, order_id)
    tags = (known or "").replace("W/", "")  # a weak comparison
    status = 304 if view.status in statuses_in(tags) else 200
    return answer_order(view, status, {"X-Cache": "hit" if hit else "miss"})


@own.patch(
    "/{order_id}",
    response_model=OrderPublic,
    response_description="The order in its new status",
)
async def change_order_status(
    order_id: OrderId,
    change: models.StatusChange,
    caller: CallerDep,
    expected: Annotated[str | None, IfMatch] = None,
) -> Response:
    """Move an order on to its next status."""
    statuses = None if expected is None else statuses_in(expected)
    view = await caller.orders.change_status(
        caller.id, order_id, change.status, expected=statuses
    )
    return answer_order(view, 200, {})


@own.get(
    "/user/{user_id}",
    response_model=list[OrderPublic],
    response_description="A page of orders",
)
async def list_orders(
    user_id: UserId,
    caller: CallerDep,
    request: Request,
    limit: Limit = 100,
    cursor: Annotated[UUID | None, Cursor] = None,
    status: Annotated[OrderStatus | None, Status] = None,
) -> Response:
    """List your own orders, newest first."""
    views, last = await caller.orders.list_page(
        caller.id, user_id, limit=limit, after=cursor, status=status
    )
    headers = {}
    if last is not None:
        url = request.url.include_query_params(cursor=last)
        headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
    body = b"[" + b",".join(view.body for view in views) + b"]"
    return Response(body, media_type="application/json", headers=headers)


@own.get(
    "/{order_id}/events",
    response_model=list[models.EventPublic],
    response_description="The events",
)
async def list_order_events(order_id: OrderId, caller: CallerDep) -> Any:
    """List what happened to an order, oldest first."""
    return await caller.orders.history(caller.id, order_id)


@probes.get("/health", response_description="The process lives")
async def get_health() -> dict[str, str]:
    """Answer while the process lives; no dependency is asked."""
    return {"status": "ok"}


@probes.get(
    "/ready",
    response_description="Orders are taken; ok, or degraded",
    responses={503: {"description": "The database is away"}},
)
async def get_readiness(
    request: Request, response: Response
) -> dict[str, str]:
    """Say what the service can do now; 503 without its database."""
    parts = parts_of(request)
    cache, relay = parts.cache, parts.relay
    ping = asyncio.ensure_future(parts.database.ping())
    # Not wait_for: to cancel a query of a hung database takes its time too.
    await asyncio.wait({ping}, timeout=READY_TIMEOUT)
    ping.add_done_callback(lambda t: t.cancelled() or t.exception())
    away = not ping.done() or ping.exception() is not None
    response.status_code = 503 if away else 200
    trust = "trusted" if cache.trusted else "untrusted"
    broker = "ok" if relay.answers else "unavailable"
    well = "ok" if cache.trusted and relay.answers else "degraded"
    return {
        "status": "unavailable" if away else well,
        "database": "unavailable" if away else "ok",
        "cache": trust if parts.settings.redis_url else "embedded",
        "broker": broker if parts.settings.rabbitmq_url else "embedded",
    }


def answer_order(view: OrderView, status: int, headers: Any) -> Response:
    """Return an order's bytes as they are; none with a 304."""
    headers["ETag"] = etag_of(view.status)
    headers["Cache-Control"] = "private, no-cache"
    if status == 304:
        return Response(None, status, headers)
    return Response(view.body, status, headers, "application/json")


def etag_of(status: str) -> str:
    """Return the validator of an order in a status; RFC 9110, 8.8.3."""
    return f'"{status}.{FORM}"'


def statuses_in(header: str) -> set[OrderStatus]:
    """Return the statuses whose tags a header names; a strong comparison."""
    if header.strip() == "*":
        return set(OrderStatus)
    tags = {tag.strip() for tag in header.split(",")}
    return {status for status in OrderStatus if etag_of(status) in tags}


DESCRIPTION = """\
Register, log in, and send the token as `Authorization: Bearer …`.

A client's limit is {limit}; start the service with an empty `RATE_LIMIT=` to
lift it while you try.

Errors are problems (RFC 9457) whose `type` ends in their kind:

| kind | status | what to do |
|---|---|---|
{kinds}
"""
TAGS = {
    "users": "Register, and log in.",
    "orders": "Create and read your orders, and move them along"
    " PENDING → PAID → SHIPPED / CANCELED.",
    "service": "See how the service is.",
}


@asynccontextmanager
async def running(parts: Parts) -> AsyncIterator[dict[str, Any]]:
    """Run what brings events on, and take all down again."""
    parts.relay.start()
    keeper = asyncio.create_task(Keeper(parts.database, parts.cache).run())
    gc.freeze()  # search no garbage in what stays, nor after each call
    gc.set_threshold(10_000, 20, 50)
    yield {"parts": parts}
    keeper.cancel()
    await asyncio.to_thread(parts.relay.end, STOP_TIMEOUT)
    parts.accounts.close()
    await parts.cache.close()
    await parts.database.close()


def create_app(settings: Settings) -> FastAPI:
    """Return the app for these settings."""
    parts = Parts(settings)
    refusals = models.REFUSALS.items()
    kinds = "\n".join(f"| {kind} | {s} | {t} |" for kind, (s, t) in refusals)
    limit = settings.rate_limit or "off"
    app = FastAPIOffline(
        static_url=http.DOCS_ASSETS,
        title="Orders",
        summary="Take, keep and process orders.",
        description=DESCRIPTION.format(limit=limit, kinds=kinds),
        version=version("orders"),
        contact={"name": "The maintainers of orders"},
        license_info={"name": "MIT", "identifier": "MIT"},
        openapi_tags=[{"name": n, "description": TAGS[n]} for n in TAGS],
        lifespan=lambda _: running(parts),
        exception_handlers=http.HANDLERS,
        redirect_slashes=False,
        # Not include_router: an included one matches each path twice.
        routes=[*own.routes, *users.routes, *probes.routes],
        telemetry={"exclude": lambda scope: scope.get("path") in PROBES},
    )
    for path in http.REDIRECTS:
        app.add_route(
            path, lambda r: RedirectResponse(http.REDIRECTS[r.scope["path"]])
        )
    origins = settings.cors_origins
    app.add_middleware(http.Frame, limiter=parts.limiter, origins=origins)
    complete = cache(partial(http.complete, app.openapi))
    app.openapi = complete  # type: ignore[method-assign]  # as documented
    # uvicorn numbers its processes, and each makes an app: said once.
    second = multiprocessing.current_process().name == "SpawnProcess-2"
    if second and not settings.redis_url:
        logger.warning(
            "Without REDIS_URL each process caches and counts alone"
        )
    if settings.forwarded_allow_ips == "*":
        logger.warning("FORWARDED_ALLOW_IPS=*: a client can pretend to be any")
    return app


# Not in the lifespan: uvicorn logs before it.
loaded = load_settings()
configure_logging(loaded.log_format)
app = create_app(loaded)
