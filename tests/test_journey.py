"""The journey of an order through real processes, in both modes."""

import signal
import time

import pytest
import servers
from conftest import User, environment


def processed_lines(text, order_id):
    """Return how often a log says that the order was processed."""
    return text.count(f"Order {order_id} processed")


def test_an_order_travels_on_an_empty_machine(tmp_path, http):
    """One command sets up, takes an order, processes it, and ends."""
    with servers.running(servers.orders(tmp_path)) as server:
        ada = User(http(server), "ada@example.com")
        placed = time.monotonic()
        order_id = ada.order()
        servers.wait_until(lambda: ada.processed(order_id), 10)
        took = time.monotonic() - placed
        asked = time.monotonic()
        assert server.stop() in (0, -signal.SIGTERM)
        assert time.monotonic() - asked < 2

    log = server.text()
    assert 2 <= took < 5
    assert processed_lines(log, order_id) == 1
    assert f"http://127.0.0.1:{server.port}/docs" in log
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_an_order_outlives_the_process_that_took_it(tmp_path, http, end):
    """What was not yet processed is processed at the next start."""
    server = servers.orders(tmp_path)
    with servers.running(server):
        ada = User(http(server), "ada@example.com")
        order_id, began = ada.order(), time.monotonic()
        server.signal(end)
        server.process.wait(10)
        if time.monotonic() - began < 2:  # and not on a machine that is busy
            assert processed_lines(server.text(), order_id) == 0
        server.start()
        servers.wait_until(lambda: ada.processed(order_id), 10)

    assert processed_lines(server.text(), order_id) == 1


def test_an_order_travels_through_the_real_stack(production, tmp_path, http):
    """The API publishes, a stock worker processes, the request id travels."""
    env = environment(production)
    with (
        servers.running(servers.api(tmp_path, env)) as api,
        servers.running(servers.worker(tmp_path, env)) as worker,
    ):
        ada = User(http(api), "ada@example.com")
        placed = time.monotonic()
        created = ada.create(headers={"X-Request-ID": "journey-1"})
        order_id = created.json()["id"]
        servers.wait_until(lambda: ada.processed(order_id), 15)
        took = time.monotonic() - placed
        assert ada.get(order_id).headers["x-cache"] == "hit"
        assert ada.change(order_id, "PAID").json()["status"] == "PAID"
        assert ada.change(order_id, "SHIPPED").json()["status"] == "SHIPPED"
        assert ada.get(order_id).json()["status"] == "SHIPPED"
        assert http(api).get("/ready").json()["status"] == "ok"
        assert api.stop() in (0, -signal.SIGTERM)
        assert worker.stop() == 0

    assert 2 <= took < 8
    assert processed_lines(worker.text(), order_id) == 1
    (line,) = [
        line for line in worker.text().splitlines() if "processed" in line
    ]
    assert "[journey-1]" in line


def test_two_api_processes_share_one_budget(production, tmp_path, http):
    """The limit is the client's, not the process's."""
    env = environment(production) | {"RATE_LIMIT": "5/minute"}
    with (
        servers.running(servers.api(tmp_path, env)) as one,
        servers.running(servers.api(tmp_path, env)) as two,
    ):
        codes = [
            http(api).get("/orders/user/1").status_code
            for api in (one, two) * 3
        ]

    assert codes == [401] * 5 + [429]
