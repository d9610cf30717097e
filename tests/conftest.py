"""Fixtures: the API in both modes, on real servers, and a user to drive it.

`embedded` needs nothing. `production` runs on private PostgreSQL, Redis and
RabbitMQ, started once by each of the processes that share the tests out; it is
skipped where they are not installed. A test that harms processes for seconds
is marked `fault`, and a test that keeps a core busy for seconds `long`: both
run when they are named, or with `--all`.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pika
import psycopg
import pytest
import redis
from alembic import command
from alembic.config import Config

os.environ["JWT_SECRET_KEY"] = "0123456789abcdef" * 4
for name in ("DATABASE_URL", "REDIS_URL", "RABBITMQ_URL", "RATE_LIMIT"):
    os.environ.pop(name, None)
# Without bytecode each process would compile all modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ["PYTEST_ADDOPTS"] = "-n 0"  # of the runs that a test starts

pytest.register_assert_rewrite("faults")

import servers
from fastapi import applications
from fastapi.openapi import utils
from fastapi.testclient import TestClient
from pika.adapters.blocking_connection import BlockingChannel
from pwdlib.hashers.argon2 import Argon2Hasher

from orders import auth
from orders.__main__ import ALEMBIC_INI
from orders.broker import QUEUE_ARGUMENTS
from orders.settings import Settings

servers.use_memory()

ROOT = Path(__file__).parent.parent
BYTECODE = {"__pycache__", "*.py[cod]"}
PASSWORD = "correct horse battery"
SECRET = "never-in-a-log"  # of the private servers, which take any
QUICK = "not fault and not long"
ITEMS = [{"name": "tea", "quantity": 3, "price": 0.1}]


# Fixtures that are dear to make: the tests that share one run in turn.
SHARED = ("frail_rabbitmq", "reader", "server")
# The modules in which a test that runs processes harms them, or waits long.
FAULTS = {"faults", "store_faults", "trust", "outages", "loads", "tasks"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a run take all tests, let faults last, and repeat a run."""
    group = parser.getgroup("orders")
    group.addoption(
        "--all",
        action="store_true",
        help="run also what harms processes, or lasts",
    )
    group.addoption(
        "--fault-minutes",
        type=float,
        default=0,
        help="go on this long in each test of a fault; default: a few seconds",
    )
    group.addoption(
        "--fault-seed",
        type=int,
        default=random.SystemRandom().randrange(10**6),
        help="choose moments and victims as the run that printed this seed",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Leave out what lasts, unless all or certain tests are asked for."""
    option = config.option
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    if not (option.all or option.keyword or option.markexpr or named):
        option.markexpr = QUICK


def pytest_xdist_auto_num_workers() -> int:
    """Return how many processes share the tests: many of them wait."""
    return 2 * (os.cpu_count() or 1) + 1


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark faults, and group the tests that share a fixture.

    What is slow mostly waits. It is spread between what is quick, so that a
    processor has work meanwhile, but for the end: there all are quick, and
    all processes end at the same time.
    """
    for item in items:
        fixtures = item.fixturenames
        module = item.path.stem.removeprefix("test_")
        harms_ours = module in FAULTS and "run" in fixtures
        if harms_ours or "frail_rabbitmq" in fixtures:
            item.add_marker("fault")
        if "reader" in fixtures:  # makes an environment like a reader's
            item.add_marker("long")
        for shared in SHARED:
            if shared in fixtures:
                item.add_marker(pytest.mark.xdist_group(shared))
    slow = [item for item in items if {"fault", "long"} & set(item.keywords)]
    quick = [item for item in items if item not in slow]
    place = {
        item: share * number / len(part)
        for part, share in ((slow, 0.9), (quick, 1))
        for number, item in enumerate(part)
    }
    items.sort(key=place.__getitem__)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[
    None, pytest.TestReport, pytest.TestReport
]:
    """Fail a test that is skipped in CI, where nothing may be missing."""
    report = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    if skipped and os.environ.get("CI"):
        report.outcome = "failed"
        report.longrepr = f"Skipped in CI. {reason(report)}"
    return report


def reason(report: pytest.TestReport) -> str:
    """Return why a test was skipped."""
    assert isinstance(report.longrepr, tuple)
    return report.longrepr[2].removeprefix("Skipped: ")


def pytest_report_header(config: pytest.Config) -> str:
    """Print the seed, which repeats a run."""
    return f"faults: --fault-seed={config.getoption('fault_seed')}"


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say what was left out, and how it would be run."""
    skipped = terminalreporter.getreports("skipped")
    counted = Counter(map(reason, skipped))
    lines = [f"{number} tests. {why}" for why, number in counted.items()]
    if config.option.markexpr == QUICK:
        lines.append("What harms processes, or lasts: --all runs it, too")
    if lines:
        terminalreporter.section("left out")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Return what chooses moments and victims."""
    seed = request.config.getoption("fault_seed")
    return random.Random(f"{seed} {request.node.name}")


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> Callable[[int], Iterator[int]]:
    """Return what counts rounds: a few, or for as long as was asked for."""
    minutes = request.config.getoption("fault_minutes")

    def count(few: int) -> Iterator[int]:
        end = time.monotonic() + 60 * minutes
        for number in itertools.count():
            if number >= few and time.monotonic() >= end:
                return
            yield number

    return count


@dataclass(frozen=True)
class Stack:
    """The URLs of the private servers of a session."""

    postgres: servers.Server
    redis: servers.Server
    rabbitmq: servers.Server

    @property
    def redis_url(self) -> str:
        """Return where Redis is."""
        return f"redis://127.0.0.1:{self.redis.port}/0"

    @property
    def rabbitmq_url(self) -> str:
        """Return where RabbitMQ is."""
        return servers.rabbitmq_url(self.rabbitmq)

    def database_url(self, name: str) -> str:
        """Return where one of the databases is."""
        return f"postgresql://postgres@127.0.0.1:{self.postgres.port}/{name}"

    def copy_database(self, name: str, of: str = "orders") -> str:
        """Make a database like another one; return where it is."""
        url = self.database_url("postgres")
        with psycopg.connect(url, autocommit=True) as connection:
            copy = f"CREATE DATABASE {name} TEMPLATE {of}"
            if connection.info.server_version >= 150_000:
                copy += " STRATEGY FILE_COPY"  # as ever; a third of the time
            connection.execute(copy)
        return self.database_url(name)


@pytest.fixture(scope="session", autouse=True)
def cheap_passwords() -> Iterator[None]:
    """Let this process hash them in no time: most tests register users."""
    hasher = Argon2Hasher(memory_cost=64, time_cost=1, parallelism=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(auth, "passwords", hasher)
        yield


@pytest.fixture(scope="session", autouse=True)
def cheap_schemas() -> Iterator[None]:
    """Let this process describe the API once: each app does at its start."""
    schemas: dict[str, str] = {}

    def get_openapi(**app: object) -> dict[str, object]:
        """Return the schema of an app; its limit is in the description."""
        limit = str(app["description"])
        if limit not in schemas:
            schemas[limit] = json.dumps(utils.get_openapi(**app))
        return json.loads(schemas[limit])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(applications, "get_openapi", get_openapi)
        yield


@pytest.fixture(scope="session")
def postgres_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return what PostgreSQL keeps of a migrated `orders`, to be copied."""
    server = servers.postgres(tmp_path_factory.mktemp("postgres"))
    with servers.running(server):
        address = f"postgresql://postgres@127.0.0.1:{server.port}"
        with psycopg.connect(f"{address}/postgres", autocommit=True) as admin:
            admin.execute("CREATE DATABASE orders")
        migrate(f"{address}/orders")
        server.process.send_signal(signal.SIGINT)  # a fast shutdown
        server.process.wait()
        yield server.data


@pytest.fixture(scope="session")
def stack(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Stack]:
    """Run private servers, with a migrated database to copy."""
    if lacking := servers.missing():
        pytest.skip(f"apt-get install {' '.join(lacking)} to run this")
    folder = tmp_path_factory.mktemp("stack")
    files = request.getfixturevalue("postgres_files")
    with (
        servers.running(servers.postgres(folder, files)) as postgres,
        servers.running(servers.redis(folder)) as redis_server,
        servers.running(servers.rabbitmq(folder)) as rabbitmq,
    ):
        yield Stack(postgres, redis_server, rabbitmq)


@pytest.fixture(scope="session")
def databases() -> Iterator[int]:
    """Count, to name databases."""
    return iter(range(1_000_000))


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a migrated SQLite database, to be copied."""
    path = tmp_path_factory.mktemp("embedded") / "orders.db"
    migrate(f"sqlite:///{path}")
    return path


@pytest.fixture
def embedded(tmp_path: Path, empty_database: Path) -> Settings:
    """Return settings of an empty machine, the rate limit off."""
    url = f"sqlite:///{shutil.copy(empty_database, tmp_path)}"
    secret = os.environ["JWT_SECRET_KEY"]
    return Settings(
        jwt_secret_key=secret,
        database_url=url,
        redis_url=None,  # whatever the developer's .env says
        rabbitmq_url=None,
        rate_limit="",
    )


@pytest.fixture
def production(
    request: pytest.FixtureRequest,
    stack: Stack,
    embedded: Settings,
    databases: Iterator[int],
) -> Settings:
    """Return settings of the real stack, on an empty database of its own."""
    name = f"test{next(databases)}"
    database_url = stack.copy_database(name)
    with redis.Redis(port=stack.redis.port) as client:
        client.flushall()
    if "run" in request.fixturenames:  # no message of an earlier test
        with channel_at(stack.rabbitmq_url) as channel:
            purged(channel)
    return replace(
        embedded,
        database_url=database_url,
        redis_url=stack.redis_url,
        rabbitmq_url=stack.rabbitmq_url,
    )


@contextlib.contextmanager
def channel_at(rabbitmq_url: str) -> Iterator[BlockingChannel]:
    """Open a channel to a broker for the time of the block."""
    parameters = pika.URLParameters(rabbitmq_url)
    with pika.BlockingConnection(parameters) as connection:
        yield connection.channel()


def declared(channel: BlockingChannel) -> BlockingChannel:
    """Return the channel, with the queues declared as the service does."""
    for queue, arguments in QUEUE_ARGUMENTS.items():
        channel.queue_declare(queue, durable=True, arguments=arguments)
    return channel


def purged(channel: BlockingChannel) -> BlockingChannel:
    """Return the channel, with the queues declared, and empty."""
    declared(channel)
    # The delay queue, which is the last, fills the others.
    for queue in reversed(QUEUE_ARGUMENTS):
        channel.queue_purge(queue)
    return channel


@pytest.fixture(params=["embedded", "production"])
def settings(request: pytest.FixtureRequest) -> Settings:
    """Return settings of either mode: the test runs in both."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def http() -> Iterator[Callable[[servers.Server], httpx2.Client]]:
    """Return what makes an HTTP client for a process of ours."""
    with contextlib.ExitStack() as stack:
        yield lambda server: stack.enter_context(
            httpx2.Client(
                base_url=f"http://127.0.0.1:{server.port}",
                timeout=10,
                # Less than the server's, or a call may meet its end.
                limits=httpx2.Limits(keepalive_expiry=3),
            )
        )


@pytest.fixture(scope="session")
def tls_port() -> int:
    """Return where the broker that tests harm has a certificate."""
    return servers.free_port()


@pytest.fixture(scope="session")
def frail_rabbitmq(
    stack: Stack, tls_port: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[servers.Server]:
    """Run a broker that tests harm, and heal before they end."""
    folder = tmp_path_factory.mktemp("rabbitmq")
    broker = servers.rabbitmq_with_tls(folder, tls_port)
    with servers.running(broker) as server:
        yield server


@pytest.fixture
def private_rabbitmq(
    production: Settings, frail_rabbitmq: servers.Server
) -> tuple[servers.Server, Settings]:
    """Return a broker that may be harmed."""
    url = servers.rabbitmq_url(frail_rabbitmq)
    return frail_rabbitmq, replace(production, rabbitmq_url=url)


@pytest.fixture
def private_redis(
    production: Settings, tmp_path: Path
) -> Iterator[tuple[servers.Server, Settings]]:
    """Run a Redis that may be harmed."""
    with servers.running(servers.redis(tmp_path)) as server:
        url = f"redis://default:{SECRET}@127.0.0.1:{server.port}/0"
        yield server, replace(production, redis_url=url)


@pytest.fixture
def private_postgres(
    production: Settings, postgres_files: Path, tmp_path: Path
) -> Iterator[tuple[servers.Server, Settings]]:
    """Run a database that may be harmed."""
    server = servers.postgres(tmp_path, postgres_files)
    with servers.running(server):
        address = f"127.0.0.1:{server.port}"
        url = f"postgresql://postgres:{SECRET}@{address}/orders"
        yield server, replace(production, database_url=url)


@pytest.fixture
def run(
    tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., servers.Server]]:
    """Return what runs an API or a worker until the test ends."""
    fault = request.node.get_closest_marker("fault")
    with contextlib.ExitStack() as stack:

        def start(factory, settings, **env):
            env = environment(settings) | env
            if fault and factory is servers.api:  # other tests cover it
                env[servers.COVERAGE] = ""
            server = factory(tmp_path, env)
            return stack.enter_context(servers.running(server))

        yield start


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[servers.Server]:
    """Run the service embedded, without a limit of calls."""
    folder = tmp_path_factory.mktemp("server")
    with servers.running(servers.orders(folder)) as server:
        yield server


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of the tree, without what git ignores but bytecode."""
    ignored = (ROOT / ".gitignore").read_text().split()
    patterns = {pattern.rstrip("/") for pattern in ignored}
    return shutil.copytree(
        ROOT,
        tmp_path / "orders",
        ignore=shutil.ignore_patterns(".git", *(patterns - BYTECODE)),
    )


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a reader: no setting, and nothing of ours."""
    env = servers.without_coverage()
    for name in ("JWT_SECRET_KEY", "VIRTUAL_ENV"):
        env.pop(name, None)
    venv = tmp_path_factory.mktemp("venv")
    env["UV_PROJECT_ENVIRONMENT"] = str(venv)
    subprocess.run(["uv", "sync", "--quiet"], cwd=ROOT, env=env, check=True)
    # And what is compiled already: to do it again takes ten seconds.
    packages = Path(sysconfig.get_path("purelib"))
    for compiled in packages.rglob("__pycache__"):
        theirs = venv / compiled.relative_to(sys.prefix)
        shutil.copytree(compiled, theirs, dirs_exist_ok=True)
    cache = ROOT / ".mypy_cache"  # or it would read all libraries again
    return env | {"MYPY_CACHE_DIR": str(cache)}


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """Drive the app in this process, without a token."""
    # Late: what the module logs when it is imported would end the output.
    from orders.api import create_app

    with TestClient(create_app(settings)) as client:
        yield client


@pytest.fixture
def ada(client: TestClient) -> "User":
    """Return a registered user."""
    return User(client, "ada@example.com")


@pytest.fixture
def bob(client: TestClient) -> "User":
    """Return another registered user."""
    return User(client, "bob@example.com")


class User:
    """A user who is registered and logged in, over any HTTP client."""

    def __init__(self, client: httpx2.Client, email: str) -> None:
        """Register, and log in."""
        self.client = client
        account = {"email": email, "password": PASSWORD}
        registered = client.post("/register/", json=account)
        assert registered.status_code == 201, registered.text
        self.id = registered.json()["id"]
        form = {"username": email, "password": PASSWORD}
        token = client.post("/token/", data=form).json()["access_token"]
        self.headers = {"Authorization": f"Bearer {token}"}

    def call(
        self, method: str, path: str, **options: object
    ) -> httpx2.Response:
        """Make a call with the user's token."""
        headers = {**self.headers, **options.pop("headers", {})}
        return self.client.request(method, path, headers=headers, **options)

    def create(self, items: object = None, **options: object):
        """Create an order and return the answer."""
        body = {"items": ITEMS if items is None else items}
        return self.call("POST", "/orders/", json=body, **options)

    def order(self) -> str:
        """Create an order and return its id."""
        created = self.create()
        assert created.status_code == 201, created.text
        return created.json()["id"]

    def get(self, order_id: str, **options: object) -> httpx2.Response:
        """Read an order."""
        return self.call("GET", f"/orders/{order_id}", **options)

    def change(
        self, order_id: str, status: str, **options: object
    ) -> httpx2.Response:
        """Change an order's status."""
        path, body = f"/orders/{order_id}", {"status": status}
        return self.call("PATCH", path, json=body, **options)

    def processed(self, order_id: str) -> bool:
        """Return whether the order's creation was processed."""
        events = self.call("GET", f"/orders/{order_id}/events").json()
        return events[0]["processed_at"] is not None


def replace(settings: Settings, **changes: object) -> Settings:
    """Return settings with some changed."""
    return settings.model_copy(update=changes)


def migrate(database_url: str) -> None:
    """Bring a database to the newest revision."""
    os.environ["DATABASE_URL"] = database_url
    try:
        command.upgrade(Config(ALEMBIC_INI), "head")
    finally:
        del os.environ["DATABASE_URL"]


def environment(settings: Settings) -> dict[str, str]:
    """Return the settings as environment variables, for a process."""
    return {
        "JWT_SECRET_KEY": settings.jwt_secret_key,
        "DATABASE_URL": settings.database_url,
        "REDIS_URL": settings.redis_url or "",
        "RABBITMQ_URL": settings.rabbitmq_url or "",
        "RATE_LIMIT": settings.rate_limit,
    }
