"""The HTTP API: the routes, and the app in which everything is wired.

Routes translate between HTTP and the use cases; they hold no SQL. Every error
is JSON with a `detail`, and none repeats what the client sent.
"""

import asyncio
import gc
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Query, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from fastapi.security import OAuth2PasswordRequestForm
from fastapi_offline import FastAPIOffline

from orders import auth
from orders.auth import current_user
from orders.cache import (
    READ_TIMEOUT,
    WRITE_TIMEOUT,
    RedisLink,
    connect_cache,
)
from orders.db import Database
from orders.events import (
    CacheSink,
    DueEvent,
    LocalPublisher,
    Publisher,
    Relay,
)
from orders.logs import configure_logging, request_id
from orders.middleware import (
    DOCS_ASSETS,
    MAX_BODY,
    LimitsMiddleware,
    RateLimiter,
    RequestIdMiddleware,
)
from orders.models import (
    Event,
    EventPublic,
    Health,
    OrderCreate,
    OrderPublic,
    OrderStatus,
    OrderView,
    Readiness,
    StatusChange,
    Token,
    UserCreate,
    UserPublic,
)
from orders.problems import HANDLERS, answer, problems
from orders.rabbitmq import RabbitPublisher
from orders.service import OrderService, process_order
from orders.settings import Settings, load_settings

STOP_TIMEOUT = 1.5  # seconds that the relays get to finish
READY_TIMEOUT = 1  # seconds that /ready waits for a dependency

logger = logging.getLogger(__name__)


# --- Routes -----------------------------------------------------------------


def _orders(request: Request) -> OrderService:
    return request.app.state.orders


CurrentUser = Annotated[int, Depends(current_user)]
OrderId = Annotated[UUID, Path(description="From the answer that made it")]
IfMatch = Annotated[
    str | None,
    Header(
        alias="If-Match", description="Change only an order with this ETag"
    ),
]
IfNoneMatch = Annotated[
    str | None,
    Header(
        alias="If-None-Match",
        description="Answer 304 to an order with this ETag",
    ),
]
IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="Repeat a create with the same key, and it is made once",
    ),
]

ETAG = {"ETag": "The order's status, quoted: it is its version"}
X_CACHE = {"X-Cache": "hit or miss"}

# So that the methods of a generated client are called as the functions here.
NAMES: Any = {"generate_unique_id_function": lambda route: route.name}

users = APIRouter(tags=["users"], **NAMES)
orders = APIRouter(prefix="/orders", tags=["orders"], **NAMES)
service = APIRouter(tags=["service"], **NAMES)


@users.post(
    "/register/",
    status_code=201,
    responses={201: answer("The new user"), **problems(400, 409, 413)},
    max_body_size=MAX_BODY,
)
async def register(draft: UserCreate, request: Request) -> UserPublic:
    """Register a user."""
    return await auth.register(request.app.state.database, draft)


@users.post(
    "/token/",
    responses={200: answer("A token"), **problems(400, 401, 413)},
    max_body_size=MAX_BODY,
)
async def login(
    form: Annotated[OAuth2PasswordRequestForm, Depends()], request: Request
) -> Token:
    """Log in with the OAuth2 password flow; the username is the e-mail."""
    state = request.app.state
    user_id = await auth.authenticate(
        state.database, form.username, form.password
    )
    return auth.issue_token(state.settings, user_id)


@orders.post(
    "/",
    status_code=201,
    response_model=OrderPublic,
    responses={
        201: answer(
            "The order, new or made before with the same key",
            {
                "Location": "The order's address",
                "Idempotency-Replayed": "true, if it was made before",
                **ETAG,
            },
        ),
        **problems(400, 401, 413),
    },
    max_body_size=MAX_BODY,
)
async def create_order(
    draft: OrderCreate,
    user_id: CurrentUser,
    request: Request,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Create an order; it is processed about two seconds later."""
    order_id, view, replayed = await _orders(request).create(
        user_id, draft, key=idempotency_key
    )
    headers = {"Location": f"/orders/{order_id}"}
    if replayed:
        headers["Idempotency-Replayed"] = "true"
    return _answer(view, 201, headers)


@orders.get(
    "/{order_id}",
    response_model=OrderPublic,
    responses={
        200: answer("The order", X_CACHE | ETAG),
        304: answer("The order is as the client knows it", X_CACHE | ETAG),
        **problems(401, 404),
    },
)
async def get_order(
    order_id: OrderId,
    user_id: CurrentUser,
    request: Request,
    if_none_match: IfNoneMatch = None,
) -> Response:
    """Read an order, from the cache when it can."""
    view, hit = await _orders(request).get(user_id, order_id)
    headers = {"X-Cache": "hit" if hit else "miss"}
    known = _statuses(if_none_match)
    if known is not None and view.status in known:
        return Response(status_code=304, headers=headers | _etag(view))
    return _answer(view, 200, headers)


@orders.patch(
    "/{order_id}",
    response_model=OrderPublic,
    responses={
        200: answer("The order in its new status", ETAG),
        **problems(400, 401, 404, 409, 412, 413),
    },
    max_body_size=MAX_BODY,
)
async def change_order_status(
    order_id: OrderId,
    change: StatusChange,
    user_id: CurrentUser,
    request: Request,
    if_match: IfMatch = None,
) -> Response:
    """Move an order on to its next status."""
    view = await _orders(request).change_status(
        user_id, order_id, change.status, expected=_statuses(if_match)
    )
    return _answer(view)


@orders.get(
    "/user/{user_id}",
    response_model=list[OrderPublic],
    responses={
        200: answer(
            "A page of orders",
            {"Link": 'The next page, as rel="next"; absent on the last'},
        ),
        **problems(401, 403),
    },
)
async def list_orders(
    of_user: Annotated[
        int, Path(alias="user_id", description="Your own, from registering")
    ],
    user_id: CurrentUser,
    request: Request,
    limit: Annotated[
        int, Query(ge=1, le=500, description="Orders on a page")
    ] = 100,
    cursor: Annotated[
        str | None, Query(max_length=200, description="From a Link header")
    ] = None,
    status: Annotated[
        OrderStatus | None, Query(description="Only orders in this status")
    ] = None,
) -> Response:
    """List your own orders, newest first."""
    page = await _orders(request).list_page(
        user_id, of_user, limit=limit, cursor=cursor, status=status
    )
    headers = {}
    if page.next_cursor:
        url = request.url.include_query_params(cursor=page.next_cursor)
        headers["Link"] = f'<{url}>; rel="next"'
    body = b"[" + b",".join(view.body for view in page.orders) + b"]"
    return Response(body, media_type="application/json", headers=headers)


@orders.get(
    "/{order_id}/events",
    response_model=list[EventPublic],
    responses={200: answer("The events"), **problems(401, 404)},
)
async def list_order_events(
    order_id: OrderId, user_id: CurrentUser, request: Request
) -> list[Event]:
    """List what happened to an order, oldest first."""
    return await _orders(request).history(user_id, order_id)


@service.get("/health", responses={200: answer("The process lives")})
async def get_health() -> Health:
    """Answer while the process lives; no dependency is asked."""
    return Health()


@service.get(
    "/ready",
    responses={
        200: answer("Orders are taken; ok, or degraded"),
        503: {"model": Readiness, **answer("The database is away")},
    },
)
async def get_readiness(request: Request, response: Response) -> Readiness:
    """Say what the service can do now; 503 without its database."""
    state = request.app.state
    database, cache, broker = await asyncio.gather(
        _answers(state.database.ping()),
        _answers(state.cache.ping()),
        _answers(state.publisher.ping()),
    )
    if not database:
        response.status_code = 503
    overall = "ok" if cache and broker else "degraded"
    return Readiness(
        status=overall if database else "unavailable",
        database=_condition(database),
        cache=_condition(cache, embedded=not state.settings.redis_url),
        broker=_condition(broker, embedded=not state.settings.rabbitmq_url),
    )


def _answer(
    view: OrderView, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return an order's bytes as they are."""
    return Response(
        view.body,
        status,
        (headers or {}) | _etag(view),
        media_type="application/json",
    )


def _etag(view: OrderView) -> dict[str, str]:
    return {"ETag": f'"{view.status}"'}


def _statuses(header: str | None) -> set[str] | None:
    """Return the statuses that an (If-Match) header names; RFC 9110, 13.1."""
    if header is None:
        return None
    if header.strip() == "*":
        return set(OrderStatus)
    tags = (tag.strip().removeprefix("W/") for tag in header.split(","))
    return {tag.strip('"') for tag in tags}


async def _answers(ping: Any) -> bool:
    """Return whether a dependency answers its ping in time."""
    task = asyncio.ensure_future(ping)
    # Not wait_for: to cancel a query of a hung database takes its time too.
    done, _ = await asyncio.wait({task}, timeout=READY_TIMEOUT)
    if not done:
        task.cancel()
        task.add_done_callback(lambda t: t.cancelled() or t.exception())
        return False
    return task.exception() is None and task.result() is not False


def _condition(answers: bool, *, embedded: bool = False) -> str:
    if embedded:
        return "embedded"
    return "ok" if answers else "unavailable"


# --- The app ----------------------------------------------------------------

DESCRIPTION = """\
Register, log in, and send the token as `Authorization: Bearer …`.

Errors are JSON with a `detail` that says what to do. Every call takes an
`X-Request-ID` of yours, or makes one: name it when you report a problem.
"""
TAGS = [
    {"name": "users", "description": "Register, and log in."},
    {
        "name": "orders",
        "description": "Create and read your orders, and move them along"
        " PENDING → PAID → SHIPPED / CANCELED.",
    },
    {"name": "service", "description": "See how the service is."},
]
EXPOSED_HEADERS = (
    "ETag",
    "Idempotency-Replayed",
    "Link",
    "Location",
    "Retry-After",
    "X-Cache",
    "X-Request-ID",
)  # what a browser shows to a page of another origin


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Wire the parts together, run the relays, and take all down again."""
    settings: Settings = app.state.settings
    async with AsyncExitStack() as stack:
        database = Database(settings.database_url)
        stack.push_async_callback(database.close)
        reads = writes = None
        if settings.redis_url:
            reads = RedisLink(settings.redis_url, timeout=READ_TIMEOUT)
            writes = RedisLink(settings.redis_url, timeout=WRITE_TIMEOUT)
            stack.push_async_callback(reads.close)
            stack.push_async_callback(writes.close)
        cache = connect_cache(reads, writes)
        publisher = connect_publisher(settings.rabbitmq_url, database)
        relays = {
            sink.kind: Relay(database, sink)
            for sink in (publisher, CacheSink(database, cache))
        }
        app.state.database = database
        app.state.cache = cache
        app.state.publisher = publisher
        app.state.limiter = RateLimiter(settings.rate_limit, reads)
        app.state.orders = OrderService(
            database, cache, {kind: r.wake for kind, r in relays.items()}
        )
        await stack.enter_async_context(
            _running(publisher.run(), *(r.run() for r in relays.values()))
        )
        gc.freeze()  # what is here now stays: do not search it for garbage
        yield


@asynccontextmanager
async def _running(*loops: Any) -> AsyncIterator[None]:
    """Run the loops in the background, and cancel them at the end."""
    tasks = [asyncio.create_task(loop) for loop in loops]
    for task in tasks:
        task.add_done_callback(_report_death)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=STOP_TIMEOUT)


def _report_death(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.critical("A relay died", exc_info=task.exception())


def connect_publisher(url: str | None, database: Database) -> Publisher:
    """Return the sink of new orders: RabbitMQ, or this very process."""

    async def process(event: DueEvent) -> None:
        request_id.set(event.payload.get("request_id", "-"))
        async with database.autocommit.connect() as connection:
            await connection.run_sync(process_order, event.id)

    return RabbitPublisher(url) if url else LocalPublisher(process)


def create_app(settings: Settings) -> FastAPI:
    """Return the app for these settings; nothing connects before it runs."""
    app = FastAPIOffline(
        static_url=DOCS_ASSETS,
        title="Orders",
        summary="Take, keep and process orders.",
        description=DESCRIPTION,
        openapi_tags=TAGS,
        version="0.1.0",
        lifespan=lifespan,
    )
    app.state.settings = settings
    # Not by include_router, which would match the path of each call twice.
    app.router.routes[:0] = orders.routes + users.routes + service.routes
    for error, handler in HANDLERS.items():
        app.add_exception_handler(error, handler)
    # The last one added is the first to see a call.
    app.add_middleware(LimitsMiddleware)
    app.add_middleware(
        CORSMiddleware,
        allow_origins=settings.cors_origins,
        allow_methods=["GET", "POST", "PATCH"],
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
    )
    app.add_middleware(RequestIdMiddleware)
    return app


# Not in the lifespan: uvicorn logs before it.
configure_logging()
app = create_app(load_settings())
