"""A dependency that nobody answers for, without any server."""

import asyncio
import time
import uuid
from dataclasses import replace

import pytest
import servers
from conftest import User
from fastapi.testclient import TestClient

from orders import cache
from orders.api import create_app
from orders.cache import CacheAway, MemoryCache, RedisCache, RedisLink

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


def test_a_missing_database_is_a_503(embedded, capsys):
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
    assert capsys.readouterr().out.count("The database is away") == 1


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
        return first.value.__cause__, second.value.__cause__

    met, skipped = asyncio.run(run())

    assert met is not None
    assert skipped is None


@pytest.fixture(params=["memory", "redis"])
def filled(request):
    """Return a runner that gives a cache of either kind to a coroutine."""
    if request.param == "memory":
        return lambda use: asyncio.run(use(MemoryCache()))
    stack = request.getfixturevalue("stack")

    async def run(use):
        link = RedisLink(stack.redis_url, timeout=1)
        await link.client.flushall()
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


def test_a_full_pool_is_a_miss_and_no_outage(stack, monkeypatch):
    """Redis busy is not Redis away."""
    monkeypatch.setattr(cache, "MAX_CONNECTIONS", 1)

    async def run():
        link = RedisLink(stack.redis_url, timeout=1)
        shared = RedisCache(link, link)
        busy = link.client.blpop("nothing", timeout=0.5)
        blocked = asyncio.create_task(busy)
        await asyncio.sleep(0.1)
        assert await shared.get(ORDER) is None
        await blocked
        await shared.ping()
        await link.close()

    asyncio.run(run())


def test_the_memory_cache_forgets_the_oldest(monkeypatch):
    """It has a size."""
    monkeypatch.setattr(cache, "MEMORY_SIZE", 2)

    async def use(orders):
        for number in range(3):
            await orders.fill(uuid.UUID(int=number), b"x", time.monotonic())
        return [await orders.get(uuid.UUID(int=n)) for n in range(3)]

    assert asyncio.run(use(MemoryCache())) == [None, b"x", b"x"]
