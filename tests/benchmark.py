"""Measure the service against what bounds it.

    uv run python tests/benchmark.py [--rounds N] [--only WORD] [--plot FILE]

A ratio is taken within one run, its two sides in turn, several times. One API
process has a core to itself; the load, PostgreSQL, Redis and RabbitMQ share
another one. The rate limit is on, counted in Redis and never reached; CORS is
on, tokens and owners are checked, events are published. The access log is off
on both sides. The load comes from the class `Connection` below, on uvloop,
which keeps its connections alive and checks the status of every answer; its
own limit is measured first.
"""

import argparse
import asyncio
import contextlib
import html
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pika
import psycopg
import redis
import servers
import uvloop
from conftest import migrate
from fastapi import FastAPI, Response
from sqlalchemy import insert, select

from orders.auth import issue_token, passwords
from orders.db import Database
from orders.models import Event, EventKind, Order
from orders.rabbitmq import QUEUE, QUEUE_ARGUMENTS
from orders.settings import Settings

SECRET = "0123456789abcdef" * 4
LIMIT = "100000000/minute"
PASSWORD = "correct horse"
CORES = sorted(os.sched_getaffinity(0))
API_CORE, LOAD_CORE = CORES[0], CORES[-1]
CONNECTIONS = 16
SECONDS = 2.0  # of one measurement
BACKLOG = 50_000  # events that the relay drains
BURST = 20_000  # orders at once for the worker
PLENTY = 1_000_000  # orders of a user who has many
ITEMS = '[{"name":"tea","quantity":3,"price":0.1}]'
BODY = b'{"items":%s}' % ITEMS.encode()
P99 = "percentile_cont(0.99) WITHIN GROUP (ORDER BY delay)"


# --- The load ---------------------------------------------------------------


class Sample(NamedTuple):
    """What a load met."""

    rate: float  # calls answered a second
    p99: float  # seconds
    busy: float  # share of its core that the load itself used


class Connection(asyncio.Protocol):
    """Make one call after the other, and time each answer."""

    def __init__(self, calls: Iterator[bytes], until: float) -> None:
        """Take the calls, and when to end."""
        self.calls = calls
        self.until = until
        self.seconds: list[float] = []
        self.buffer = b""
        self.ended = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin."""
        self.transport = transport
        self.send()

    def send(self) -> None:
        """Make the next call, or end."""
        self.began = time.perf_counter()
        if self.began < self.until:
            self.transport.write(next(self.calls))
        else:
            self.transport.close()
            self.ended.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Take an answer when all of it is here."""
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        _, _, length = head.lower().partition(b"content-length: ")
        if not found or len(body) < int(length.partition(b"\r\n")[0]):
            return
        if head[9:10] != b"2":
            return self.connection_lost(AssertionError(head + body))
        self.seconds.append(time.perf_counter() - self.began)
        self.buffer = b""
        return self.send()

    def connection_lost(self, error: Exception | None) -> None:
        """Fail the measurement, unless it is over."""
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("closed"))


async def call_for(
    port: int,
    calls: Iterator[bytes],
    *,
    connections: int = CONNECTIONS,
    seconds: float = SECONDS,
) -> Sample:
    """Make calls for some seconds."""
    loop = asyncio.get_running_loop()
    began, cpu = time.perf_counter(), time.process_time()
    opened = [
        await loop.create_connection(
            lambda: Connection(calls, began + seconds),
            "127.0.0.1",
            port,
        )
        for _ in range(connections)
    ]
    await asyncio.gather(*(protocol.ended for _, protocol in opened))
    took = sorted(s for _, protocol in opened for s in protocol.seconds)
    lasted = time.perf_counter() - began
    return Sample(
        len(took) / lasted,
        took[int(len(took) * 0.99)],
        (time.process_time() - cpu) / lasted,
    )


def load(port: int, *calls: bytes, **options: float) -> Sample:
    """Make the same calls again and again."""
    return uvloop.run(call_for(port, itertools.cycle(calls), **options))


def call(
    path: str, token: str = "", body: bytes = b"", kind: str = "json"
) -> bytes:
    """Return the bytes of a call, as a page in a browser makes it."""
    lines = (
        f"{'POST' if body else 'GET'} {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Origin: https://shop.example",
        f"Authorization: Bearer {token}",
        f"Content-Type: application/{kind}",
        f"Content-Length: {len(body)}",
        "\r\n",
    )
    return "\r\n".join(lines).encode() + body


# --- What bounds the service ------------------------------------------------

EMPTY = b'{"nothing": "' + b"." * 190 + b'"}'  # as long as an order
empty = FastAPI()


@empty.get("/")
async def get_nothing() -> Response:
    """Return fixed bytes."""
    return Response(EMPTY, media_type="application/json")


class Fixed(asyncio.Protocol):
    """Answer without a framework, to see what the load itself can do."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Keep the connection."""
        self.transport = transport

    def data_received(self, _: bytes) -> None:
        """Answer each call alike."""
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(EMPTY)}\r\n\r\n"
        self.transport.write(head.encode() + EMPTY)


def serve_fixed(port: int) -> None:
    """Serve fixed bytes until killed."""
    os.sched_setaffinity(0, {API_CORE})

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Fixed, "127.0.0.1", port)
        await server.serve_forever()

    uvloop.run(run())


async def read_order(database: Database, orders: list[uuid.UUID]) -> None:
    """Read an order by its id, in SQLAlchemy Core."""
    table = Order.__table__
    query = select(table).where(table.c.id == random.choice(orders))
    async with database.engine.connect() as connection:
        (await connection.execute(query)).one()


async def write_order(database: Database, _: list[uuid.UUID]) -> None:
    """Insert an order and its event in one transaction."""
    order = Order(user_id=1, items=json.loads(ITEMS), total_price=0.3)
    event = Event(order_id=order.id, kind=EventKind.NEW_ORDER, payload={})
    async with database.engine.begin() as connection:
        await connection.execute(insert(Order), order.model_dump())
        await connection.execute(insert(Event), event.model_dump())


def bare_rate(
    work: Callable[..., Awaitable[None]], url: str, orders: list[uuid.UUID]
) -> float:
    """Return how often a second SQLAlchemy alone does a work."""
    os.sched_setaffinity(0, {API_CORE})

    async def run() -> int:
        database, done = Database(url), itertools.count()
        until = time.perf_counter() + SECONDS

        async def repeat() -> None:
            while time.perf_counter() < until:
                await work(database, orders)
                next(done)

        await asyncio.gather(*(repeat() for _ in range(CONNECTIONS)))
        await database.close()
        return next(done)

    return uvloop.run(run()) / SECONDS


# --- The stage --------------------------------------------------------------


class Stage:
    """The servers with their data, and the processes to be measured."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        """Start the servers on the core of the load."""
        self.folder, self.stack = folder, stack
        os.sched_setaffinity(0, {LOAD_CORE})
        self.postgres = self.start(servers.postgres(folder))
        self.redis = self.start(servers.redis(folder))
        self.rabbitmq = self.start(servers.rabbitmq(folder))
        address = f"postgres@127.0.0.1:{self.postgres.port}"
        self.env = {
            "JWT_SECRET_KEY": SECRET,
            "DATABASE_URL": f"postgresql://{address}/postgres",
            "REDIS_URL": f"redis://127.0.0.1:{self.redis.port}/0",
            "RABBITMQ_URL": servers.rabbitmq_url(self.rabbitmq),
            "RATE_LIMIT": LIMIT,
        }
        self.url = self.env["DATABASE_URL"]
        migrate(self.url)
        self.database = stack.enter_context(
            psycopg.connect(self.url, autocommit=True)
        )
        broker = pika.URLParameters(self.env["RABBITMQ_URL"])
        self.channel = stack.enter_context(
            pika.BlockingConnection(broker)
        ).channel()
        self.channel.queue_declare(
            QUEUE, durable=True, arguments=QUEUE_ARGUMENTS
        )
        self.bare = stack.enter_context(
            multiprocessing.get_context("spawn").Pool(1)
        )

    def start(
        self, server: servers.Server, core: int | None = LOAD_CORE
    ) -> servers.Server:
        """Run a process until the end, on a core or on all."""
        os.sched_setaffinity(0, CORES if core is None else {core})
        self.stack.enter_context(servers.running(server))
        os.sched_setaffinity(0, {LOAD_CORE})
        return server

    def start_api(
        self, *options: object, core: int | None = API_CORE
    ) -> servers.Server:
        """Run the API without its access log, on a core or on all."""
        server = servers.api(self.folder, self.env)
        server.command += ["--no-access-log", *map(str, options)]
        return self.start(server, core)

    def start_empty(self) -> servers.Server:
        """Run the empty endpoint."""
        port, here = servers.free_port(), Path(__file__).parent
        uvicorn = [servers.PYTHON / "uvicorn", "benchmark:empty"]
        options = ["--app-dir", here, "--port", port, "--no-access-log"]
        server = servers.Server(
            uvicorn + options, port=port, folder=self.folder, env=self.env
        )
        return self.start(server, API_CORE)

    def query(self, statement: str) -> list[tuple]:
        """Run a statement; return its rows, if it has any."""
        cursor = self.database.execute(statement)
        return cursor.fetchall() if cursor.description else []

    def add_user(self, orders: int, *, due: bool = False) -> "Shopper":
        """Add a user with orders; their events are still due, or absent."""
        email = f"{uuid.uuid4()}@example.com"
        hashed = passwords.hash(PASSWORD)
        ((user_id,),) = self.query(
            "INSERT INTO users (email, hashed_password)"
            f" VALUES ('{email}', '{hashed}') RETURNING id"
        )
        kept = self.add_orders(user_id, orders, due=due)
        self.query("VACUUM ANALYZE")
        settings = Settings(jwt_secret_key=SECRET, jwt_expire_minutes=600)
        token = issue_token(settings, user_id).access_token
        return Shopper(user_id, email, token, kept)

    def add_orders(
        self, user_id: int, count: int, *, due: bool
    ) -> list[uuid.UUID]:
        """Give a user orders; their events are due, or left out."""
        rows = self.query(
            "WITH made AS (INSERT INTO orders"
            " (id, user_id, items, total_price, status, created_at)"
            f" SELECT gen_random_uuid(), {user_id}, '{ITEMS}', 0.3,"
            " 'PENDING', now() - n * interval '1 second'"
            f" FROM generate_series(1, {count}) n RETURNING id),"
            " noted AS (INSERT INTO events (id, order_id, kind, payload,"
            " created_at, attempts, due_at) SELECT gen_random_uuid(), id,"
            f" 'new_order', '{{}}', now(), 0, now() FROM made WHERE {due})"
            " SELECT id FROM made"
        )
        return [order_id for (order_id,) in rows]

    def forget(self) -> None:
        """Empty the cache."""
        with redis.Redis(port=self.redis.port) as client:
            client.flushall()

    def fill_rate(self, count: int) -> float:
        """Return how many messages a second come to lie in the queue."""
        began = first = 0.0
        while True:
            declared = self.channel.queue_declare(QUEUE, passive=True)
            lying = declared.method.message_count
            if lying and not began:
                began, first = time.perf_counter(), lying
            if lying >= count:
                return (lying - first) / (time.perf_counter() - began)
            time.sleep(0.1)

    def settle(self) -> None:
        """Wait until every event is processed."""
        due = "SELECT 1 FROM events WHERE processed_at IS NULL LIMIT 1"
        servers.wait_until(lambda: not self.query(due))

    def delay(self, aggregate: str) -> float:
        """Return an aggregate of the seconds from event to processing."""
        ((seconds,),) = self.query(
            f"SELECT {aggregate} FROM (SELECT extract(epoch FROM"
            " processed_at - created_at) AS delay FROM events) delays"
        )
        return float(seconds)


@contextlib.contextmanager
def new_stage() -> Iterator[Stage]:
    """Give a measurement a stage of its own."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="orders-benchmark-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o755)  # PostgreSQL runs as a user of its own
        yield Stage(folder, stack)


class Shopper(NamedTuple):
    """A user, and their orders."""

    id: int
    email: str
    token: str
    orders: list[uuid.UUID]

    def get(self, order_id: uuid.UUID) -> bytes:
        """Return the call that reads an order."""
        return call(f"/orders/{order_id}", self.token)


# --- The measurements -------------------------------------------------------


class Row(NamedTuple):
    """A measurement, round by round, and what its median should reach."""

    what: str
    bound: str  # ≥ or ≤
    target: float
    values: list[float]
    about: str  # the unit, or absolute figures

    @property
    def median(self) -> float:
        """Return the middle of the values."""
        return statistics.median(self.values)

    @property
    def success(self) -> float:
        """Return how far beyond the target the median is; 1 just meets it."""
        ratio = self.median / self.target
        return ratio if self.bound == "≥" else 1 / ratio

    def markdown(self) -> str:
        """Return the row of the README's table."""
        low, high = min(self.values), max(self.values)
        return (
            f"| {self.what} | {self.bound} {self.target:,g}"
            f" | {figure(self.median)} | {figure(low)} to {figure(high)}"
            f" | {self.about} |"
        )


def figure(value: float) -> str:
    """Return a number as a person writes it."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def alternate(
    rounds: int,
    subject: Callable[[], float],
    ceiling: Callable[[], float],
) -> tuple[list[float], float, float]:
    """Measure both in turn; return the ratios, and both middles."""
    pairs = []
    for number in range(rounds):
        sides = [subject, ceiling] if number % 2 else [ceiling, subject]
        taken = {side: side() for side in sides}
        pairs.append((taken[subject], taken[ceiling]))
        print(f"  {pairs[-1][0]:.4g} / {pairs[-1][1]:.4g}", flush=True)
    ratios = [one / other for one, other in pairs]
    one, other = (statistics.median(side) for side in zip(*pairs, strict=True))
    return ratios, one, other


def measure_calls(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure single calls of one API process, then what it has become."""
    api, nothing = stage.start_api(), stage.start_empty()
    ada = stage.add_user(20_000)
    cached = ada.get(ada.orders[0])
    load(api.port, cached, seconds=1)
    load(nothing.port, call("/"), seconds=1)

    ratios, one, other = alternate(
        rounds,
        lambda: load(api.port, cached).rate,
        lambda: load(nothing.port, call("/")).rate,
    )
    yield Row(
        "cached `GET /orders/{id}` to an empty FastAPI endpoint",
        "≥",
        0.35,
        ratios,
        f"{one:.0f} and {other:.0f} calls/s",
    )

    def uncached() -> float:
        stage.forget()
        calls = map(ada.get, random.sample(ada.orders, len(ada.orders)))
        return uvloop.run(call_for(api.port, calls)).rate

    def bare(work: Callable[..., Awaitable[None]]) -> float:
        return stage.bare.apply(bare_rate, (work, stage.url, ada.orders))

    ratios, one, other = alternate(rounds, uncached, lambda: bare(read_order))
    yield Row(
        "uncached `GET /orders/{id}` to its query in SQLAlchemy, without HTTP",
        "≥",
        0.5,
        ratios,
        f"{one:.0f} and {other:.0f} a second",
    )

    create = call("/orders/", ada.token, BODY)
    ratios, one, other = alternate(
        rounds,
        lambda: load(api.port, create).rate,
        lambda: bare(write_order),
    )
    yield Row(
        "`POST /orders/` to its two inserts in SQLAlchemy, without HTTP",
        "≥",
        0.5,
        ratios,
        f"{one:.0f} and {other:.0f} a second",
    )

    few, many = stage.add_user(1000), stage.add_user(PLENTY)

    def page(user: Shopper) -> float:
        listed = call(f"/orders/user/{user.id}", user.token)
        return 1 / load(api.port, listed).rate

    page(many)
    ratios, one, other = alternate(
        rounds, lambda: page(many), lambda: page(few)
    )
    yield Row(
        "time of a page: user with 1,000,000 orders to one with 1,000",
        "≤",
        1.2,
        ratios,
        f"{one * 1000:.2f} and {other * 1000:.2f} ms of the core",
    )

    form = f"username={ada.email}&password={PASSWORD}".encode()
    login = call("/token/", body=form, kind="x-www-form-urlencoded")

    def while_logging_in() -> float:
        async def run() -> Sample:
            reads, _ = await asyncio.gather(
                call_for(api.port, itertools.repeat(cached)),
                call_for(api.port, itertools.repeat(login), connections=8),
            )
            return reads

        return uvloop.run(run()).p99

    ratios, one, other = alternate(
        rounds, while_logging_in, lambda: load(api.port, cached).p99
    )
    yield Row(
        "p99 of the cached GET while 8 clients log in to without them",
        "≤",
        2,
        ratios,
        f"{one * 1000:.1f} and {other * 1000:.1f} ms",
    )

    before = memory(api)
    made = 0.0
    while made < 100_000:
        made += 10 * load(api.port, cached, seconds=10).rate
    after = memory(api)
    yield Row("resident memory after all that", "≤", 150, [after], "MiB")
    yield Row(
        "its growth over 100,000 more calls",
        "≤",
        2,
        [after - before],
        f"MiB; {made:.0f} calls",
    )


def memory(server: servers.Server) -> float:
    """Return the resident memory of a process, in MiB."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def measure_hung_redis(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure reads with Redis frozen, and with nobody on its port."""
    api, ada = stage.start_api(), stage.add_user(1000)
    calls = [ada.get(order_id) for order_id in ada.orders]
    slowest = []

    def hung() -> float:
        stage.redis.signal(signal.SIGSTOP)
        sample = load(api.port, *calls, seconds=3 * SECONDS)
        stage.redis.signal(signal.SIGCONT)
        slowest.append(sample.p99 * 1000)
        return sample.rate

    def refused() -> float:
        stage.redis.kill()
        sample = load(api.port, *calls, seconds=3 * SECONDS)
        stage.redis.start()
        return sample.rate

    ratios, one, other = alternate(rounds, hung, refused)
    yield Row(
        "GET with Redis hung to Redis refused",
        "≥",
        0.5,
        ratios,
        f"{one:.0f} and {other:.0f} calls/s",
    )
    yield Row("p99 of the GET with Redis hung", "≤", 300, slowest, "ms")


def measure_the_way_to_the_worker(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure what happens to an order after its transaction."""
    stage.add_user(BACKLOG, due=True)
    api = stage.start_api()
    rates = [stage.fill_rate(BACKLOG)]
    api.stop()
    yield Row(
        "relay: a backlog of 50,000 events, published and confirmed",
        "≥",
        5000,
        rates,
        "events/s",
    )

    # From here the worker has the core to itself.
    stage.query("TRUNCATE events, orders")
    stage.channel.queue_purge(QUEUE)
    worker = stage.start(servers.worker(stage.folder, stage.env), API_CORE)
    api = stage.start_api(core=LOAD_CORE)
    rates = []
    for _ in range(min(rounds, 3)):
        stage.query("TRUNCATE events, orders")
        stage.add_user(BURST, due=True)
        stage.settle()
        rates.append(BURST / stage.delay("max(delay)"))
    yield Row(
        "one Celery worker: 20,000 orders at once, the two seconds included",
        "≥",
        1500,
        rates,
        "orders/s",
    )

    stage.query("TRUNCATE events, orders")
    user = stage.add_user(0)
    began = time.perf_counter()
    for number in range(100):  # 30 orders each tenth of a second
        stage.add_orders(user.id, 30, due=True)
        time.sleep(max(0, began + number / 10 - time.perf_counter()))
    stage.settle()
    yield Row(
        "p99 from an order to its processing, at 300 orders/s",
        "≤",
        2.3,
        [stage.delay(P99)],
        "seconds",
    )
    worker.stop()
    api.stop()


def measure_workers(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure what a second API process adds, on all cores."""
    ada = stage.add_user(100)
    calls = [ada.get(order_id) for order_id in ada.orders]
    one = stage.start_api(core=None)
    two = stage.start_api("--workers", 2, core=None)

    def rate(api: servers.Server) -> float:
        return load(api.port, *calls, connections=2 * CONNECTIONS).rate

    rate(two)
    ratios, *rates = alternate(rounds, lambda: rate(two), lambda: rate(one))
    yield Row(
        "`--workers 2` to one, both cores shared with load and servers",
        "≥",
        1,
        ratios,
        "{:.0f} and {:.0f} calls/s".format(*rates),
    )


def measure_start(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure `uv run orders` in an empty directory, until it answers."""
    root, seconds = Path(__file__).parent.parent, []
    subprocess.run(["uv", "sync", "--quiet"], cwd=root, check=True)
    for number in range(rounds):
        folder, port = stage.folder / f"start{number}", servers.free_port()
        folder.mkdir()
        uv = ["uv", "run", "--project", root, "orders"]
        server = servers.Server(
            uv, port=port, folder=folder, env={"APP_PORT": str(port)}
        )
        began = time.perf_counter()
        with servers.running(server):
            while not servers.answers(f"http://127.0.0.1:{port}/health"):
                time.sleep(0.01)
            seconds.append(time.perf_counter() - began)
    yield Row("`uv run orders` until its first answer", "≤", 2, seconds, "s")


# --- What comes of it -------------------------------------------------------

MEASUREMENTS = (
    measure_calls,
    measure_the_way_to_the_worker,
    measure_hung_redis,
    measure_workers,
    measure_start,
)


def plot(rows: list[Row]) -> str:
    """Return an SVG: how far each row is beyond its target, or short of it."""
    bars, unit, left = [], 110, 440  # pixels
    for number, row in enumerate(rows):
        y, width = 24 * number + 30, min(row.success, 3) * unit
        bars.append(
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">'
            f"{html.escape(row.what.replace('`', ''))}</text>"
            f'<rect x="{left}" y="{y}" width="{width:.0f}" height="16"'
            f' fill="{"#2a7" if row.success >= 1 else "#c43"}"/>'
            f'<text x="{left + width + 6:.0f}" y="{y + 12}">'
            f"{figure(row.median)}</text>"
        )
    height = 24 * len(rows) + 40
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="860"'
        f' height="{height}" font-family="sans-serif" font-size="11">'
        '<rect width="100%" height="100%" fill="white"/>'
        f'<text x="{left + unit}" y="18" text-anchor="middle">target</text>'
        + "".join(bars)
        + f'<line x1="{left + unit}" x2="{left + unit}" y1="24"'
        f' y2="{height - 8}" stroke="black" stroke-dasharray="3"/></svg>\n'
    )


def measure_the_load() -> str:
    """Return what the load can do by itself, against a server of no work."""
    port = servers.free_port()
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=serve_fixed, args=(port,), daemon=True)
    server.start()
    time.sleep(2)  # it imports this module first
    sample = load(port, call("/"))
    server.kill()
    return f"the load alone: {sample.rate:.0f} calls/s"


def main() -> None:
    """Measure, print a table, and write the picture if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="part of a function's name")
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    options = parser.parse_args()
    if lacking := servers.missing():
        parser.error(f"apt-get install {' '.join(lacking)}")
    os.sched_setaffinity(0, {LOAD_CORE})
    print(measure_the_load(), flush=True)
    rows = []
    for measure in MEASUREMENTS:
        if options.only not in measure.__name__:
            continue
        print(measure.__name__, flush=True)
        with new_stage() as stage:
            for row in measure(stage, options.rounds):
                rows.append(row)
                print(row.markdown(), flush=True)
    print("\n| what | target | median | spread | in figures |")
    print("|---|---|---|---|---|")
    print("\n".join(row.markdown() for row in rows))
    if options.plot:
        options.plot.write_text(plot(rows))


if __name__ == "__main__":
    main()
