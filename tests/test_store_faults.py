"""Faults of Redis and PostgreSQL: no stale read, no hang, no 500.

Every process is a real one, and the servers that a test harms are its own.
"""

import asyncio
import contextlib
import itertools
import json
import re
import signal
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psycopg
import pytest
import redis as redis_client
import servers
from conftest import ITEMS, PASSWORD, SECRET, User, environment
from fastapi import Request
from fastapi.testclient import TestClient
from faults import Journal, calling, proxying, through, user_of
from sqlalchemy import text

from orders.__main__ import MAX_CONNECTIONS
from orders.api import create_app
from orders.auth import Accounts, UserCreate
from orders.cache import MemoryCache, RedisCache
from orders.db import API_DEADLINE, POOL_SIZE, Database, create_sync_engine
from orders.middleware import RateLimiter
from orders.models import TRANSITIONS, OrderCreate
from orders.service import OrderService

RANKS = {"PENDING": 0, "PAID": 1, "SHIPPED": 2}
WARNING = re.compile(r"^.{23} (?:WARNING|ERROR|CRITICAL) .*", re.MULTILINE)
WAITING = (
    "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
)
SECRETS = re.compile(rf"{SECRET}|{PASSWORD}|eyJ|argon2")


@contextlib.contextmanager
def harmed(server, fault):
    """Harm a server for the time of the block, then heal it."""
    if fault == "slow":
        server.delay = 0.5
    elif fault == "hung":
        server.signal(signal.SIGSTOP)
    elif fault == "killed":
        server.kill()
    else:  # PostgreSQL's fast shutdown
        server.process.send_signal(signal.SIGINT)
        server.process.wait(20)
    try:
        yield
    finally:
        if fault == "slow":
            server.delay = 0
        elif fault == "hung":
            server.signal(signal.SIGCONT)
        else:
            server.start()


def timed(call):
    """Return what a call returns, and the seconds that it took."""
    began = time.monotonic()
    return call(), time.monotonic() - began


def check_log(process, *, outages, lines):
    """Check that an outage is a few lines, and that no secret is told."""
    warnings = WARNING.findall(process.text())
    assert 0 < len(warnings) <= lines * outages, warnings
    assert SECRETS.search(process.text()) is None


# --- Redis ------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["killed", "hung", "slow"])
def test_reads_and_changes_work_without_redis(
    private_redis, run, http, rounds, chance, fault
):
    """Reads stay quick, and nothing stale comes back."""
    redis, settings = private_redis
    with proxying(redis) as proxy:
        settings = through(proxy, settings, redis)
        api = run(servers.api, settings, RATE_LIMIT="100000/minute")
        ada, victim = user_of(http(api)), proxy if fault == "slow" else redis
        for outages in rounds(1):
            ready = without_redis(ada, chance, lambda: harmed(victim, fault))
            assert fault == "slow" or ready["cache"] == "untrusted"
            check_log(api, outages=outages + 1, lines=2)


def without_redis(ada, chance, harm):
    """Read and change orders around an outage; return what /ready said."""
    orders, answers = [ada.order() for _ in range(5)], []

    def read():
        order = chance.choice(orders)
        answer, seconds = timed(lambda: ada.get(order))
        right = answer.is_success and answer.json()["id"] == order
        answers.append((right, seconds))

    for order in orders * 2:
        hit = ada.get(order).headers["x-cache"]
    assert hit == "hit"
    with calling(read, read, read, read):
        time.sleep(chance.uniform(0.2, 0.6))
        with harm():
            time.sleep(chance.uniform(2, 3))
            ready, ready_after = timed(lambda: ada.call("GET", "/ready"))
            for order in orders:
                assert ada.change(order, "PAID").status_code == 200
    time.sleep(1)

    for order in orders * 2:
        assert ada.get(order).json()["status"] == "PAID"
    seconds = sorted(seconds for _, seconds in answers)
    assert all(right for right, _ in answers)
    assert seconds[int(len(seconds) * 0.99)] < 0.5
    assert ready.status_code == 200
    assert ready_after < 2
    fresh = ada.order()
    servers.wait_until(lambda: ada.get(fresh).headers["x-cache"] == "hit", 3)
    return ready.json()


@pytest.mark.parametrize("fault", ["killed", "hung"])
def test_the_limit_holds_without_redis(
    private_redis, run, http, rounds, chance, fault
):
    """Each process counts by itself, and all together on its return."""
    redis, settings = private_redis
    apis = [run(servers.api, settings, RATE_LIMIT="20/hour") for _ in "12"]

    def codes(calls):
        """Return what the calls to each process are answered with."""
        get = [http(api).get for api in apis] * calls
        return Counter(get("/orders/user/1").status_code for get in get)

    for outages in rounds(1):
        for server in (redis, *apis) if outages else ():
            server.kill()  # forget what was counted
            server.start()
        for api in apis:  # until then a process counts by itself
            servers.wait_until(
                lambda api=api: (
                    http(api).get("/ready").json()["cache"] == "trusted"
                ),
                5,
            )
        assert codes(chance.randrange(1, 5)).keys() == {401}
        with harmed(redis, fault):
            assert codes(25) == {401: 40, 429: 10}
        time.sleep(1.1)
        after = codes(25)
        assert 0 < after[401] <= 20
        assert after[401] + after[429] == 50


def test_changes_leave_connections_to_readers_while_redis_hangs(
    private_redis, run, http, rounds
):
    """They wait for Redis with a locked row, but not for long."""
    redis, settings = private_redis
    api = run(servers.api, settings)
    ada = user_of(http(api))
    for _ in rounds(1):
        orders = [ada.order() for _ in range(24)]
        changes = [lambda o=o: ada.change(o, "PAID") for o in orders[:12]]
        reads = [lambda o=o: ada.get(o) for o in orders[12:]]
        servers.wait_until(
            lambda: ada.call("GET", "/ready").json()["cache"] == "trusted", 5
        )
        with harmed(redis, "hung"), ThreadPoolExecutor(24) as pool:
            jobs = [pool.submit(timed, change) for change in changes]
            time.sleep(0.1)  # all connections are theirs
            jobs += [pool.submit(timed, read) for read in reads]
            answers = [job.result() for job in jobs]

        assert {answer.status_code for answer, _ in answers} == {200}
        assert max(seconds for _, seconds in answers) < 2


# --- The rate limit ---------------------------------------------------------


def test_a_counter_that_lost_its_end_is_mended(private_redis, run, http):
    """Or its client would be refused for ever."""
    redis, settings = private_redis
    api = http(run(servers.api, settings, RATE_LIMIT="20/hour"))
    servers.wait_until(
        lambda: api.get("/ready").json()["cache"] == "trusted", 5
    )
    with redis_client.Redis(port=redis.port) as client:
        api.get("/orders/user/1")
        (key,) = client.keys("LIMIT*")
        client.persist(key)
        codes = [api.get("/orders/user/1").status_code for _ in range(30)]
        assert Counter(codes) == {401: 19, 429: 11}
        assert 3500 < client.ttl(key) <= 3600
        client.set(key, "junk")
        assert api.get("/orders/user/1").status_code == 401  # counts by itself


def test_a_call_is_counted_in_one_round_trip(stack):
    """However many limits there are."""
    trips = []

    async def count():
        shared = RedisCache(stack.redis_url)
        await shared.write_tombstones([])
        shared.trust_from(time.monotonic())
        trip = shared._batcher._flush
        shared._batcher._flush = lambda calls: (
            trips.append(calls) or trip(calls)
        )
        limiter = RateLimiter("5/minute;100/hour;1000/day", shared)
        client = str(uuid.uuid4()), 1
        request = Request({"type": "http", "client": client, "headers": []})
        budgets = [await limiter.count(request) for _ in range(6)]
        await shared.close()
        return [remaining for remaining, _, _ in budgets]

    assert asyncio.run(count()) == [4, 3, 2, 1, 0, -1]
    assert len(trips) == 6


# --- The cache --------------------------------------------------------------


class Race:
    """Readers of a few orders race writers; a read never goes back."""

    def __init__(self, user, chance):
        """Create orders, the first of which are at the front."""
        self.user, self.chance = user, chance
        self.orders, self.front = [], []
        self.known = {}  # the highest rank that is surely committed
        self.stale, self.reads = [], 0

    def advance(self, count=2):
        """Bring fresh orders to the front, and keep some old ones."""
        fresh = [self.user.order() for _ in range(count)]
        self.known |= dict.fromkeys(fresh, 0)
        self.orders = [*fresh, *self.orders[:2]]

    def change(self, client, status):
        """Move an order on; what is acknowledged is known."""
        order = self.chance.choice(self.orders)
        answer = client.patch(
            f"/orders/{order}",
            headers=self.user.headers,
            json={"status": status},
        )
        if answer.is_success:
            self.learn(order, RANKS[status])

    def learn(self, order, rank):
        """Remember a rank; what is read from now on must not be below."""
        self.known[order] = max(rank, self.known[order])

    def read(self, client, order=None):
        """Read an order, and remember if it is older than it must be."""
        order = order or self.chance.choice(self.orders)
        oldest = self.known[order]
        answer = client.get(f"/orders/{order}", headers=self.user.headers)
        rank = RANKS[answer.json()["status"]]
        self.reads += 1
        if rank < oldest:
            self.stale.append((order, oldest, rank))

    def witness(self, client):
        """Learn from the database what is committed, and read at once."""
        order = self.chance.choice(self.orders)
        path, headers = f"/orders/{order}", self.user.headers
        events = client.get(f"{path}/events", headers=headers).json()
        self.learn(order, len(events) - 1)
        self.read(client)


@pytest.mark.parametrize("fault", ["dozing", "flushed"])
def test_no_read_is_older_than_an_acknowledged_change(
    production, run, http, rounds, chance, fault
):
    """Two APIs share orders; one dozes off, or the cache forgets."""
    processes = [run(servers.api, production) for _ in range(2)]
    apis = [http(process) for process in processes]

    def doze():
        """Let a reader find an order now, and cache it some time later."""
        processes[1].signal(signal.SIGSTOP)
        time.sleep(chance.uniform(0, 0.04))
        processes[1].signal(signal.SIGCONT)

    race = Race(user_of(apis[0]), chance)
    calls = [lambda api=api: race.read(api) for api in [*apis, apis[1]] * 2]
    calls += [
        lambda status=status: race.change(apis[0], status)
        for status in ("PAID", "SHIPPED")
    ]
    if fault == "flushed":
        redis = redis_client.from_url(production.redis_url)
        calls.append(redis.flushall)
    else:
        calls += [lambda api=api: race.witness(api) for api in apis]
        calls.append(doze)
    race.advance()
    with calling(*calls):
        for _ in rounds(80):
            time.sleep(0.05)
            race.advance()
            assert race.stale == []

    for order in race.known:  # what was cached wrongly stays so
        race.read(apis[0], order)
    assert race.stale == []
    assert race.reads > 500


def test_a_writer_that_dies_leaves_nothing_stale(
    production, run, http, rounds, chance
):
    """The other API reads what was committed, whenever one is killed."""
    doomed, other = (run(servers.api, production) for _ in range(2))
    race = Race(user_of(http(other)), chance)
    readers, writers = [http(other)] * 4, [http(doomed)] * 8
    for deaths in rounds(3):
        if deaths:
            doomed.start()
        race.advance(20)
        fresh = race.orders[:20]
        for order in fresh:
            race.user.get(order)  # into the cache
        with calling(
            *(lambda c=c: race.witness(c) for c in readers),
            *(lambda c=c: race.change(c, "PAID") for c in writers),
        ):
            while not any(race.known[order] for order in fresh):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.02))
            doomed.kill()
            time.sleep(0.5)

    assert race.stale == []
    assert race.reads > 50


# --- PostgreSQL -------------------------------------------------------------


def call_all(user, order_id):
    """Make each call that needs the database, all at once."""
    account = {"email": f"{uuid.uuid4()}@example.com", "password": PASSWORD}
    form = {"username": account["email"], "password": PASSWORD}
    post = user.client.post
    calls = [
        lambda: post("/register/", json=account),
        lambda: post("/token/", data=form),
        lambda: user.create(),
        lambda: user.create(headers={"Idempotency-Key": "a-key"}),
        lambda: user.get(order_id),
        lambda: user.change(order_id, "PAID"),
        lambda: user.call("GET", f"/orders/{order_id}/events"),
        lambda: user.call("GET", f"/orders/user/{user.id}"),
    ] * 3
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(timed, calls))


def check_refusals(answers):
    """Check that whoever was not served was told in time to come back."""
    refused = [answer for answer, _ in answers if answer.status_code >= 500]
    assert {answer.status_code for answer in refused} == {503}
    assert all(answer.headers["Retry-After"] for answer in refused)
    assert max(seconds for _, seconds in answers) < 5


def check_return(user):
    """Check that all is well again within 5 s."""
    back = time.monotonic()
    servers.wait_until(lambda: user.create().status_code == 201, 5)
    servers.wait_until(lambda: user.call("GET", "/ready").is_success, 5)
    assert time.monotonic() - back < 5
    after = Counter(a.status_code for a, _ in call_all(user, user.order()))
    assert not any(code >= 500 for code in after), after


@pytest.mark.parametrize("fault", ["restarted", "killed", "hung"])
def test_a_lost_database_is_a_503_until_it_is_back(
    private_postgres, run, http, rounds, chance, fault
):
    """Clients are told to come back, in time, and find all well."""
    postgres, settings = private_postgres
    api = run(servers.api, settings)
    ada, load = user_of(http(api)), []
    for outages in rounds(1):
        call_all(ada, ada.order())  # open all connections of the pool
        order_id = ada.order()  # never read, hence not in the cache
        with calling(*[lambda: load.append(timed(ada.create))] * 4):
            time.sleep(chance.uniform(0, 0.5))
            with harmed(postgres, fault):
                end = time.monotonic() + (10 if fault == "hung" else 2)
                ready, ready_after = timed(lambda: ada.call("GET", "/ready"))
                answers = call_all(ada, order_id)
                health = ada.call("GET", "/health")
                time.sleep(max(0, end - time.monotonic()))
        check_return(ada)

        assert (ready.status_code, health.status_code) == (503, 200)
        assert ready_after < 2
        assert {answer.status_code for answer, _ in answers} == {503}
        check_refusals(answers + load)
        check_log(api, outages=outages + 1, lines=2)


def test_a_full_pool_is_a_503_until_it_is_free(
    private_postgres, run, http, rounds
):
    """Changes that wait for a locked row hold up no one for long."""
    _, settings = private_postgres
    api = run(servers.api, settings)
    ada = user_of(http(api))
    for outages in rounds(1):
        order_id, load = ada.order(), []
        calls = [lambda o=order_id: ada.change(o, "PAID")] * 30
        calls += [ada.create] * 5
        calls = [lambda c=c, load=load: load.append(timed(c)) for c in calls]
        with psycopg.connect(settings.database_url) as connection:
            connection.execute("SELECT * FROM orders FOR UPDATE")
            with calling(*calls):
                time.sleep(6)
                health = ada.call("GET", "/health")
                waiting = connection.execute(WAITING).fetchone()[0]
        check_return(ada)

        assert health.is_success
        assert 0 < waiting <= POOL_SIZE  # nobody waits on for a lost client
        check_refusals(load)
        check_log(api, outages=outages + 1, lines=2)


def test_a_locked_order_holds_up_no_reader(
    private_postgres, run, http, rounds
):
    """Others' reads, and its own, are answered while changes wait for it."""
    _, settings = private_postgres
    api = run(servers.api, settings)
    ada = user_of(http(api))
    for _ in rounds(1):
        orders = [ada.order() for _ in range(20)]
        change = partial(ada.change, orders[0], "PAID")
        with (
            psycopg.connect(settings.database_url) as connection,
            ThreadPoolExecutor(28) as pool,
        ):
            connection.execute(
                "SELECT 1 FROM orders WHERE id = %s FOR UPDATE", orders[:1]
            )
            changes = [
                pool.submit(timed, change) for _ in range(POOL_SIZE - 2)
            ]
            time.sleep(0.2)
            reads = list(
                pool.map(lambda order: timed(lambda: ada.get(order)), orders)
            )
            answers = [change.result() for change in changes]
            connection.rollback()

        assert {answer.status_code for answer, _ in reads} == {200}
        assert max(seconds for _, seconds in reads) < API_DEADLINE
        assert {answer.status_code for answer, _ in answers} == {503}
        assert max(seconds for _, seconds in answers) < API_DEADLINE + 1


def test_a_bad_row_fails_alone(settings, rounds):
    """A user who is gone gets a 401, who shares their trip gets an order."""
    with TestClient(create_app(settings)) as client:
        good = [User(client, f"{n}@example.com") for n in range(3)]
        gone = User(client, "gone@example.com")
        forget(settings, gone)
        for _ in rounds(3):
            users = [*good, gone, *good, gone, *good] * 3
            with ThreadPoolExecutor(len(users)) as pool:
                answers = list(pool.map(lambda user: user.create(), users))
            codes = [answer.status_code for answer in answers]
            assert codes == [401 if user is gone else 201 for user in users]
            kept = [a.json()["id"] for a in answers if a.is_success]
            assert {good[0].get(o).status_code for o in kept} == {200, 404}
            assert len({*kept}) == len(kept)


def forget(settings, user):
    """Delete a user who has no orders."""
    engine = create_sync_engine(settings.database_url)
    with engine.begin() as connection:
        connection.execute(
            text("DELETE FROM users WHERE id = :id"), {"id": user.id}
        )
    engine.dispose()


SLOW_INSERTS = [
    "CREATE FUNCTION doze() RETURNS trigger LANGUAGE plpgsql AS"
    " $$ BEGIN PERFORM pg_sleep(0.005); RETURN new; END $$",
    "CREATE TRIGGER doze BEFORE INSERT ON orders"
    " FOR EACH ROW EXECUTE FUNCTION doze()",
]


def test_creates_that_repeat_each_others_keys_do_not_deadlock(production):
    """Two processes take shared trips with the same keys, in any order."""

    async def run():
        databases = [Database(production.database_url) for _ in range(2)]
        accounts = Accounts(databases[0], production)
        draft = UserCreate(email="ada@example.com", password="long enough")
        user = (await accounts.register(draft)).id
        services = [
            OrderService(each, MemoryCache(), frozenset())
            for each in databases
        ]
        async with databases[0].engine.begin() as connection:
            for statement in SLOW_INSERTS:
                await connection.execute(text(statement))
        order = OrderCreate(items=ITEMS)
        made = []
        for number in range(2):
            keys = [f"{number} {each}" for each in range(50)]
            made += await asyncio.gather(
                *(services[0].create(user, order, key=k) for k in keys),
                *(services[1].create(user, order, key=k) for k in keys[::-1]),
            )
        for each in databases:
            await each.close()
        return made

    made = asyncio.run(run())

    assert Counter(replayed for *_, replayed in made) == {
        True: 100,
        False: 100,
    }


# --- A crowd ----------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("size", [800, 1000])
def test_a_crowd_is_answered_or_told_to_come_back(
    private_redis, tmp_path, http, rounds, size
):
    """All at once, each with its own connection; nothing grows.

    Beyond the limit of connections, uvicorn answers without us.
    """
    _, settings = private_redis
    port = servers.free_port()
    env = environment(settings) | {"APP_PORT": str(port)}
    api = servers.Server(
        [servers.PYTHON / "orders"],
        port=port,
        folder=tmp_path,
        env=env | {"RATE_LIMIT": ""},
        ready=lambda: servers.healthy(port),
        ours=True,
    )
    with servers.running(api):
        ada, sizes = user_of(http(api)), []
        order = ada.order()
        for _ in rounds(3):
            answers = asyncio.run(crowd(size, port, order, ada.headers))
            codes = Counter(code for code, _ in answers)
            told = set() if size < MAX_CONNECTIONS else {503}
            assert codes.keys() <= {200, 201} | told, codes
            assert max(seconds for _, seconds in answers) < 10
            assert ada.get(order).is_success
            sizes.append(memory(api))
        assert sizes[-1] < sizes[0] + 30


async def crowd(size, port, order, headers):
    """Let many clients connect, then read and create all at once."""
    token = f"Authorization: {headers['Authorization']}\r\n"
    common = f"Host: x\r\nConnection: close\r\n{token}"
    body = json.dumps({"items": ITEMS})
    get = f"GET /orders/{order} HTTP/1.1\r\n{common}\r\n"
    post = (
        f"POST /orders/ HTTP/1.1\r\n{common}Content-Type: application/json"
        f"\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )
    gathered = asyncio.Barrier(size)

    async def call(request):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await gathered.wait()
        began = time.monotonic()
        writer.write(request.encode())
        answer = await reader.read()
        writer.close()
        return int(answer.split()[1]), time.monotonic() - began

    async with asyncio.timeout(60):
        return await asyncio.gather(*map(call, [get, post] * (size // 2)))


def memory(server):
    """Return how much memory a process has, in MiB."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


@pytest.mark.parametrize("fault", ["killed", "hung"])
def test_a_worker_waits_for_its_database(
    private_postgres, run, http, rounds, chance, fault
):
    """Orders that were due while it was away are processed on its return."""
    postgres, settings = private_postgres
    api, worker = run(servers.api, settings), run(servers.worker, settings)
    journal, ada = Journal(settings), user_of(http(api))
    for outages in rounds(1):
        if outages:
            api.start()
        with journal.filling(ada):
            time.sleep(chance.uniform(1, 2))
        servers.wait_until(lambda: not journal.where("attempts = 0"), 5)
        api.stop()  # the worker is alone, with what was published
        with harmed(postgres, fault):
            time.sleep(10 if fault == "hung" else 4)
        journal.settle(worker, timeout=15, unsaid=8)
        if fault == "killed":  # a short hang is no outage
            check_log(worker, outages=outages + 1, lines=2)


# --- The status -------------------------------------------------------------


def test_racing_changes_follow_the_rules(production, run, http, rounds):
    """Each transition happens once, and the history is a permitted way."""
    apis = [run(servers.api, production) for _ in range(2)]
    ada = user_of(http(apis[0]))
    paths = [http(api) for api in apis]

    def change(client, order, status):
        path, body = f"/orders/{order}", {"status": status}
        return client.patch(path, json=body, headers=ada.headers).status_code

    with ThreadPoolExecutor(12) as pool:
        for _ in rounds(30):
            order = ada.order()
            tries = list(itertools.product(paths, [order], [*TRANSITIONS] * 2))
            codes = list(pool.map(lambda each: change(*each), tries))
            events = ada.call("GET", f"/orders/{order}/events").json()
            way = ["PENDING", *(e["payload"]["status"] for e in events[1:])]
            assert codes.count(200) == len(way) - 1
            assert set(codes) <= {200, 409}
            for old, new in itertools.pairwise(way):
                assert new in TRANSITIONS[old]
            assert ada.get(order).json()["status"] == way[-1]
