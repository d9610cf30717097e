"""The HTTP API: the routes of orders, and the app, where all is wired.

Routes translate between HTTP and the use cases; they hold no SQL.
"""

import asyncio
import gc
import logging
import multiprocessing
import re
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any, cast
from uuid import UUID

from fastapi import Depends, FastAPI, Header, Path, Query, Request
from fastapi.responses import RedirectResponse, Response
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from starlette.routing import Route

from orders import auth, db, middleware
from orders.auth import UserId, current_user
from orders.broker import Publisher
from orders.cache import MemoryCache, NoCache, OrderView, RedisCache
from orders.events import Keeper, Relay
from orders.logs import PROBES, configure_logging
from orders.models import (
    EventPublic,
    OrderCreate,
    OrderPublic,
    OrderStatus,
    StatusChange,
    etag_of,
    statuses_in,
)
from orders.problems import (
    ANSWERS,
    TAGS,
    Problem,
    describe,
    new_router,
    with_headers,
)
from orders.service import OrderService, Readiness, check_readiness
from orders.settings import Settings, load_settings

END_TIMEOUT = 1.5  # seconds that the relay, and the keeper, get to finish
CANONICAL_ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

logger = logging.getLogger(__name__)

# --- Services ---------------------------------------------------------------


class Services:
    """What an app is made of; nothing connects before the app runs."""

    def __init__(self, settings: Settings) -> None:
        """Choose each part by its URL."""
        self.database = db.Database(settings.database_url)
        redis = RedisCache(settings.redis_url) if settings.redis_url else None
        # With `WEB_CONCURRENCY` the processes are children of a process that
        # manages them.
        is_alone = multiprocessing.parent_process() is None
        self.cache = redis or (MemoryCache() if is_alone else NoCache())
        if not redis and not is_alone:
            logger.warning(
                "Without REDIS_URL, a process that another one started has"
                " no cache, and counts calls by itself"
            )
        if not settings.staff:
            logger.info(
                "Anyone may mark their own order paid: no STAFF_USER_IDS"
            )
        self.limiter = middleware.RateLimiter(settings.rate_limit, redis)
        self.accounts = auth.Accounts(self.database, settings)
        self.orders = OrderService(self.database, self.cache, settings.staff)
        engine = db.create_sync_engine(
            settings.database_url, db.WORKER_DEADLINE
        )
        url = settings.rabbitmq_url
        publisher = Publisher(url) if url else None
        self.relay = Relay(engine, publisher, self.database.outage)


async def get_services(request: Request) -> Services:
    """Return the services of the app that was called."""
    return cast(Services, request.state.services)


ServicesDep = Annotated[Services, Depends(get_services)]
OrderId = Annotated[UUID, Path(description="From the answer that made it")]
OwnUserId = Annotated[int, Path(description="Your own; any, for staff")]
PageSize = Annotated[int, Query(ge=1, le=100, description="Orders on a page")]
CURSOR = Query(description="The id of the last page's last order")
IN_STATUS = Query(description="Only orders in this status")
IF_MATCH = Header(alias="If-Match", description="Change only this version")
IF_NONE_MATCH = Header(
    alias="If-None-Match", description="304 if this is still the version"
)
IDEMPOTENCY_KEY = Header(
    alias="Idempotency-Key",
    pattern=r"^[\x21-\x7e]{1,255}$",
    description="A create sent again is made once, while its order is kept",
)

# --- Routes -----------------------------------------------------------------

ORDER_ERRORS = (400, 401, 403, 404, 409, 412, 413, 422, 429, 503)
orders_router = new_router("orders", *ORDER_ERRORS, prefix="/orders")
probes_router = new_router("service")

# What answers a call, as FastAPI types it.
Handle = Callable[[Request], Coroutine[Any, Any, Response]]


class CachedReadRoute(APIRoute):
    """The route of the one call that the cache makes fast.

    FastAPI describes it. But FastAPI spends more time on finding parameters
    than all the rest takes, so that this route finds those of `get_order`.
    """

    def get_route_handler(self) -> Handle:
        """Return what answers a call."""
        handle_by_fastapi = super().get_route_handler()

        async def handle(request: Request) -> Response:
            """Call the endpoint with the arguments that FastAPI would give."""
            order_id = request.path_params["order_id"]
            if not CANONICAL_ID.fullmatch(order_id):
                return await handle_by_fastapi(request)
            response: Response = await self.endpoint(
                order_id=UUID(order_id),
                user_id=await current_user(request),
                services=await get_services(request),
                if_none_match=request.headers.get("If-None-Match"),
            )
            return response

        return handle


cached_router = new_router(
    "orders", *ORDER_ERRORS, prefix="/orders", route_class=CachedReadRoute
)


@orders_router.post(
    "/",
    status_code=201,
    response_model=OrderPublic,
    responses={201: with_headers("Location", "ETag", "Idempotency-Replayed")},
)
async def create_order(
    draft: OrderCreate,
    user_id: UserId,
    services: ServicesDep,
    request: Request,
    idempotency_key: Annotated[str | None, IDEMPOTENCY_KEY] = None,
) -> Response:
    """Create an order; it is processed about two seconds later."""
    order_id, view, is_replay = await services.orders.create(
        user_id, draft, key=idempotency_key
    )
    root_path = request.scope.get("root_path", "")
    headers = {"Location": f"{root_path}/orders/{order_id}"}
    if is_replay:
        headers["Idempotency-Replayed"] = "true"
    return answer_order(view, 201, headers)


@cached_router.get(
    "/{order_id}",
    response_model=OrderPublic,
    responses=dict.fromkeys((200, 304), with_headers("ETag", "X-Cache")),
)
async def get_order(
    order_id: OrderId,
    user_id: UserId,
    services: ServicesDep,
    if_none_match: Annotated[str | None, IF_NONE_MATCH] = None,
) -> Response:
    """Read an order, from the cache if it is there."""
    view, is_hit = await services.orders.get(user_id, order_id)
    headers = {"X-Cache": "hit" if is_hit else "miss"}
    if if_none_match is not None:
        # RFC 9110, section 13.1.2: the comparison is weak.
        known = statuses_in(if_none_match.replace("W/", ""))
        if view.status in known:
            return answer_order(view, 304, headers)
    return answer_order(view, 200, headers)


@orders_router.patch(
    "/{order_id}",
    response_model=OrderPublic,
    responses={200: with_headers("ETag")},
)
async def change_order_status(
    order_id: OrderId,
    change: StatusChange,
    user_id: UserId,
    services: ServicesDep,
    if_match: Annotated[str, IF_MATCH] = "*",
) -> Response:
    """Move an order on; a shop may let only its staff mark it paid."""
    view = await services.orders.change_status(
        user_id, order_id, change.status, expected=statuses_in(if_match)
    )
    return answer_order(view, 200, {})


@orders_router.get("/user/{user_id}", responses={200: with_headers("Link")})
async def list_orders(
    user_id: OwnUserId,
    caller_id: UserId,
    services: ServicesDep,
    request: Request,
    response: Response,
    limit: PageSize = 100,
    cursor: Annotated[UUID | None, CURSOR] = None,
    status: Annotated[OrderStatus | None, IN_STATUS] = None,
) -> list[OrderPublic]:
    """List your own orders, newest first."""
    services.orders.require_access(user_id, caller_id, "forbidden")
    orders, last_id = await services.orders.list_page(
        user_id, limit=limit, after=cursor, status=status
    )
    if last_id is not None:
        # Without the Host header, which anybody writes.
        url = request.url.include_query_params(cursor=last_id)
        response.headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
    return orders


@orders_router.get("/{order_id}/events")
async def list_order_events(
    order_id: OrderId, user_id: UserId, services: ServicesDep
) -> Sequence[EventPublic]:
    """List what happened to an order, oldest first."""
    return await services.orders.history(user_id, order_id)


def answer_order(
    view: OrderView, status: int, headers: dict[str, str]
) -> Response:
    """Return an order's bytes as they are; none with a 304."""
    headers["ETag"] = etag_of(view.status)
    headers["Cache-Control"] = "private, no-cache"
    if status == 304:
        return Response(None, status, headers)
    return Response(view.body, status, headers, "application/json")


# --- Probes -----------------------------------------------------------------


@probes_router.get("/health")
async def get_health() -> dict[str, str]:
    """Answer while the process lives; no dependency is asked."""
    return {"status": "ok"}


@probes_router.get(
    "/ready", responses={503: {"model": Readiness, "description": "Not ready"}}
)
async def get_readiness(
    services: ServicesDep, response: Response
) -> Readiness:
    """Say what the service can do now; 503 without its database."""
    readiness = await check_readiness(
        services.database, services.cache, services.relay
    )
    if readiness.status == "unavailable":
        response.status_code = 503
    return readiness


# --- The app ----------------------------------------------------------------


@asynccontextmanager
async def running(services: Services) -> AsyncIterator[dict[str, Services]]:
    """Run what brings events on, and take everything down again."""
    # Reference cycles are rare here, and the search for them is slow.
    gc.set_threshold(20_000, 20, 50)
    # Otherwise calls wait for the relay's thread.
    sys.setswitchinterval(0.001)  # seconds
    services.relay.start()
    keeper = Keeper(services.database, services.cache)
    rounds = asyncio.create_task(keeper.run())
    yield {"services": services}
    rounds.cancel()
    if keeper.look is not None:  # its driver needs the event loop
        await asyncio.wait({keeper.look}, timeout=END_TIMEOUT)
    await asyncio.to_thread(services.relay.end, END_TIMEOUT)
    await services.cache.close()
    await services.database.close()


def create_app(settings: Settings) -> FastAPI:
    """Return the app for these settings."""
    services = Services(settings)
    icon = f"{middleware.DOCS_ASSETS}favicon.png".lstrip("/")
    app: FastAPI = FastAPIOffline(
        static_url=middleware.DOCS_ASSETS.rstrip("/"),
        title="Orders",
        summary="Take, keep and process orders.",
        description=describe(settings.rate_limit),
        version=version("orders"),
        contact={"name": "The maintainers of orders"},
        license_info={"name": "MIT", "identifier": "MIT"},
        openapi_tags=TAGS,
        # include_router would match each path twice, and would hide which
        # methods a path has. The most frequent route stands first.
        routes=[
            *cached_router.routes,
            *orders_router.routes,
            *auth.router.routes,
            *probes_router.routes,
            # The targets are relative: a proxy may serve the API below a path.
            Route("/", RedirectResponse("docs"), methods=["GET"]),
            Route("/favicon.ico", RedirectResponse(icon), methods=["GET"]),
        ],
        lifespan=lambda _: running(services),
        exception_handlers=ANSWERS,
        redirect_slashes=False,  # PathMiddleware does it without a redirect
        telemetry={
            "exclude": lambda scope: middleware.split_path(scope)[1] in PROBES
        },
    )
    middleware.add_middlewares(app, services.limiter, settings.cors_origins)
    schema = app.openapi()  # FastAPI keeps it
    schema["components"]["schemas"]["Problem"] = Problem.model_json_schema()
    # In /docs the call that creates stands before the calls that take an id.
    paths = sorted(schema["paths"].items(), key=lambda path: "{" in path[0])
    schema["paths"] = dict(paths)
    if settings.forwarded_allow_ips == "*":
        logger.warning("FORWARDED_ALLOW_IPS=*: a client can pretend to be any")
    return app


# Not in the lifespan: uvicorn logs before it.
loaded_settings = load_settings()
configure_logging(loaded_settings.log_format)
app = create_app(loaded_settings)
