"""The cache is trusted while it is surely right: grey faults of Redis.

It answers and refuses, comes back with yesterday's data, is far away, or is
there for one process only. First with processes of ours over a Redis of the
test's own, then step by step with our objects in this process.
"""

import asyncio
import contextlib
import signal
import time
import uuid

import psycopg
import pytest
import redis as redis_client
import servers
from conftest import ITEMS
from faults import REFUSALS, calling, proxying, refusing, through, user_of
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from orders import cache, events
from orders.auth import Accounts, UserCreate
from orders.cache import RedisAway, RedisCache
from orders.db import Database
from orders.events import Keeper
from orders.logs import Outage
from orders.models import OrderCreate, OrderStatus
from orders.service import OrderService

BOUND = 0.0  # seconds after a PATCH's answer; then each read must show it
RETURN = 2.0  # seconds after Redis works; then it is used again
STATUSES = ["PENDING", "PAID", "SHIPPED"]


class Shop:
    """Two processes that share orders, and readers who note what is old."""

    def __init__(self, user, clients):
        """Take a user, and a client of each process."""
        self.user, self.clients = user, clients
        self.changed = {}  # when each order's change was answered, and to what
        self.old, self.seconds, self.reads = [], [], 0

    def cached(self, count=3):
        """Return orders that are in the cache, for both processes."""
        orders = [self.user.order() for _ in range(count)]
        for order in orders:
            self.changed[order] = [(time.monotonic(), 0)]
            for client in self.clients:
                self.wait_for_hit(client, order)
        return orders

    def get(self, client, order):
        """Read an order."""
        return client.get(f"/orders/{order}", headers=self.user.headers)

    def wait_for_hit(self, client, order, timeout=5.0):
        """Wait until an order comes from the cache."""
        servers.wait_until(
            lambda: self.get(client, order).headers["x-cache"] == "hit",
            timeout,
        )

    def change(self, client, order, status):
        """Move an order on, and note when that was answered."""
        answer = client.patch(
            f"/orders/{order}",
            headers=self.user.headers,
            json={"status": status},
        )
        assert answer.status_code == 200, answer.text
        change = time.monotonic(), STATUSES.index(status)
        self.changed[order].append(change)

    def read(self, client, bound=BOUND):
        """Read each order once, and note what is older than it may be."""
        for order, changes in list(self.changed.items()):
            began = time.monotonic()
            oldest = max(
                n for at, n in changes if at + bound <= began or not n
            )
            answer = self.get(client, order)
            self.seconds.append(time.monotonic() - began)
            self.reads += 1
            status = answer.json().get("status", "PENDING")
            if not answer.is_success or STATUSES.index(status) < oldest:
                self.old.append((client.base_url, answer.text, began))

    @contextlib.contextmanager
    def watched(self):
        """Read in both processes for the time of the block."""
        with calling(*(lambda c=c: self.read(c) for c in self.clients)):
            yield
        assert self.old == []
        assert self.reads > 50

    def trust(self):
        """Return what each process says of the cache."""
        return {c.get("/ready").json()["cache"] for c in self.clients}

    def wait_for_trust(self, timeout=RETURN):
        """Wait until all is well: hits in both processes."""
        servers.wait_until(lambda: self.trust() == {"trusted"}, timeout)
        fresh = self.user.order()
        for client in self.clients:
            self.wait_for_hit(client, fresh, 1)


@pytest.fixture
def open_shop(run, http):
    """Return what opens a shop, each of its processes with its settings."""

    def start(*settings, **env):
        env = {"RATE_LIMIT": "1000000/minute", **env}
        clients = [http(run(servers.api, each, **env)) for each in settings]
        shop = Shop(user_of(clients[0]), clients)
        servers.wait_until(lambda: shop.trust() == {"trusted"}, 5)
        return shop

    return start


# --- It refuses -------------------------------------------------------------


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_redis_that_refuses_hides_no_change(
    private_redis, open_shop, rounds, fault
):
    """It answers reads with the old status, which nobody asks for."""
    redis, settings = private_redis
    shop = open_shop(settings, settings)
    for _ in rounds(1):
        orders = shop.cached()
        with shop.watched():
            with refusing(redis, fault):
                for client, order in zip(
                    shop.clients * 2, orders, strict=False
                ):
                    shop.change(client, order, "PAID")
                time.sleep(1.5)
                assert shop.trust() == {"untrusted"}
                shop.change(shop.clients[1], orders[0], "SHIPPED")
                time.sleep(1.5)
            shop.wait_for_trust()
        assert quantile(shop.seconds, 0.99) < 0.2


def quantile(seconds, share):
    """Return what so many of the durations do not exceed."""
    return sorted(seconds)[int(len(seconds) * share)]


# --- It comes back with what it knew ----------------------------------------


def test_a_snapshot_from_before_a_change_is_not_read(
    private_redis, open_shop, rounds
):
    """Redis is killed, and starts with the old status in it."""
    redis, settings = private_redis
    shop = open_shop(settings, settings)
    for _ in rounds(1):
        orders = shop.cached()
        with redis_client.Redis(port=redis.port) as client:
            client.save()
        for order in orders:
            shop.change(shop.clients[0], order, "PAID")
        wait_until_told(settings)
        redis.kill()
        redis.start()
        with redis_client.Redis(port=redis.port) as client:
            assert len(client.keys(f"*{orders[0]}")) == 1
        with shop.watched():
            shop.wait_for_trust()
            time.sleep(1)


@pytest.mark.parametrize("case", ["there", "and back", "unnoticed"])
def test_a_replica_that_is_promoted_hides_no_change(
    private_redis, open_shop, tmp_path, case
):
    """It lacks the last changes; the first one may lead again.

    Or it is a replica now, and nobody ends the connections to it.
    """
    first, settings = private_redis
    (tmp_path / "second").mkdir()
    with (
        servers.running(servers.redis(tmp_path / "second")) as second,
        proxying(first) as line,
    ):
        settings = through(line, settings, first)
        shop = open_shop(settings, settings)
        orders = shop.cached()
        pair = [(first, second), (second, first)]
        follow(second, first)
        ways = 2 if case == "and back" else 1
        for number, (old, new) in enumerate(pair[:ways], 1):
            with redis_client.Redis(port=new.port) as client:
                client.replicaof("NO", "ONE")  # and misses what comes
            if number == 1:
                shop.change(shop.clients[0], orders[0], "PAID")
                wait_until_told(settings)
            line.target = new.port
            if case != "unnoticed":
                line.end_present()
            follow(old, new)
            shop.wait_for_trust(5)
            shop.change(shop.clients[1], orders[number], "PAID")
            with shop.watched():
                time.sleep(1.5)


def wait_until_told(settings):
    """Wait until no keeper would tell Redis of the changes again."""
    unmarked = (
        "SELECT 1 FROM events WHERE processed_at IS NULL"
        " AND kind = 'status_changed'"
    )
    with psycopg.connect(settings.database_url, autocommit=True) as database:
        servers.wait_until(
            lambda: database.execute(unmarked).fetchone() is None, 5
        )


def follow(replica, primary):
    """Make a server another's replica, and wait until it has all."""
    with redis_client.Redis(port=replica.port) as client:
        client.replicaof("127.0.0.1", primary.port)
        servers.wait_until(
            lambda: client.info()["master_link_status"] == "up", 10
        )


# --- The network ------------------------------------------------------------


def test_a_process_that_is_cut_off_is_spoken_for(
    private_redis, open_shop, rounds
):
    """The other one tells Redis what it could not."""
    redis, settings = private_redis
    with proxying(redis) as line:
        shop = open_shop(through(line, settings, redis), settings)
        for _ in rounds(1):
            orders = shop.cached(6)
            with shop.watched():
                line.hold(new=True)
                for order in orders:
                    shop.change(shop.clients[0], order, "PAID")
                    time.sleep(0.3)
                ready = [c.get("/ready").json() for c in shop.clients]
                time.sleep(1)
                line.release()
                shop.wait_for_trust(3)
            assert [r["cache"] for r in ready] == ["untrusted", "trusted"]


def test_a_redis_that_is_far_away_is_used(private_redis, open_shop):
    """Reads over 70 ms become hits, and stay so."""
    redis, settings = private_redis
    with proxying(redis) as line:
        line.delay = 0.07
        settings = through(line, settings, redis)
        shop = open_shop(settings, settings)
        (order,) = shop.cached(1)
        hits = [
            shop.get(client, order).headers["x-cache"]
            for client in shop.clients * 20
        ]
        assert hits.count("hit") > 30  # on a machine that is busy
        shop.change(shop.clients[0], order, "PAID")
        shop.read(shop.clients[1], bound=0)
        assert shop.old == []


# --- It is full of something else -------------------------------------------

JUNK = [
    b"junk",
    b"\xff\xfe\x00",
    b"1 LOST {}",
    b"x PENDING {}",
    b"1 \xff {}",
    b"9" * 5000 + b" PENDING {}",
    ["a", "list"],
    {"a": "hash"},
]


def test_what_is_no_order_is_a_miss(private_redis, open_shop):
    """Whatever has its key, the order is answered, and can be changed."""
    redis, settings = private_redis
    shop = open_shop(settings)
    with redis_client.Redis(port=redis.port) as client:
        run_id = client.info()["run_id"]
        for junk in JUNK:
            (order,) = shop.cached(1)
            (key,) = client.keys(f"*{order}")
            assert run_id in key.decode()
            client.delete(key)
            if isinstance(junk, bytes):
                client.set(key, junk)
            elif isinstance(junk, list):
                client.rpush(key, *junk)
            else:
                client.hset(key, mapping=junk)
            read = shop.get(shop.clients[0], order)
            assert (read.status_code, read.headers["x-cache"]) == (200, "miss")
            assert read.json()["id"] == order
            shop.change(shop.clients[0], order, "PAID")
            shop.read(shop.clients[0], bound=0)
    assert shop.old == []
    assert shop.trust() == {"trusted"}


# --- Step by step -----------------------------------------------------------


class Bench:
    """Orders in PostgreSQL, and what processes of ours are made of."""

    def __init__(self, settings):
        """Prepare; nothing connects yet."""
        self.settings = settings
        self.databases, self.caches, self.tasks = [], [], []

    async def __aenter__(self):
        """Register a user, who owns all orders."""
        self.main = self.database()
        draft = UserCreate(email="ada@example.com", password="long enough")
        accounts = Accounts(self.main, self.settings)
        self.user = (await accounts.register(draft)).id
        return self

    async def __aexit__(self, *_):
        """Close what was opened."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for each in (*self.caches, *self.databases):
            await each.close()

    def database(self, url=None):
        """Return a database."""
        self.databases.append(Database(url or self.settings.database_url))
        return self.databases[-1]

    def cache(self, url=None):
        """Return a cache, which nobody keeps."""
        self.caches.append(RedisCache(url or self.settings.redis_url))
        return self.caches[-1]

    def process(self, url=None):
        """Return the service and the keeper of a process."""
        database, shared = self.database(), self.cache(url)
        return OrderService(database, shared, frozenset()), Keeper(
            database, shared
        )

    def keep(self, keeper):
        """Let a keeper run until the end."""
        self.tasks.append(asyncio.create_task(keeper.run()))

    async def order(self, service):
        """Return a new order, which is in the cache."""
        draft = OrderCreate(items=ITEMS)
        order_id, _, _ = await service.create(self.user, draft)
        for _ in range(100):
            if await self.hit(service, order_id):
                return order_id
            await asyncio.sleep(0.02)
        raise AssertionError("it is never cached")

    async def hit(self, service, order_id):
        """Return whether a read comes from the cache."""
        return (await service.get(self.user, order_id))[1]

    async def status(self, service, order_id):
        """Return the status that a reader is told."""
        return (await service.get(self.user, order_id))[0].status


def stepped(production, use):
    """Give a bench to a coroutine."""

    async def run():
        async with Bench(production) as bench:
            await use(bench)

    asyncio.run(run())


def test_a_fill_that_was_held_back_for_long_is_refused(
    production, stack, monkeypatch
):
    """It arrives when the tombstone of a later change is gone."""
    monkeypatch.setattr(cache, "TOMBSTONE_TTL", 2)
    script = cache.FILL.replace(f"< {cache.MAX_FILL_AGE}", "< 1")
    monkeypatch.setattr(cache, "FILL", script)

    async def use(bench):
        with proxying(stack.redis) as line:
            slow, keeper = bench.process(
                through(line, production, stack.redis).redis_url
            )
            quick, other = bench.process()
            await keeper._make_round()
            await other._make_round()
            draft = OrderCreate(items=ITEMS)
            order_id, _, _ = await slow.create(bench.user, draft)
            # A reader's GET is answered, and its fill held back.
            send = RedisCache.fill

            def hold_and_fill(*arguments):
                line.hold()
                send(*arguments)

            monkeypatch.setattr(RedisCache, "fill", hold_and_fill)
            assert await bench.status(slow, order_id) == "PENDING"
            monkeypatch.setattr(RedisCache, "fill", send)
            await quick.change_status(
                bench.user, order_id, "PAID", expected=OrderStatus
            )
            for _ in range(2):  # it is told, and marked
                await other._make_round()
            await asyncio.sleep(2.5)
            line.release()
            await asyncio.sleep(0.2)
            await other._make_round()
            assert await bench.status(quick, order_id) == "PAID"

    stepped(production, use)


def test_a_flush_lets_nothing_old_in(production, stack, monkeypatch):
    """It takes the tombstones, while a fill is under way."""

    async def use(bench):
        service, keeper = bench.process()
        await keeper._make_round()
        draft = OrderCreate(items=ITEMS)
        order_id, _, _ = await service.create(bench.user, draft)
        held, fill = [], RedisCache.fill
        monkeypatch.setattr(
            RedisCache, "fill", lambda *given: held.append(given)
        )
        assert await bench.status(service, order_id) == "PENDING"
        monkeypatch.setattr(RedisCache, "fill", fill)
        await service.change_status(
            bench.user, order_id, "PAID", expected=OrderStatus
        )
        with redis_client.Redis(port=stack.redis.port) as client:
            client.flushall()
        fill(*held[0])
        assert await bench.status(service, order_id) == "PAID"
        await keeper._make_round()
        assert await bench.status(service, order_id) == "PAID"
        assert await bench.hit(service, await bench.order(service))

    stepped(production, use)


def test_a_look_that_comes_late_proves_nothing_new(production):
    """The trust is counted from when it began, not from when it came."""

    async def use(bench):
        _, keeper = bench.process()
        shared = keeper._cache
        await keeper._make_round()
        assert shared.trusted
        look, came = keeper._read_changes, asyncio.Event()

        async def look_slowly():
            found = await look()
            await came.wait()
            return found

        keeper._read_changes = look_slowly
        began = time.monotonic()
        while time.monotonic() < began + 1.2:
            await keeper._make_round()
        assert not shared.trusted
        came.set()
        await keeper._make_round()
        assert not shared.trusted
        await keeper._make_round()
        assert shared.trusted

    stepped(production, use)


def test_a_full_pool_does_not_hide_anothers_change(production, stack):
    """The keeper's look does not wait for those who wait for a row."""

    async def use(bench):
        with proxying(stack.redis) as line:
            cut_off, keeper = bench.process(
                through(line, production, stack.redis).redis_url
            )
            busy, other = bench.process()
            bench.keep(keeper)
            bench.keep(other)
            orders = [await bench.order(busy) for _ in range(2)]
            line.hold(new=True)
            with psycopg.connect(production.database_url) as lock:
                lock.execute(
                    "SELECT 1 FROM orders WHERE id = %s FOR UPDATE",
                    [orders[1]],
                )
                waiting = [
                    asyncio.create_task(
                        busy.change_status(
                            bench.user, orders[1], "PAID", expected=OrderStatus
                        )
                    )
                    for _ in range(30)
                ]
                await asyncio.sleep(0.1)
                await cut_off.change_status(
                    bench.user, orders[0], "PAID", expected=OrderStatus
                )
                await asyncio.sleep(BOUND)
                view = await busy._cache.get(orders[0])
                assert view is None or view.status == "PAID"
                assert busy._cache.trusted
            await asyncio.gather(*waiting, return_exceptions=True)

    stepped(production, use)


class Failing:
    """A database that raises what it was made with."""

    def __init__(self, error):
        """Take the error."""
        self.error, self.outage = error, Outage(__name__, "It")

    @property
    def keeper_engine(self):
        """Fail, as one does that cannot be connected to."""
        raise self.error


def test_a_look_that_fails_extends_no_trust(production):
    """But for a database that is away, where nothing changes meanwhile."""

    async def use(bench):
        _, keeper = bench.process()
        shared = keeper._cache
        await keeper._make_round()

        gone = OperationalError("SELECT", None, Exception("gone"))
        keeper._database = Failing(gone)
        await asyncio.sleep(0.7)
        await keeper._make_round()
        await asyncio.sleep(0.7)
        assert shared.trusted
        keeper._database = Failing(ZeroDivisionError())
        with pytest.raises(ZeroDivisionError):
            await keeper._make_round()
        await asyncio.sleep(0.4)
        assert not shared.trusted

    stepped(production, use)


class Canceled(Exception):
    """A statement that took too long, as the driver raises it."""

    sqlstate = "57014"


def test_a_look_that_is_canceled_extends_no_trust(production):
    """Others go on and change orders meanwhile."""

    async def use(bench):
        _, keeper = bench.process()
        await keeper._make_round()
        slow = OperationalError("SELECT", None, Canceled())
        keeper._database = Failing(slow)
        ends_at = time.monotonic() + 1.2
        while time.monotonic() < ends_at:
            await keeper._make_round()
            await asyncio.sleep(0.1)
        assert not keeper._cache.trusted

    stepped(production, use)


def test_without_the_database_a_fresh_keeper_trusts_nothing(production, stack):
    """It knows of no change that the cache may not have."""

    async def use(bench):
        away = f"postgresql://postgres@127.0.0.1:{servers.free_port()}/x"
        shared = bench.cache()
        keeper = Keeper(bench.database(away), shared)
        await keeper._make_round()
        assert not shared.trusted

    stepped(production, use)


def test_a_change_is_not_told_under_the_name_of_no_server(production):
    """The connection may be made in the moment of the change."""

    async def use(bench):
        shared = bench.cache()
        await shared.write_tombstones([])
        epoch, shared._epoch = shared._epoch, ""  # as between connections
        order_id = uuid.uuid4()
        change = asyncio.create_task(shared.invalidate(order_id))
        await asyncio.sleep(0)
        shared._epoch = epoch
        assert not await change
        assert await shared.invalidate(order_id)
        with redis_client.Redis.from_url(production.redis_url) as client:
            [key] = client.keys(f"*{order_id}")
            assert epoch in key.decode()

    stepped(production, use)


def test_a_change_is_told_until_redis_took_it(private_redis):
    """By the next keeper that can; then its event is marked."""
    redis, settings = private_redis

    async def use(bench):
        service, keeper = bench.process()
        await keeper._make_round()
        order_id = await bench.order(service)
        with refusing(redis, "no memory"):
            await service.change_status(
                bench.user, order_id, "PAID", expected=OrderStatus
            )
            assert not service._cache.trusted
            for _ in range(2):
                with pytest.raises(RedisAway):
                    await keeper._make_round()
            assert await unmarked(bench) == 1
        await keeper._make_round()
        assert service._cache.trusted
        assert await bench.status(service, order_id) == "PAID"
        await keeper._make_round()
        assert await unmarked(bench) == 0

    stepped(settings, use)


async def unmarked(bench):
    """Count the changes that the cache may not have."""
    async with bench.main.engine.connect() as connection:
        return await connection.scalar(
            text(
                "SELECT count(*) FROM events WHERE processed_at IS NULL"
                " AND kind = 'status_changed'"
            )
        )


def test_a_backlog_of_changes_is_told_before_the_cache_is_trusted(
    production, monkeypatch
):
    """However many there are."""
    monkeypatch.setattr(events, "MAX_CHANGES", 2)

    async def use(bench):
        service, keeper = bench.process()
        draft = OrderCreate(items=ITEMS)
        for _ in range(3):
            order_id, _, _ = await service.create(bench.user, draft)
            await service.change_status(
                bench.user, order_id, "PAID", expected=OrderStatus
            )
        await keeper._make_round()
        assert not service._cache.trusted
        await keeper._make_round()
        assert service._cache.trusted

    stepped(production, use)


def test_a_call_opens_no_connection(production):
    """It may be to another server than the one whose keys it has."""

    async def use(bench):
        shared = bench.cache()
        await shared.write_tombstones([])
        shared.trust_from(time.monotonic())
        queued = asyncio.create_task(shared.get(uuid.uuid4()))
        change = asyncio.create_task(shared.invalidate(uuid.uuid4()))
        await asyncio.sleep(0)
        await shared.close()
        assert await queued is None
        await change
        assert not shared._connection.is_connected

    stepped(production, use)


def test_no_call_waits_longer_than_the_limit_of_a_round_trip(private_redis):
    """Who waits behind a hung round trip fails with it."""
    redis, settings = private_redis

    async def run():
        shared = RedisCache(settings.redis_url)
        await shared.write_tombstones([])
        shared.trust_from(time.monotonic())
        redis.signal(signal.SIGSTOP)
        began, calls = time.monotonic(), []
        for _ in range(5):
            calls.append(asyncio.create_task(shared.invalidate(uuid.uuid4())))
            await asyncio.sleep(0.02)
        read = await shared.get(uuid.uuid4())
        read_after = time.monotonic() - began
        await asyncio.gather(*calls)
        seconds = time.monotonic() - began
        for _ in range(100):
            await shared.get(uuid.uuid4())
            await shared.invalidate(uuid.uuid4())
        at_once = time.monotonic() - began - seconds
        trusted = shared.trusted
        await shared.close()
        return read, read_after, seconds, at_once, trusted

    read, read_after, seconds, at_once, trusted = asyncio.run(run())

    assert read is None
    assert read_after < cache.TRIP_TIMEOUT + 0.2
    assert cache.TRIP_TIMEOUT <= seconds < cache.TRIP_TIMEOUT + 0.2
    assert at_once < 0.1
    assert not trusted
