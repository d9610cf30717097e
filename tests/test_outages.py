"""A dependency that nobody answers for, without any server."""

import asyncio
import time
import uuid
from contextlib import suppress

import pytest
import servers
from conftest import ITEMS, User, replace
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from orders import cache
from orders.api import create_app
from orders.auth import Accounts, UserCreate
from orders.cache import MemoryCache, OrderView, RedisAway, RedisCache
from orders.db import MAX_BATCH, Batcher, Database
from orders.logs import Outage
from orders.models import OrderCreate, OrderStatus
from orders.service import OrderService

ORDER = uuid.uuid4()
OTHER = uuid.uuid4()


def refused(scheme):
    """Return a URL where nobody listens."""
    return f"{scheme}://127.0.0.1:{servers.free_port()}/0"


def started(settings):
    """Return a client of an app with these settings."""
    return TestClient(create_app(settings))


def test_orders_are_taken_without_redis_and_rabbitmq(embedded):
    """Both away degrade the service, and no more."""
    settings = replace(
        embedded,
        redis_url=refused("redis"),
        rabbitmq_url=refused("amqp"),
        rate_limit="9/minute",
    )
    with started(settings) as client:
        ada = User(client, "ada@example.com")
        order_id = ada.order()
        reads = [ada.get(order_id) for _ in range(2)]
        changed = ada.change(order_id, "PAID")
        after = ada.get(order_id)
        ready = client.get("/ready")
        codes = [ada.get(order_id).status_code for _ in range(3)]

    assert [answer.headers["x-cache"] for answer in reads] == ["miss"] * 2
    assert changed.status_code == 200
    assert after.json()["status"] == "PAID"
    assert ready.status_code == 200
    assert ready.json() | {"backlog": 0, "oldest_seconds": 0} == {
        "status": "degraded",
        "database": "ok",
        "cache": "untrusted",
        "broker": "unavailable",
        "backlog": 0,
        "oldest_seconds": 0,
    }
    assert codes == [200, 200, 429]


def test_a_missing_database_is_a_503(embedded, caplog):
    """The answer says when to come back, the log says it once."""
    settings = replace(embedded, database_url=refused("postgresql"))
    with started(settings) as client:
        account = {"email": "ada@example.com", "password": "long enough"}
        answers = [client.post("/register/", json=account) for _ in range(3)]
        ready = client.get("/ready")
        health = client.get("/health")

    assert {answer.status_code for answer in answers} == {503}
    assert answers[0].headers["retry-after"] == "2"
    assert "try again" in answers[0].json()["detail"]
    assert ready.status_code == 503
    assert ready.json()["status"] == "unavailable"
    assert health.status_code == 200
    assert caplog.text.count("The database is away") == 1


@pytest.fixture
def clock(monkeypatch):
    """Return a list whose last element is the time of the log."""
    times = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: times[-1])
    return times


def test_each_line_of_an_outage_is_followed_by_one_of_its_end(clock, caplog):
    """Although it comes and goes: a line each ten seconds, not each time."""
    caplog.set_level("INFO")
    outage = Outage("orders", "It")
    for second in range(20):
        clock.append(100.0 + second)
        if second % 2:
            outage.end()
        else:
            outage.report(ConnectionError("gone"))

    assert caplog.messages == ["It is away: gone", "It works again"] * 2


def test_an_outage_after_a_short_return_is_said(clock, caplog):
    """The last line must not be that all is well."""
    caplog.set_level("INFO")
    outage = Outage("orders", "It")
    outage.report(ConnectionError("gone"))
    outage.end()
    for second in range(1, 60):
        clock.append(100.0 + second)
        outage.report(ConnectionError("gone"))

    away, back = "It is away: gone", "It works again"
    assert caplog.messages == [away, back, away]


def test_a_fault_after_an_outage_is_said(clock, caplog):
    """What is away may come back, and then another thing be wrong."""
    outage = Outage("orders", "It")
    for second in range(20):
        clock.append(100.0 + second)
        outage.report(ConnectionError("gone"))
    for second in range(20, 60):
        clock.append(100.0 + second)
        outage.report(ValueError("a bug"), fault=True)

    assert caplog.messages == ["It is away: gone", "It failed: a bug"]


def test_a_fault_of_the_database_tells_no_secret(embedded, tmp_path):
    """Its text goes to the log, and the statement has a password's hash."""

    async def register():
        database = Database(f"sqlite:///{tmp_path}/without-tables.db")
        draft = UserCreate(email="ada@example.com", password="long enough")
        try:
            await Accounts(database, embedded).register(draft)
        finally:
            await database.close()

    with pytest.raises(OperationalError) as fault:
        asyncio.run(register())

    assert "INSERT INTO users" in str(fault.value)
    assert "argon2" not in str(fault.value)


def test_an_absent_redis_is_met_by_the_keeper_alone():
    """Whoever else finds it away goes without, at once."""

    async def run():
        shared = RedisCache(refused("redis"))
        began = time.monotonic()
        assert await shared.execute("PING") is None
        shared.fill(ORDER, view("old"), time.monotonic())
        await shared.invalidate(ORDER)
        assert await shared.get(ORDER) is None
        with pytest.raises(RedisAway) as met:
            await prove(shared)
        await shared.close()
        assert not shared.trusted
        return str(met.value.__cause__), time.monotonic() - began

    cause, seconds = asyncio.run(run())

    assert "refused" in cause or "failed" in cause
    assert seconds < 0.5


# --- What both caches promise -----------------------------------------------


def view(body, status="PENDING"):
    """Return an order as it is cached."""
    return OrderView(1, status, body.encode())


async def prove(orders, *changed):
    """Make a keeper's round that knows all changes."""
    await orders.write_tombstones(changed)
    orders.trust_from(time.monotonic())


@pytest.fixture(params=["memory", "redis"])
def filled(request):
    """Return a runner that gives a cache of either kind to a coroutine."""
    if request.param == "memory":
        return lambda use: asyncio.run(use(MemoryCache()))
    stack = request.getfixturevalue("stack")

    async def run(use):
        orders = RedisCache(stack.redis_url)
        await prove(orders)
        await orders.execute("FLUSHALL")
        await prove(orders)
        await use(orders)
        await orders.close()

    return lambda use: asyncio.run(run(use))


def test_a_tombstone_refuses_to_be_filled(filled):
    """A slow reader cannot put the old row back."""

    async def use(orders):
        moment = time.monotonic()
        orders.fill(ORDER, view("old"), moment)
        assert await orders.get(ORDER) == view("old")
        orders.fill(ORDER, view("other"), moment)
        assert await orders.get(ORDER) == view("old")
        await orders.invalidate(ORDER)
        orders.fill(ORDER, view("old"), moment)
        assert await orders.get(ORDER) is None

    filled(use)


def test_a_row_that_was_read_too_long_ago_is_not_cached(filled):
    """Its tombstone may be gone already."""

    async def use(orders):
        moment = time.monotonic()
        orders.fill(ORDER, view("x"), moment - cache.MAX_FILL_AGE)
        assert await orders.get(ORDER) is None
        orders.fill(ORDER, view("x"), time.monotonic())
        assert await orders.get(ORDER) == view("x")

    filled(use)


def test_what_a_keeper_was_told_of_is_a_miss(filled):
    """A change of a process that could not say so itself."""

    async def use(orders):
        for order_id in ORDER, OTHER:
            orders.fill(order_id, view("x"), time.monotonic())
        await prove(orders, ORDER)
        assert await orders.get(ORDER) is None
        assert await orders.get(OTHER) == view("x")

    filled(use)


def test_the_memory_cache_forgets_the_oldest(monkeypatch):
    """It has a size."""
    size = len(view("x").body) + cache.ENTRY_SIZE
    monkeypatch.setattr(cache, "MEMORY_SIZE", 2 * size)

    async def use(orders):
        for number in range(3):
            orders.fill(uuid.UUID(int=number), view("x"), time.monotonic())
        return [await orders.get(uuid.UUID(int=n)) for n in range(3)]

    assert asyncio.run(use(MemoryCache())) == [None, view("x"), view("x")]


# --- Calls that share round trips -------------------------------------------


class Trips:
    """A journey that ends when a test says so, and what travelled."""

    def __init__(self):
        """Have nothing under way."""
        self.made, self.ends = [], []
        self.batcher = Batcher(self.trip)

    async def trip(self, questions):
        """Answer each question with its double, a text with an error."""
        self.made.append(questions)
        self.ends.append(asyncio.get_running_loop().create_future())
        await self.ends[-1]
        return [
            ValueError(q) if isinstance(q, str) else 2 * q for q in questions
        ]

    async def submit(self, *questions):
        """Ask, and return the answers' futures once they travel or wait."""
        asked = [self.batcher.submit(question) for question in questions]
        await asyncio.sleep(0)
        return asked


async def ends(asked):
    """Return the answers, errors among them."""
    return await asyncio.gather(*asked, return_exceptions=True)


def test_a_first_call_travels_at_once_and_the_next_together():
    """A lone caller waits for nobody."""

    async def run():
        trips = Trips()
        asked = await trips.submit(1)
        assert trips.made == [[1]]
        asked += await trips.submit(2, 3)
        asked += await trips.submit(4)
        assert trips.made == [[1]]
        trips.ends[0].set_result(None)
        assert await asked[0] == 2
        assert trips.made == [[1], [2, 3, 4]]
        trips.ends[1].set_result(None)
        assert await ends(asked) == [2, 4, 6, 8]
        assert len(await trips.submit(5)) == 1
        assert trips.made[2:] == [[5]]
        trips.ends[2].set_result(None)

    asyncio.run(run())


def test_an_answer_is_its_own_callers():
    """Also when one of them gives up on the way, or gets an error."""

    async def run():
        trips = Trips()
        asked = await trips.submit(0)
        asked += await trips.submit(1, "bad", 3, 4)
        trips.ends[0].set_result(None)
        await asked[0]
        asked[3].cancel()
        trips.ends[1].set_result(None)
        answers = await ends(asked)
        assert isinstance(answers.pop(3), asyncio.CancelledError)
        assert isinstance(answers.pop(2), ValueError)
        assert answers == [0, 2, 8]

    asyncio.run(run())


def test_a_trip_with_too_few_answers_fails_and_the_next_travels():
    """A mistake in the code of a trip must not leave callers waiting."""

    async def run():
        trips = Trips()
        asked = await trips.submit(1)
        asked += await trips.submit(2, 3)
        trips.made[0].clear()  # so that there is nothing to answer
        trips.ends[0].set_result(None)
        assert {type(end) for end in await ends(asked)} == {ValueError}
        (later,) = await trips.submit(7)
        trips.ends[1].set_result(None)
        assert await later == 14

    asyncio.run(asyncio.wait_for(run(), 5))


def test_who_waits_behind_a_trip_that_fails_fails_with_it():
    """Nobody waits for two time limits; who comes later travels."""

    async def run():
        trips = Trips()
        asked = await trips.submit(1)
        asked += await trips.submit(*range(2 * MAX_BATCH))
        trips.ends[0].set_exception(OSError())
        assert {type(end) for end in await ends(asked)} == {OSError}
        (later,) = await trips.submit(7)
        trips.ends[1].set_result(None)
        assert await later == 14
        assert trips.made == [[1], [7]]

    asyncio.run(run())


def test_a_trip_carries_so_many_calls_and_no_more():
    """Or a server would be held up by one of them."""

    async def run():
        trips = Trips()
        asked = await trips.submit(0)
        asked += await trips.submit(*range(MAX_BATCH + 1))
        for number in range(3):
            await asyncio.sleep(0)
            trips.ends[number].set_result(None)
            await asyncio.sleep(0.01)
        await ends(asked)
        assert [len(made) for made in trips.made] == [1, MAX_BATCH, 1]

    asyncio.run(run())


# --- A change, step by step -------------------------------------------------


class Change:
    """A cached order whose status is changed to PAID."""

    def __init__(self, settings):
        """Prepare; `run` creates the order and changes it."""
        self.database = Database(settings.database_url)
        self.accounts = Accounts(self.database, settings)
        self.cache = MemoryCache()
        self.service = OrderService(self.database, self.cache, frozenset())
        self.invalidate = self.cache.invalidate

    async def run(self, invalidate):
        """Change the order with another `invalidate`; return what is read."""
        draft = UserCreate(email="ada@example.com", password="long enough")
        self.user = (await self.accounts.register(draft)).id
        created = await self.service.create(
            self.user, OrderCreate(items=ITEMS)
        )
        self.order_id = created[0]
        await self.read()
        self.cache.invalidate = invalidate
        with suppress(Died):
            await self.service.change_status(
                self.user, self.order_id, "PAID", expected=OrderStatus
            )
        status = await self.read()
        await self.database.close()
        return status

    async def read(self):
        """Return the status that a reader is told, and let them fill."""
        view, _ = await self.service.get(self.user, self.order_id)
        return view.status

    async def committed(self):
        """Return whether another connection sees the change."""
        return (await self.service._reads.submit(self.order_id))[
            "status"
        ] == "PAID"


class Died(Exception):
    """The process ends here."""


def test_a_death_after_the_commit_leaves_nothing_stale(embedded):
    """The tombstone was there before."""
    change = Change(embedded)

    async def die_once_committed(order_id):
        if await change.committed():
            raise Died
        await change.invalidate(order_id)

    assert asyncio.run(change.run(die_once_committed)) == "PAID"


def test_a_cache_that_forgets_before_the_commit_is_told_again(embedded):
    """The second tombstone covers the old row that a reader put in."""
    change = Change(embedded)

    async def forget_before_the_commit(order_id):
        await change.invalidate(order_id)
        if not await change.committed():
            change.cache._entries.clear()
            assert await change.read() == "PENDING"

    assert asyncio.run(change.run(forget_before_the_commit)) == "PAID"
