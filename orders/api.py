"""The HTTP API: the routes, and the app in which everything is wired.

Routes translate between HTTP and the use cases; they hold no SQL.
"""

import asyncio
import logging
import multiprocessing
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Any, cast
from uuid import UUID

from fastapi import Depends, FastAPI, Header, Path, Query, Request
from fastapi.responses import RedirectResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import OAuth2PasswordBearer, OAuth2PasswordRequestForm
from fastapi_offline import FastAPIOffline
from starlette.routing import Route

from orders import auth, db, http, models
from orders.broker import Publisher
from orders.cache import MemoryCache, OrderView, RedisCache
from orders.events import Keeper, Relay
from orders.logs import PROBES, configure_logging
from orders.models import Order, OrderStatus
from orders.service import OrderService
from orders.settings import Settings, load_settings

STOP_TIMEOUT = 1.5  # seconds that the relay, and the keeper, get to finish
ID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
FORM = 1  # of Order; another form, another ETag

logger = logging.getLogger(__name__)


class Parts:
    """What an app is made of; nothing connects before it runs."""

    def __init__(self, settings: Settings) -> None:
        """Choose each part by its URL."""
        self.settings = settings
        self.database = db.Database(settings.database_url)
        shared = RedisCache(settings.redis_url) if settings.redis_url else None
        self.cache = shared or MemoryCache()
        self.limiter = http.RateLimiter(settings.rate_limit, shared)
        self.accounts = auth.Accounts(self.database, settings)
        self.orders = OrderService(self.database, self.cache)
        url, broker = settings.database_url, settings.rabbitmq_url
        engine = db.create_sync_engine(url, db.WORKER_DEADLINE)
        publisher = Publisher(broker) if broker else None
        self.relay = Relay(engine, publisher, self.database.outage)


async def parts_of(request: Request) -> Parts:
    """Return the parts of the app that was called."""
    return cast(Parts, request.state.parts)


PartsDep = Annotated[Parts, Depends(parts_of)]
bearer = OAuth2PasswordBearer("token/", auto_error=False)


async def caller_of(
    parts: PartsDep, token: Annotated[str | None, Depends(bearer)]
) -> int:
    """Return the id of the user whose token was sent."""
    return parts.accounts.verify(token)


UserId = Annotated[int, Depends(caller_of)]
FormDep = Annotated[OAuth2PasswordRequestForm, Depends()]
OrderId = Annotated[UUID, Path(description="From the answer that made it")]
IdOfUser = Annotated[int, Path(description="Your own, from logging in")]
Limit = Annotated[int, Query(ge=1, le=100, description="Orders on a page")]
Cursor = Query(description="The id of the last page's last order")
Status = Query(description="Only orders in this status")
IfMatch = Header(alias="If-Match", description="Change only this version")
IfNoneMatch = Header(alias="If-None-Match", description="304 to this version")
IdempotencyKey = Header(
    alias="Idempotency-Key",
    pattern=r"^[\x21-\x7e]{1,255}$",
    description="What is sent again is made once; keys never expire",
)


class QuickRead(APIRoute):
    """The hot route: FastAPI describes it, but would solve it too slowly."""

    def get_route_handler(self) -> Any:
        """Return what answers a call; FastAPI does if its id is unusual."""
        solve = super().get_route_handler()

        async def read(request: Request) -> Any:
            """Call the endpoint with what FastAPI would give it."""
            order_id = request.path_params["order_id"]
            if not ID.fullmatch(order_id):
                return await solve(request)
            parts = await parts_of(request)
            user_id = await caller_of(parts, await bearer(request))
            known = request.headers.get("If-None-Match")
            return await self.endpoint(UUID(order_id), user_id, parts, known)

        return read


users = http.router("users", 400, 401, 409, 413, 422, 429, 503)
every = 400, 401, 403, 404, 409, 412, 413, 422, 429, 503
own = http.router("orders", *every, prefix="/orders")
hot: Any = {"route_class": QuickRead, "max_body_size": None}  # it reads none
quick = http.router("orders", *every, prefix="/orders", **hot)
probes = http.router("service")


@users.post("/register/", status_code=201)
async def register(draft: auth.UserCreate, parts: PartsDep) -> auth.UserPublic:
    """Register a user."""
    return await parts.accounts.register(draft)


@users.post("/token/")
async def login(
    form: FormDep, parts: PartsDep, response: Response
) -> auth.Token:
    """Log in with the OAuth2 password flow; the username is the e-mail."""
    response.headers.update(auth.NO_STORE)
    return await parts.accounts.log_in(form.username, form.password)


@own.post("/", status_code=201, response_model=Order)
async def create_order(
    draft: models.OrderCreate,
    user_id: UserId,
    parts: PartsDep,
    key: Annotated[str | None, IdempotencyKey] = None,
) -> Response:
    """Create an order; it is processed about two seconds later."""
    order_id, view, again = await parts.orders.create(user_id, draft, key=key)
    headers = {"Idempotency-Replayed": "true"} if again else {}
    headers["Location"] = f"/orders/{order_id}"
    return answer_order(view, 201, headers)


@quick.get("/{order_id}", response_model=Order, responses={304: {}})
async def get_order(
    order_id: OrderId,
    user_id: UserId,
    parts: PartsDep,
    known: Annotated[str | None, IfNoneMatch] = None,
) -> Response:
    """Read an order, from the cache when it can."""
    view, hit = await parts.orders.get(user_id, order_id)
    # A weak comparison.
    same = known and view.status in statuses_in(known.replace("W/", ""))
    status = 304 if same else 200
    return answer_order(view, status, {"X-Cache": "hit" if hit else "miss"})


@own.patch("/{order_id}", response_model=Order)
async def change_order_status(
    order_id: OrderId,
    change: models.StatusChange,
    user_id: UserId,
    parts: PartsDep,
    known: Annotated[str, IfMatch] = "*",
) -> Response:
    """Move an order on to its next status."""
    view = await parts.orders.change_status(
        user_id, order_id, change.status, known=statuses_in(known)
    )
    return answer_order(view, 200, {})


@own.get("/user/{user_id}", response_model=list[Order])
async def list_orders(
    user_id: IdOfUser,
    caller_id: UserId,
    parts: PartsDep,
    request: Request,
    limit: Limit = 100,
    cursor: Annotated[UUID | None, Cursor] = None,
    status: Annotated[OrderStatus | None, Status] = None,
) -> Response:
    """List your own orders, newest first."""
    if user_id != caller_id:
        raise models.Refusal("forbidden")
    views, last = await parts.orders.list_page(user_id, limit, cursor, status)
    headers = {}
    if last is not None:
        url = request.url.include_query_params(cursor=last)
        headers["Link"] = f'<{url.path}?{url.query}>; rel="next"'
    body = b"[" + b",".join(view.body for view in views) + b"]"
    return Response(body, media_type="application/json", headers=headers)


@own.get("/{order_id}/events", response_model=list[models.EventPublic])
async def list_order_events(
    order_id: OrderId, user_id: UserId, parts: PartsDep
) -> Any:
    """List what happened to an order, oldest first."""
    return await parts.orders.history(user_id, order_id)


@probes.get("/health")
async def get_health() -> dict[str, str]:
    """Answer while the process lives; no dependency is asked."""
    return {"status": "ok"}


@probes.get("/ready", responses={503: {}})
async def get_readiness(parts: PartsDep, response: Response) -> dict[str, str]:
    """Say what the service can do now; 503 without its database."""
    cache, relay = parts.cache, parts.relay
    ping = asyncio.gather(parts.database.ping(), return_exceptions=True)
    # Not wait_for: to cancel a query of a hung database takes its time too.
    await asyncio.wait({ping}, timeout=1)
    away = not ping.done() or any(ping.result())
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
    headers["ETag"] = f'"{view.status}.{FORM}"'
    headers["Cache-Control"] = "private, no-cache"
    kind = "application/json" if status != 304 else None
    return Response(view.body if kind else None, status, headers, kind)


def statuses_in(header: str) -> set[OrderStatus]:
    """Return the statuses whose tags a header names; a strong comparison."""
    tags = {tag.strip() for tag in header.split(",")}
    return {s for s in OrderStatus if tags & {f'"{s}.{FORM}"', "*"}}


DESCRIPTION = """\
A client's limit is {limit}; start the service with an empty `RATE_LIMIT=` to
lift it while you try.

Errors are problems (RFC 9457) whose `type` ends in their kind:

| kind | status | what to do |
|---|---|---|
{kinds}
"""


@asynccontextmanager
async def running(parts: Parts) -> AsyncIterator[dict[str, Any]]:
    """Run what brings events on, and take all down again."""
    parts.relay.start()
    keeper = Keeper(parts.database, parts.cache)
    rounds = asyncio.create_task(keeper.run())
    yield {"parts": parts}
    rounds.cancel()
    if keeper.look is not None:  # its driver needs the loop
        await asyncio.wait({keeper.look}, timeout=STOP_TIMEOUT)
    await asyncio.to_thread(parts.relay.end, STOP_TIMEOUT)
    await parts.cache.close()
    await parts.database.close()


def create_app(settings: Settings) -> FastAPI:
    """Return the app for these settings."""
    parts = Parts(settings)
    refusals = models.REFUSALS.items()
    kinds = "\n".join(f"| {kind} | {s} | {t} |" for kind, (s, t) in refusals)
    limit = settings.rate_limit or "off"
    icon = f"{http.DOCS_ASSETS}favicon.png"
    app = FastAPIOffline(
        static_url=http.DOCS_ASSETS.rstrip("/"),
        title="Orders",
        summary="Take, keep and process orders.",
        description=DESCRIPTION.format(limit=limit, kinds=kinds),
        version=version("orders"),
        contact={"name": "The maintainers of orders"},
        license_info={"name": "MIT", "identifier": "MIT"},
        lifespan=lambda _: running(parts),
        exception_handlers=http.HANDLERS,
        redirect_slashes=False,
        # Not include_router: an included one matches each path twice.
        routes=[
            *(quick.routes + own.routes + users.routes + probes.routes),
            Route("/", RedirectResponse("/docs"), methods=["GET"]),
            Route("/favicon.ico", RedirectResponse(icon), methods=["GET"]),
        ],
        telemetry={"exclude": lambda scope: scope.get("path") in PROBES},
    )
    app.add_middleware(http.Frame, parts.limiter, settings.cors_origins)
    schemas = app.openapi()["components"]["schemas"]  # which it keeps
    schemas["Problem"] = http.Problem.model_json_schema()
    # uvicorn numbers its processes, and each makes an app: said once.
    second = multiprocessing.current_process().name == "SpawnProcess-2"
    if second and not settings.redis_url:
        logger.warning("Without REDIS_URL each process counts by itself")
    if settings.forwarded_allow_ips == "*":
        logger.warning("FORWARDED_ALLOW_IPS=*: a client can pretend to be any")
    return app


# Not in the lifespan: uvicorn logs before it.
loaded = load_settings()
configure_logging(loaded.log_format)
app = create_app(loaded)
