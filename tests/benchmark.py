"""Measure the service against what bounds it.

    uv run python tests/benchmark.py [--rounds N] [--only WORD] [--plot FILE]

A ratio is taken within one run, its two sides in turn, several times. One API
process has a core to itself; the load, PostgreSQL, Redis and RabbitMQ share
another one. Where a worker is measured, the worker has that core, and the API
process shares the other one. The API runs as `uv run orders` does, but without
its access log, which the empty endpoint does not write either. The rate limit
is on, counted in Redis and never reached; CORS is on, tokens and owners are
checked, events are published.

"Bare" is SQLAlchemy's Core without HTTP and without anything of ours but the
tables: statements built once, plain dictionaries, a connection for each of the
callers, uvloop, on the same core as the API. The processor time of a call is
that of the process that was measured; it is the steadiest figure.
"""

import argparse
import asyncio
import contextlib
import html
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import pika
import psycopg
import redis
import servers
import uvloop
from conftest import migrate
from fastapi import FastAPI, Response
from preloaded import library_imports
from sqlalchemy import bindparam, insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlmodel import SQLModel

from orders.auth import Accounts, passwords
from orders.broker import DELAY_QUEUE, QUEUE, QUEUE_ARGUMENTS
from orders.db import Database
from orders.models import now
from orders.settings import Settings

SECRET = "0123456789abcdef" * 4
LIMIT = "100000000/minute"
PASSWORD = "correct horse"
CORES = sorted(os.sched_getaffinity(0))
API_CORE, LOAD_CORE = CORES[0], CORES[-1]
CONNECTIONS = 16
SECONDS = 2.0  # of one measurement
BACKLOG = 50_000  # events that the relay drains
BURST = 6_000  # orders that lie in the queue when the workers begin
PLENTY = 1_000_000  # orders of a user who has many
SLOW_ROUNDS = 5  # at most, of a measurement that takes ten seconds a round
ITEMS = [{"name": "tea", "quantity": 3, "price": 0.1}]
ITEMS_JSON = '[{"name":"tea","quantity":3,"price":0.1}]'
BODY = b'{"items":%s}' % ITEMS_JSON.encode()
ROOT = Path(__file__).parent.parent
ORDERS = SQLModel.metadata.tables["orders"]
EVENTS = SQLModel.metadata.tables["events"]
# `uv run orders` has no option that turns the access log off.
ORDERS_WITHOUT_ACCESS_LOG = """
import functools, uvicorn
from orders.__main__ import serve
uvicorn.run = functools.partial(uvicorn.run, access_log=False)
serve()
"""


class Sample(NamedTuple):
    """What was measured of calls to a process, or of bare statements."""

    rate: float = 0.0  # calls (or events, or orders) a second
    p50: float = 0.0  # milliseconds
    p99: float = 0.0  # milliseconds
    cpu: float = 0.0  # milliseconds of the process's processor time, a call


# --- The load ---------------------------------------------------------------


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
            return None
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
    server: servers.Server,
    calls: Iterable[bytes],
    *,
    connections: int = CONNECTIONS,
    seconds: float = SECONDS,
) -> Sample:
    """Make calls for some seconds."""
    loop, endless = asyncio.get_running_loop(), itertools.cycle(calls)
    cpu, began = processor_time(server), time.perf_counter()
    opened = [
        await loop.create_connection(
            lambda: Connection(endless, began + seconds),
            "127.0.0.1",
            server.port,
        )
        for _ in range(connections)
    ]
    await asyncio.gather(*(protocol.ended for _, protocol in opened))
    took = sorted(s * 1000 for _, protocol in opened for s in protocol.seconds)
    return Sample(
        rate=len(took) / (time.perf_counter() - began),
        p50=took[len(took) // 2],
        p99=took[int(len(took) * 0.99)],
        cpu=1000 * (processor_time(server) - cpu) / len(took),
    )


def load(server: servers.Server, *calls: bytes, **options: Any) -> Sample:
    """Make the same calls again and again."""
    return uvloop.run(call_for(server, calls, **options))


def processor_time(server: servers.Server) -> float:
    """Return the processor time of a process and its descendants, in s."""
    ticks = 0
    for pid in servers.family(server.process.pid):
        stat = Path(f"/proc/{pid}/stat").read_text()
        ticks += sum(map(int, stat.rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def move(server: servers.Server, core: int) -> None:
    """Let the threads of a process and its descendants run on one core."""
    for pid in servers.family(server.process.pid):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(thread.name), {core})


def memory(server: servers.Server) -> float:
    """Return the resident memory of a process, in MiB."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


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


READ = select(ORDERS).where(ORDERS.c.id == bindparam("order_id"))
PAGE = (
    select(ORDERS)
    .where(ORDERS.c.user_id == bindparam("user"))
    .order_by(ORDERS.c.created_at.desc(), ORDERS.c.id.desc())
    .limit(100)
)
INSERT_ORDER, INSERT_EVENT = insert(ORDERS), insert(EVENTS)


async def read_bare(engine: AsyncEngine, shopper: "Shopper") -> None:
    """Read an order by its id."""
    parameters = {"order_id": random.choice(shopper.orders)}
    async with engine.connect() as connection:
        (await connection.execute(READ, parameters)).one()


async def page_bare(engine: AsyncEngine, shopper: "Shopper") -> None:
    """Read a page of a user's orders."""
    async with engine.connect() as connection:
        (await connection.execute(PAGE, {"user": shopper.id})).all()


async def write_bare(engine: AsyncEngine, shopper: "Shopper") -> None:
    """Insert an order and its event in one transaction."""
    order = {
        "id": uuid.uuid4(),
        "user_id": shopper.id,
        "items": ITEMS,
        "total_price": 0.3,
        "status": "PENDING",
        "created_at": now(),
    }
    event = {
        "id": uuid.uuid4(),
        "order_id": order["id"],
        "kind": "new_order",
        "payload": {},
        "created_at": order["created_at"],
        "attempts": 0,
        "due_at": order["created_at"],
    }
    async with engine.begin() as connection:
        await connection.execute(INSERT_ORDER, order)
        await connection.execute(INSERT_EVENT, event)


def run_bare(
    work: Callable[..., Awaitable[None]], url: str, shopper: "Shopper"
) -> Sample:
    """Do a work for some seconds, in a process of its own."""
    os.sched_setaffinity(0, {API_CORE})

    async def run() -> Sample:
        engine = create_async_engine(
            url.replace("://", "+psycopg://"),
            pool_size=CONNECTIONS,
            max_overflow=0,
        )
        await asyncio.gather(*(work(engine, shopper) for _ in range(99)))
        done, cpu, began = 0, time.process_time(), time.perf_counter()

        async def repeat() -> None:
            nonlocal done
            while time.perf_counter() < began + SECONDS:
                await work(engine, shopper)
                done += 1

        await asyncio.gather(*(repeat() for _ in range(CONNECTIONS)))
        lasted, cpu = time.perf_counter() - began, time.process_time() - cpu
        await engine.dispose()
        return Sample(done / lasted, cpu=1000 * cpu / done)

    return uvloop.run(run())


# --- The stage --------------------------------------------------------------


class Shopper(NamedTuple):
    """A user, and their orders."""

    id: int
    email: str
    token: str
    orders: list[uuid.UUID]

    def get(self, order_id: uuid.UUID) -> bytes:
        """Return the call that reads an order."""
        return call(f"/orders/{order_id}", self.token)


class Stage:
    """The servers with their data, and the processes to be measured."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        """Start the servers on the core of the load."""
        self.folder, self.stack = folder, stack
        postgres = self.start(servers.postgres(folder), LOAD_CORE)
        self.redis = self.start(servers.redis(folder), LOAD_CORE)
        rabbitmq = self.start(servers.rabbitmq(folder), LOAD_CORE)
        self.url = f"postgresql://postgres@127.0.0.1:{postgres.port}/postgres"
        self.env = {
            "JWT_SECRET_KEY": SECRET,
            "DATABASE_URL": self.url,
            "REDIS_URL": f"redis://127.0.0.1:{self.redis.port}/0",
            "RABBITMQ_URL": servers.rabbitmq_url(rabbitmq),
            "RATE_LIMIT": LIMIT,
        }
        migrate(self.url)
        self.database = stack.enter_context(
            psycopg.connect(self.url, autocommit=True)
        )
        broker = pika.URLParameters(self.env["RABBITMQ_URL"] + "?heartbeat=0")
        self.channel = stack.enter_context(
            pika.BlockingConnection(broker)
        ).channel()
        for queue, arguments in QUEUE_ARGUMENTS.items():
            self.channel.queue_declare(
                queue, durable=True, arguments=arguments
            )
        spawn = multiprocessing.get_context("spawn")
        self.bare_process = stack.enter_context(
            ProcessPoolExecutor(1, mp_context=spawn)
        )

    def start(
        self,
        server: servers.Server,
        *cores: int,
        stack: contextlib.ExitStack | None = None,
    ) -> servers.Server:
        """Run a process on some cores, until a stack or the stage ends."""
        os.sched_setaffinity(0, cores)
        (stack or self.stack).enter_context(servers.running(server))
        os.sched_setaffinity(0, {LOAD_CORE})
        return server

    def start_api(
        self, processes: int = 1, cores: Iterable[int] = (API_CORE,)
    ) -> servers.Server:
        """Run the API as `uv run orders` does, without its access log."""
        port = servers.free_port()
        server = servers.Server(
            [sys.executable, "-c", ORDERS_WITHOUT_ACCESS_LOG],
            port=port,
            folder=self.folder,
            env={
                **self.env,
                "APP_PORT": str(port),
                "WEB_CONCURRENCY": str(processes),
            },
            ready=lambda: servers.healthy(port),
        )
        return self.start(server, *cores)

    @cached_property
    def api(self) -> servers.Server:
        """The one API process that most measurements are about."""
        return self.start_api()

    @cached_property
    def nothing(self) -> servers.Server:
        """The process with the empty endpoint."""
        return self.start_empty()

    @cached_property
    def ada(self) -> "Shopper":
        """A user whose orders are read."""
        return self.add_user(20_000)

    def start_empty(self) -> servers.Server:
        """Run the empty endpoint."""
        port, here = servers.free_port(), Path(__file__).parent
        command = [servers.PYTHON / "uvicorn", "benchmark:empty"]
        command += ["--app-dir", here, "--port", port, "--no-access-log"]
        server = servers.Server(
            command, port=port, folder=self.folder, env=self.env
        )
        return self.start(server, API_CORE)

    def bare(
        self, work: Callable[..., Awaitable[None]], shopper: Shopper
    ) -> Sample:
        """Measure what SQLAlchemy alone takes for a work."""
        sample = self.bare_process.submit(run_bare, work, self.url, shopper)
        return sample.result()

    def query(self, statement: str) -> list[tuple]:
        """Run a statement; return its rows, if it has any."""
        cursor = self.database.execute(statement)
        return cursor.fetchall() if cursor.description else []

    def add_user(self, orders: int = 0, *, due: bool = False) -> Shopper:
        """Add a user with orders; their events are still due, or absent."""
        email = f"{uuid.uuid4()}@example.com"
        hashed = passwords.hash(PASSWORD)
        ((user_id,),) = self.query(
            "INSERT INTO users (email, hashed_password)"
            f" VALUES ('{email}', '{hashed}') RETURNING id"
        )
        settings = Settings(jwt_secret_key=SECRET, jwt_expire_minutes=600)
        accounts = Accounts(Database(self.url), settings)
        token = accounts.issue_token(user_id).access_token
        kept = self.add_orders(user_id, orders, due=due)
        if not due:
            self.query("VACUUM ANALYZE")
        return Shopper(user_id, email, token, kept)

    def add_orders(
        self, user_id: int, count: int, *, due: bool
    ) -> list[uuid.UUID]:
        """Give a user orders; their events are due, or left out."""
        rows = self.query(
            "WITH made AS (INSERT INTO orders"
            " (id, user_id, items, total_price, status, created_at)"
            f" SELECT gen_random_uuid(), {user_id}, '{ITEMS_JSON}', 0.3,"
            " 'PENDING', now() - n * interval '1 second'"
            f" FROM generate_series(1, {count}) n RETURNING id),"
            " noted AS (INSERT INTO events (id, order_id, kind, payload,"
            " created_at, attempts, due_at) SELECT gen_random_uuid(), id,"
            " 'new_order', '{}', now(), 0, now() + interval '2 seconds'"
            f" FROM made WHERE {due}) SELECT id FROM made"
        )
        return [order_id for (order_id,) in rows]

    def wipe(self, tables: str = "events, orders") -> None:
        """Remove all events, and their messages; orders too, by default."""
        self.query(f"TRUNCATE {tables}")
        for queue in QUEUE_ARGUMENTS:
            self.channel.queue_purge(queue)

    def forget(self) -> None:
        """Empty the cache."""
        with redis.Redis(port=self.redis.port) as client:
            client.flushall()

    def messages(self, *queues: str) -> int:
        """Return how many messages lie in some queues."""
        declared = (
            self.channel.queue_declare(queue, passive=True) for queue in queues
        )
        return sum(answer.method.message_count for answer in declared)

    def create_orders(self) -> Sample:
        """Create orders by calls; nobody processes them."""
        create = call("/orders/", self.ada.token, BODY)
        sample = load(self.api, create)
        self.publish_all()
        self.wipe("events")
        return sample

    def publish_all(self) -> None:
        """Wait until the relay has published every event."""
        new = "SELECT 1 FROM events WHERE attempts = 0 LIMIT 1"
        servers.wait_until(lambda: not self.query(new))

    def drain(self) -> Sample:
        """Let the relay publish a backlog, with nothing else to do."""
        self.add_user(BACKLOG, due=True)
        cpu = processor_time(self.api)
        while not (first := self.messages(QUEUE, DELAY_QUEUE)):
            time.sleep(0.01)
        began = time.perf_counter()
        while (lying := self.messages(QUEUE, DELAY_QUEUE)) < BACKLOG:
            time.sleep(0.1)
        lasted = time.perf_counter() - began
        cpu = processor_time(self.api) - cpu
        self.wipe("events")
        return Sample((lying - first) / lasted, cpu=1000 * cpu / BACKLOG)

    def work_off(self, *cores: int) -> Sample:
        """Let workers, one on each of the cores, process a burst of orders.

        The orders lie in the queue when the workers begin, all at once.
        """
        self.wipe()
        move(self.api, LOAD_CORE)
        with contextlib.ExitStack() as stack:
            workers = [self.start_worker(stack, core) for core in cores]
            for worker in workers:
                worker.signal(signal.SIGSTOP)
            self.add_user(BURST, due=True)
            # A worker that is stopped has taken some of them already.
            ready = BURST - 500 * len(workers)
            servers.wait_until(lambda: self.messages(QUEUE) >= ready)
            servers.wait_until(lambda: not self.messages(DELAY_QUEUE))
            cpu = sum(map(processor_time, workers))
            for worker in workers:
                worker.signal(signal.SIGCONT)
            self.settle()
            cpu = sum(map(processor_time, workers)) - cpu
        move(self.api, API_CORE)
        span = self.seconds("max(processed_at) - min(processed_at)")
        self.wipe()
        return Sample(BURST / span, cpu=1000 * cpu / BURST)

    def start_worker(
        self, stack: contextlib.ExitStack, core: int
    ) -> servers.Server:
        """Run a Celery worker on a core until the stack is closed."""
        worker = servers.worker(self.folder, self.env)
        worker.preloaded = False  # it would share memory with its parent
        # Two workers of one name would not know each other apart.
        worker.command += ["-n", f"{uuid.uuid4()}@%h"]
        worker.log = self.folder / f"worker-{uuid.uuid4()}.log"
        return self.start(worker, core, stack=stack)

    def time_of(
        self, command: list[object], is_done: Callable[[servers.Server], bool]
    ) -> Sample:
        """Return the time from a process's start until it has done its work.

        It runs in an empty directory.
        """
        folder, port = tempfile.mkdtemp(dir=self.folder), servers.free_port()
        server = servers.Server(
            command,
            port=port,
            folder=Path(folder),
            env={"APP_PORT": str(port)},
            ready=lambda: True,  # the loop below waits, more precisely
        )
        with contextlib.ExitStack() as stack:
            began = time.perf_counter()
            self.start(server, API_CORE, stack=stack)
            while not is_done(server):
                time.sleep(0.002)
            lasted = time.perf_counter() - began
            assert not server.process.returncode, server.text()
        return Sample(p50=1000 * lasted)

    def settle(self) -> None:
        """Wait until every event is processed."""
        due = "SELECT 1 FROM events WHERE processed_at IS NULL LIMIT 1"
        while self.query(due):  # it reads the table: not too often
            time.sleep(0.5)

    def seconds(self, expression: str) -> float:
        """Return what an interval that events aggregate to lasted."""
        ((lasted,),) = self.query(
            f"SELECT extract(epoch FROM {expression}) FROM events"
        )
        return float(lasted)


@contextlib.contextmanager
def new_stage() -> Iterator[Stage]:
    """Give a measurement a stage of its own."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="orders-benchmark-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield Stage(folder, stack)


# --- The measurements -------------------------------------------------------


class Row(NamedTuple):
    """A measurement, round by round, and what its median should reach."""

    what: str
    target: str  # ≥ or ≤, and the value
    values: list[float]
    about: str  # the unit, or absolute figures

    @property
    def median(self) -> float:
        """Return the middle of the values."""
        return statistics.median(self.values)

    @property
    def success(self) -> float:
        """Return how far beyond the target the median is; 1 just meets it."""
        ratio = self.median / float(self.target[1:])
        return ratio if self.target[0] == "≥" else 1 / ratio

    def markdown(self) -> str:
        """Return the row of the README's table."""
        low, high = min(self.values), max(self.values)
        return (
            f"| {self.what} | {self.target[0]} {float(self.target[1:]):,g}"
            f" | {figure(self.median)} | {figure(low)} to {figure(high)}"
            f" | {self.about} |"
        )


def figure(value: float) -> str:
    """Return a number as a person writes it."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def compare(
    what: str,
    target: str,
    rounds: int,
    one: Callable[[], Sample],
    other: Callable[[], Sample],
    by: str = "rate",
) -> Row:
    """Measure two sides in turn, and how the one is to the other."""
    pairs = []
    for number in range(rounds):
        if number % 2:
            pairs.append((one(), other()))
        else:
            pairs.append((other(), one())[::-1])
        print(f"  {pairs[-1]}", flush=True)

    def both(part: str) -> str:
        """Return the middles of a part of each side's samples."""
        sides = zip(*pairs, strict=True)
        parts = [[getattr(sample, part) for sample in side] for side in sides]
        return " and ".join(figure(statistics.median(each)) for each in parts)

    unit = {"rate": "a second"}.get(by, "ms")
    about = f"{both(by)} {unit}"
    if all(sample.cpu for pair in pairs for sample in pair):
        about += f"; {both('cpu')} ms of the processor each"
    ratios = [getattr(a, by) / getattr(b, by) for a, b in pairs]
    return Row(what, target, ratios, about)


def measure_cached_reads(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure reads of an order that the cache has."""
    cached = stage.ada.get(stage.ada.orders[0])
    load(stage.api, cached, seconds=1)
    load(stage.nothing, call("/"), seconds=1)
    yield compare(
        "cached `GET /orders/{id}` to an empty FastAPI endpoint",
        "≥0.5",
        rounds,
        partial(load, stage.api, cached),
        partial(load, stage.nothing, call("/")),
    )


def read_uncached(stage: Stage, **options: Any) -> Sample:
    """Read orders that the cache does not have."""
    stage.forget()
    return load(stage.api, *map(stage.ada.get, stage.ada.orders), **options)


def measure_uncached_reads(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure reads of orders that the cache does not have."""
    read_uncached(stage, seconds=1)
    yield compare(
        "uncached `GET /orders/{id}` to a bare select",
        "≥0.8",
        rounds,
        partial(read_uncached, stage),
        partial(stage.bare, read_bare, stage.ada),
    )


def measure_creates(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure the creation of orders."""
    create = call("/orders/", stage.ada.token, BODY)
    load(stage.api, create, seconds=1)
    yield compare(
        "`POST /orders/` to a bare transaction of two inserts",
        "≥0.7",
        rounds,
        partial(load, stage.api, create),
        partial(stage.bare, write_bare, stage.ada),
    )


def measure_pages(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure pages of a user's orders, of few and of very many."""
    few, many = stage.add_user(1000), stage.add_user(PLENTY)
    list_few = call(f"/orders/user/{few.id}", few.token)
    list_many = call(f"/orders/user/{many.id}", many.token)
    load(stage.api, list_many, seconds=1)
    yield compare(
        "page of 100 orders to the bare query of those rows",
        "≥0.35",
        rounds,
        partial(load, stage.api, list_many),
        partial(stage.bare, page_bare, many),
    )
    yield compare(
        "time of a page: user with 1,000,000 orders to one with 1,000",
        "≤1.2",
        rounds,
        partial(load, stage.api, list_many),
        partial(load, stage.api, list_few),
        by="p50",
    )


def measure_lone_clients(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure calls that share nothing with others."""
    cached = stage.ada.get(stage.ada.orders[0])
    create = call("/orders/", stage.ada.token, BODY)
    load(stage.api, cached, create, seconds=1)
    for what, target, lone in (
        ("cached `GET`", "≤5", partial(load, stage.api, cached)),
        ("uncached `GET`", "≤13", partial(read_uncached, stage)),
        ("`POST`", "≤47", partial(load, stage.api, create)),
    ):
        yield compare(
            f"p50 of a lone client's {what} to that of the empty endpoint",
            target,
            rounds,
            partial(lone, connections=1),
            partial(load, stage.nothing, call("/"), connections=1),
            by="p50",
        )


def measure_logins(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure reads while other clients log in."""
    cached = stage.ada.get(stage.ada.orders[0])
    form = f"username={stage.ada.email}&password={PASSWORD}".encode()
    login = call("/token/", body=form, kind="x-www-form-urlencoded")

    def while_logging_in() -> Sample:
        """Read while others log in."""

        async def run() -> list[Sample]:
            """Do both at once."""
            return await asyncio.gather(
                call_for(stage.api, [cached]),
                call_for(stage.api, [login], connections=8),
            )

        return uvloop.run(run())[0]

    while_logging_in()
    yield compare(
        "p99 of the cached GET while 8 clients log in to without them",
        "≤2",
        rounds,
        while_logging_in,
        partial(load, stage.api, cached),
        by="p99",
    )


def measure_memory(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure what the API process has become, and whether it grows."""
    cached = stage.ada.get(stage.ada.orders[0])
    create = call("/orders/", stage.ada.token, BODY)
    listed = call(f"/orders/user/{stage.ada.id}", stage.ada.token)
    load(stage.api, create, listed, cached)
    before, made = memory(stage.api), 0.0
    while made < 100_000:
        made += 10 * load(stage.api, cached, seconds=10).rate
    after, about = memory(stage.api), f"MiB; {made:,.0f} calls"
    yield Row(
        "resident memory of the API after all that", "≤120", [after], "MiB"
    )
    growth = [after - before]
    yield Row("its growth over 100,000 more calls", "≤2", growth, about)


def measure_the_drain(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure the relay with a backlog against the creation of orders."""
    stage.create_orders()
    yield compare(
        "relay: a backlog of 50,000 events, published, to the `POST`s",
        "≥5",
        min(rounds, SLOW_ROUNDS),
        stage.drain,
        stage.create_orders,
    )


def measure_reads_in_a_drain(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure what calls meet while the relay drains a backlog."""
    cached = stage.ada.get(stage.ada.orders[0])
    load(stage.api, cached, seconds=1)

    def draining() -> Sample:
        """Read while the relay drains a backlog."""
        stage.add_user(BACKLOG, due=True)
        sample = load(stage.api, cached)
        new = "SELECT 1 FROM events WHERE attempts = 0 LIMIT 1"
        assert stage.query(new), "drained too soon"
        stage.publish_all()
        stage.wipe("events")
        return sample

    yield compare(
        "p99 of the cached GET while such a backlog drains to without",
        "≤3",
        min(rounds, SLOW_ROUNDS),
        draining,
        partial(load, stage.api, cached),
        by="p99",
    )


def measure_the_worker(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure a worker that has a core to itself, and what another adds."""
    rounds = min(rounds, SLOW_ROUNDS)
    stage.create_orders()
    yield compare(
        "one worker, a core to itself, to the `POST`s of one API process",
        "≥1",
        rounds,
        partial(stage.work_off, API_CORE),
        stage.create_orders,
    )
    yield compare(
        "two workers to one; the second shares the servers' core",
        "≥1.5",
        rounds,
        partial(stage.work_off, API_CORE, LOAD_CORE),
        partial(stage.work_off, API_CORE),
    )


def measure_the_delay(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure when orders that come steadily are processed."""
    move(stage.api, LOAD_CORE)
    late = []
    delay = "WITHIN GROUP (ORDER BY processed_at - created_at)"
    with contextlib.ExitStack() as stack:
        stage.start_worker(stack, API_CORE)
        for _ in range(min(rounds, SLOW_ROUNDS)):
            stage.wipe()
            user, began = stage.add_user(), time.perf_counter()
            for number in range(100):  # 30 orders each tenth of a second
                stage.add_orders(user.id, 30, due=True)
                time.sleep(max(0, began + number / 10 - time.perf_counter()))
            stage.settle()
            late.append(stage.seconds(f"percentile_cont(0.99) {delay}"))
    yield Row(
        "p99 from an order to its processing, at 300 orders a second",
        "≤2.2",
        late,
        "seconds, two of which are the delay",
    )


def measure_hung_redis(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure reads with Redis frozen, and with nobody on its port."""
    orders = stage.ada.orders[:1000]
    read = partial(
        load, stage.api, *map(stage.ada.get, orders), seconds=3 * SECONDS
    )
    slowest = []

    def hung() -> Sample:
        """Read while Redis is frozen."""
        stage.redis.signal(signal.SIGSTOP)
        sample = read()
        stage.redis.signal(signal.SIGCONT)
        slowest.append(sample.p99)
        return sample

    def refused() -> Sample:
        """Read while Redis is not there."""
        stage.redis.kill()
        sample = read()
        stage.redis.start()
        return sample

    yield compare(
        "GET with Redis hung to Redis refused", "≥0.5", rounds, hung, refused
    )
    yield Row("p99 of the GET with Redis hung", "≤300", slowest, "ms")


def measure_processes(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure what a second API process adds, on all cores."""
    one = stage.start_api(cores=CORES)
    two = stage.start_api(2, cores=CORES)
    calls = [stage.ada.get(order_id) for order_id in stage.ada.orders[:100]]

    def read(api: servers.Server) -> Sample:
        """Read with more connections, as they are shared among processes."""
        return load(api, *calls, connections=2 * CONNECTIONS)

    read(two)
    yield compare(
        "`WEB_CONCURRENCY=2` to one, cores shared with load and servers",
        "≥1",
        rounds,
        partial(read, two),
        partial(read, one),
    )


def measure_start(stage: Stage, rounds: int) -> Iterator[Row]:
    """Measure `uv run orders` in an empty directory, until it answers."""
    # `uv run` sets UV to its own path: `uv` itself may be a shell script.
    uv = [os.environ.get("UV", "uv"), "run", "--project", ROOT, "orders"]
    imports = library_imports("tasks.py")  # which is the worker's
    imports += "\nimport os\nos._exit(0)"  # without an end
    libraries = [sys.executable, "-c", imports]
    start_orders = partial(
        stage.time_of, uv, lambda server: servers.healthy(server.port)
    )
    import_libraries = partial(
        stage.time_of,
        libraries,
        lambda server: server.process.poll() is not None,
    )
    start_orders()  # this one compiles what it imports
    yield compare(
        "first answer of `uv run orders` to the import of its libraries",
        "≤1.3",
        rounds,
        start_orders,
        import_libraries,
        by="p50",
    )


# --- What comes of it -------------------------------------------------------

# Each line shares servers, data and one API process.
MEASUREMENTS = (
    (
        *(measure_cached_reads, measure_uncached_reads, measure_creates),
        *(measure_pages, measure_lone_clients, measure_logins, measure_memory),
    ),
    (measure_the_drain, measure_reads_in_a_drain),
    (measure_the_worker, measure_the_delay),
    (measure_hung_redis,),
    (measure_processes,),
    (measure_start,),
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


def main() -> None:
    """Measure, print a table, and write the picture if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="part of a function's name")
    parser.add_argument("--plot", type=Path, help="an SVG file to write")
    options = parser.parse_args()
    if lacking := servers.missing():
        parser.error(f"apt-get install {' '.join(lacking)}")
    # Otherwise a run that `timeout` ends would leave its servers running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    rows = []
    for group in MEASUREMENTS:
        chosen = [each for each in group if options.only in each.__name__]
        if not chosen:
            continue
        with new_stage() as stage:
            for measure in chosen:
                print(measure.__name__, flush=True)
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
