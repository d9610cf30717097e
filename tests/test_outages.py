"""A dependency that nobody answers for, without any server."""

import asyncio
import time
import uuid
from contextlib import suppress
from dataclasses import replace

import pytest
import servers
from conftest import ITEMS, User
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from orders import auth, cache
from orders.api import create_app
from orders.cache import CacheAway, MemoryCache, RedisCache, RedisLink
from orders.db import Database
from orders.models import EventKind, OrderCreate, UserCreate
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
    assert ready.json() == {
        "status": "degraded",
        "database": "ok",
        "cache": "unavailable",
        "broker": "unavailable",
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


def test_a_fault_of_the_database_tells_no_secret(tmp_path):
    """Its text goes to the log, and the statement has a password's hash."""

    async def register():
        database = Database(f"sqlite:///{tmp_path}/without-tables.db")
        draft = UserCreate(email="ada@example.com", password="long enough")
        try:
            await auth.register(database, draft)
        finally:
            await database.close()

    with pytest.raises(OperationalError) as fault:
        asyncio.run(register())

    assert "INSERT INTO users" in str(fault.value)
    assert "argon2" not in str(fault.value)


def test_an_absent_redis_is_left_alone_for_a_while():
    """The first call meets it, the next ones are refused at once."""

    async def run():
        link = RedisLink(refused("redis"), timeout=1)
        shared = RedisCache(link, link)
        with pytest.raises(CacheAway) as first:
            await shared.ping()
        with pytest.raises(CacheAway) as second:
            await shared.ping()
        assert await shared.get(ORDER) is None
        await shared.fill(ORDER, b"x", time.monotonic())
        assert await shared.invalidate(ORDER) is False
        await link.close()
        return str(first.value), str(second.value)

    met, skipped = asyncio.run(run())

    assert "refused" in met or "failed" in met
    assert skipped == ""


@pytest.fixture(params=["memory", "redis"])
def filled(request):
    """Return a runner that gives a cache of either kind to a coroutine."""
    if request.param == "memory":
        return lambda use: asyncio.run(use(MemoryCache()))
    stack = request.getfixturevalue("stack")

    async def run(use):
        link = RedisLink(stack.redis_url, timeout=1)
        await link.call(("FLUSHALL",))
        await use(RedisCache(link, link))
        await link.close()

    return lambda use: asyncio.run(run(use))


def test_a_tombstone_refuses_to_be_filled(filled):
    """A slow reader cannot put the old row back."""

    async def use(orders):
        moment = time.monotonic()
        await orders.fill(ORDER, b"old", moment)
        assert await orders.get(ORDER) == b"old"
        await orders.fill(ORDER, b"other", moment)
        assert await orders.get(ORDER) == b"old"
        assert await orders.invalidate(ORDER, OTHER)
        await orders.fill(ORDER, b"old", moment)
        assert await orders.get(ORDER) is None

    filled(use)


def test_a_row_that_was_read_too_long_ago_is_not_cached(filled):
    """Its tombstone may be gone already."""

    async def use(orders):
        await orders.fill(ORDER, b"x", time.monotonic() - cache.MAX_FILL_AGE)
        assert await orders.get(ORDER) is None

    filled(use)


def test_calls_that_travel_together_get_their_own_answers(stack):
    """Also when one of them gives up on the way."""

    async def run():
        link = RedisLink(stack.redis_url, timeout=1)
        calls = [
            asyncio.create_task(link.call(("ECHO", n), ("ECHO", -n)))
            for n in range(200)
        ]
        await asyncio.sleep(0)
        calls[100].cancel()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        await link.close()
        return answers

    answers = asyncio.run(run())

    assert isinstance(answers.pop(100), asyncio.CancelledError)
    sent = [n for n in range(200) if n != 100]
    assert answers == [[b"%d" % n, b"%d" % -n] for n in sent]


def test_no_call_waits_longer_than_the_limit_of_a_round_trip():
    """Who waits behind a hung round trip fails with it."""

    async def run():
        async def say_nothing(reader, writer):
            await reader.read()
            writer.close()

        silent = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
        port = silent.sockets[0].getsockname()[1]
        link = RedisLink(f"redis://127.0.0.1:{port}/0", timeout=0.2)
        began, calls = time.monotonic(), []
        for _ in range(5):
            calls.append(asyncio.create_task(link.call(("PING",))))
            await asyncio.sleep(0.02)
        ends = await asyncio.gather(*calls, return_exceptions=True)
        seconds = time.monotonic() - began
        await link.close()
        silent.close()
        return ends, seconds

    ends, seconds = asyncio.run(run())

    assert {type(end) for end in ends} == {CacheAway}
    assert seconds < 0.3


def test_the_memory_cache_forgets_the_oldest(monkeypatch):
    """It has a size."""
    monkeypatch.setattr(cache, "MEMORY_SIZE", 2)

    async def use(orders):
        for number in range(3):
            await orders.fill(uuid.UUID(int=number), b"x", time.monotonic())
        return [await orders.get(uuid.UUID(int=n)) for n in range(3)]

    assert asyncio.run(use(MemoryCache())) == [None, b"x", b"x"]


# --- A change, step by step -------------------------------------------------


class Change:
    """A cached order whose status is changed to PAID."""

    def __init__(self, settings):
        """Prepare; `run` creates the order and changes it."""
        self.database = Database(settings.database_url)
        self.cache = MemoryCache()
        wake = dict.fromkeys(EventKind, lambda: None)
        self.service = OrderService(self.database, self.cache, wake)
        self.invalidate = self.cache.invalidate

    async def run(self, invalidate):
        """Change the order with another `invalidate`; return what is read."""
        draft = UserCreate(email="ada@example.com", password="long enough")
        self.user = (await auth.register(self.database, draft)).id
        created = await self.service.create(
            self.user, OrderCreate(items=ITEMS)
        )
        self.order_id = created[0]
        await self.read()
        self.cache.invalidate = invalidate
        with suppress(Died):
            await self.service.change_status(self.user, self.order_id, "PAID")
        status = await self.read()
        await self.database.close()
        return status

    async def read(self):
        """Return the status that a reader is told, and let them fill."""
        view, _ = await self.service.get(self.user, self.order_id)
        return view.status

    async def committed(self):
        """Return whether another connection sees the change."""
        return (await self.service._read(self.order_id)).status == "PAID"


class Died(Exception):
    """The process ends here."""


def test_a_death_after_the_commit_leaves_nothing_stale(embedded):
    """The tombstone was there before."""
    change = Change(embedded)

    async def die_once_committed(order_id):
        if await change.committed():
            raise Died
        return await change.invalidate(order_id)

    assert asyncio.run(change.run(die_once_committed)) == "PAID"


def test_a_cache_that_forgets_before_the_commit_is_told_again(embedded):
    """The second tombstone covers the old row that a reader put in."""
    change = Change(embedded)

    async def forget_before_the_commit(order_id):
        taken = await change.invalidate(order_id)
        if not await change.committed():
            change.cache._entries.clear()
            assert await change.read() == "PENDING"
        return taken

    assert asyncio.run(change.run(forget_before_the_commit)) == "PAID"
