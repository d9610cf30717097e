"""How far behind is the worker? What /ready and two gauges say."""

import time
from datetime import timedelta
from uuid import UUID

import pytest
import servers
from conftest import User, replace
from fastapi.testclient import TestClient
from sqlmodel import Session, select, update

from orders import events, handlers
from orders.api import create_app
from orders.db import create_sync_engine
from orders.events import AHEAD, ALWAYS, Relay, claim
from orders.handlers import HANDLERS, Backlog, measure_backlog
from orders.logs import Outage
from orders.models import Event, EventKind, now

NEW_ORDER = EventKind.NEW_ORDER
DELAY = timedelta(hours=1)


@pytest.fixture
def slow(monkeypatch):
    """Let a new order wait for an hour."""
    handler = HANDLERS[NEW_ORDER]._replace(delay=DELAY)
    monkeypatch.setitem(HANDLERS, NEW_ORDER, handler)


@pytest.fixture
def frequent(monkeypatch):
    """Let the relay measure the backlog often, not every five seconds."""
    monkeypatch.setattr(events, "SWEEP_INTERVAL", 0.2)


@pytest.fixture
def engine(settings):
    """Return an engine on the database of the app."""
    engine = create_sync_engine(settings.database_url)
    yield engine
    engine.dispose()


def grow_late(engine, order_id, seconds):
    """Let the events of an order be so late: they had their delay before."""
    moment = now() - DELAY - timedelta(seconds=seconds)
    with Session(engine) as session:
        of_order = Event.order_id == UUID(order_id)
        session.exec(update(Event).where(of_order).values(created_at=moment))
        session.commit()


def test_what_waits_is_counted_with_the_age_of_the_oldest(
    slow, ada, engine, monkeypatch
):
    """Events that are processed, or are the keeper's, do not wait for it."""
    assert measure_backlog(engine) == Backlog(0, None)
    assert measure_backlog(engine).age() == 0
    orders = [ada.order() for _ in range(5)]
    ada.change(orders[0], "PAID")
    with Session(engine) as session:
        found = session.exec(select(Event).order_by(Event.created_at)).all()
        found[-2].processed_at = now()  # of the youngest order
        old = now() - timedelta(seconds=500)
        found[1].created_at = old - DELAY
        session.add_all(found)
        session.commit()

    backlog = measure_backlog(engine)
    assert backlog == Backlog(4, old)
    assert 500 <= backlog.age() < 510
    monkeypatch.setattr(handlers, "MAX_COUNTED", 3)
    assert measure_backlog(engine).waiting == 3


def test_ready_says_how_far_behind_the_worker_is(
    slow, frequent, client, ada, engine
):
    """From a minute on, the service is degraded; it still takes calls."""

    def ready(status, backlog):
        """Return what /ready answers when it says so."""
        servers.wait_until(
            lambda: (
                (answer := client.get("/ready").json())["backlog"] == backlog
                and answer["status"] == status
            ),
            10,
        )
        return client.get("/ready").json()

    order_id = ada.order()
    young = ready("ok", 1)
    grow_late(engine, order_id, 45)
    servers.wait_until(
        lambda: client.get("/ready").json()["oldest_seconds"] > 40, 10
    )
    assert client.get("/ready").json()["status"] == "ok"
    grow_late(engine, order_id, 61)
    late = ready("degraded", 1)

    assert young["oldest_seconds"] == 0  # not due yet, so not late
    assert 60 < late["oldest_seconds"] < 90
    assert client.get("/ready").status_code == 200


@pytest.fixture
def busy(monkeypatch):
    """Let the work for a new order take a while."""

    def work(session, event):
        time.sleep(0.15)
        return "done"

    delay = timedelta(seconds=1)
    handler = HANDLERS[NEW_ORDER]._replace(delay=delay, work=work)
    monkeypatch.setitem(HANDLERS, NEW_ORDER, handler)


def test_a_busy_embedded_relay_is_not_degraded(busy, embedded, monkeypatch):
    """Its round takes long, and there is no broker that has to answer."""
    monkeypatch.setattr(events, "ANSWER_AGE", 0.3)
    with TestClient(create_app(embedded)) as client:
        ada = User(client, "ada@example.com")
        orders = [ada.order() for _ in range(20)]
        states = set()
        while not ada.processed(orders[-1]):
            states.add(client.get("/ready").json()["status"])
            time.sleep(0.1)

    # A round that has the file's only lock may keep the look out.
    assert states - {"unavailable"} == {"ok"}


def test_a_hung_embedded_relay_is_degraded(busy, embedded, monkeypatch):
    """A round may take a minute."""
    monkeypatch.setattr(events, "MAX_ROUND", 0.5)
    with TestClient(create_app(embedded)) as client:
        ada = User(client, "ada@example.com")
        for _ in range(20):
            ada.order()
        servers.wait_until(
            lambda: client.get("/ready").json()["status"] == "degraded", 5
        )


def test_the_backlog_is_known_without_the_broker(production, slow, frequent):
    """Then it grows, and an operator wants to know by how much."""
    settings = replace(
        production, rabbitmq_url=f"amqp://127.0.0.1:{servers.free_port()}/0"
    )
    with TestClient(create_app(settings)) as client:
        User(client, "ada@example.com").order()
        servers.wait_until(
            lambda: client.get("/ready").json()["backlog"] == 1, 10
        )


class WellBroker:
    """A publisher whose broker is well, and that counts the questions."""

    asked = 0

    def count_ready(self):
        """Say that no message waits."""
        self.asked += 1
        return 0

    def close(self):
        """Close nothing."""


def test_the_broker_is_asked_while_the_database_is_away():
    """Otherwise it would miss the heartbeats, and end the connection."""
    url = f"postgresql://127.0.0.1:{servers.free_port()}/orders"
    publisher, outage = WellBroker(), Outage(__name__, "The database")
    relay = Relay(create_sync_engine(url), publisher, outage)
    relay.start()
    try:
        servers.wait_until(lambda: publisher.asked > 4, 10)
    finally:
        relay.end(5)


def test_a_lease_doubles_from_thirty_seconds_to_an_hour(slow, ada, engine):
    """An event whose task always fails comes back less and less often."""
    ada.order()
    leases = []
    for _ in range(10):
        moment = now()
        late = moment + timedelta(hours=3)
        statement = claim(NEW_ORDER, since=ALWAYS, until=late, again=True)
        with engine.begin() as connection:
            assert len(connection.execute(statement).all()) == 1
        with Session(engine) as session:
            due_at = session.exec(select(Event.due_at)).one()
        leases.append(round((due_at - moment - AHEAD).total_seconds()))

    assert leases == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
