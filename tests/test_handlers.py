"""Handlers of events: their registry, and what they may do."""

import importlib
import subprocess
import threading
import time
from datetime import timedelta

import psycopg
import pytest
import servers
from conftest import User, replace
from fastapi.testclient import TestClient
from faults import Journal
from test_tasks import worker_with

from orders import handlers
from orders.api import create_app
from orders.db import create_sync_engine
from orders.events import Relay
from orders.handlers import HANDLERS, handles
from orders.logs import Outage
from orders.models import EventKind, Order, OrderStatus


@pytest.fixture
def registry(monkeypatch):
    """Return a registry without entries, which the test may fill."""
    monkeypatch.setattr(handlers, "HANDLERS", {})
    return handlers.HANDLERS


def test_a_handler_is_entered_with_its_task_and_its_delay(registry):
    """The function itself stays what it was."""

    @handles(EventKind.NEW_ORDER, delay=timedelta(seconds=5))
    def send_mail(session, event):
        """Do nothing."""

    handler = registry[EventKind.NEW_ORDER]
    assert handler == ("orders.send_mail", send_mail, timedelta(seconds=5))


def test_a_kind_has_one_handler_and_a_task_one_kind(registry):
    """Otherwise one of them would never run, and nobody would be told."""

    def work(session, event):
        """Do nothing."""

    handles(EventKind.NEW_ORDER)(work)

    with pytest.raises(ValueError, match="has a handler"):
        handles(EventKind.NEW_ORDER)
    with pytest.raises(ValueError, match="task of another kind"):
        handles("another_kind")(work)
    with pytest.raises(ValueError, match="keeper"):
        handles(EventKind.STATUS_CHANGED)


def fail_like_an_outage(journal, event_id):
    """Let a statement for one event fail as one does that took too long."""
    with psycopg.connect(journal.url) as connection:
        connection.execute(
            "CREATE FUNCTION refuse() RETURNS trigger AS $$ BEGIN"
            " RAISE 'too long' USING ERRCODE = '57014'; END $$"
            " LANGUAGE plpgsql"
        )
        connection.execute(
            "CREATE TRIGGER refuse BEFORE UPDATE OF processed_at ON events"
            f" FOR EACH ROW WHEN (OLD.id = '{event_id}')"
            " EXECUTE FUNCTION refuse()"
        )


def test_a_handler_that_fails_like_an_outage_holds_nobody_up(production):
    """The relay of the embedded mode goes on with the other events."""
    settings = replace(production, rabbitmq_url=None)
    journal = Journal(settings)
    (bad, _), *others = journal.insert(20, age=5)
    fail_like_an_outage(journal, bad)
    engine = create_sync_engine(settings.database_url, deadline=15)
    relay = Relay(engine, None, Outage(__name__, "The database"))
    relay.start()
    try:
        orders = [str(order) for _, order in others]
        servers.wait_until(lambda: journal.processed(orders), 10)
    finally:
        relay.end(5)

    attempts = journal.query(f"SELECT attempts FROM events WHERE id = '{bad}'")
    assert attempts == [(1,)]
    assert [*HANDLERS] == [EventKind.NEW_ORDER]


# A handler for new orders, in a module of its own.
CANCEL = """
from orders.handlers import HANDLERS, new_event
from orders.models import EventKind, Order, OrderStatus


def cancel(session, event):
    order = session.get(Order, event.order_id, with_for_update=True)
    order.status = OrderStatus.CANCELED
    session.add(
        new_event(order.id, EventKind.STATUS_CHANGED, status=order.status)
    )
    return f"Order {order.id} canceled"


kind = EventKind.NEW_ORDER
HANDLERS[kind] = HANDLERS[kind]._replace(work=cancel)
"""
WORKER = "import cancel\nfrom orders.tasks import app\n"


def test_a_handler_may_change_its_order(settings, run, tmp_path, monkeypatch):
    """In a worker, too; the cache forgets what it had before."""
    (tmp_path / "cancel.py").write_text(CANCEL)
    monkeypatch.syspath_prepend(tmp_path)
    kind = EventKind.NEW_ORDER
    monkeypatch.setitem(HANDLERS, kind, HANDLERS[kind])  # and put it back
    if settings.rabbitmq_url:
        run(worker_with(code=WORKER), settings)
    else:
        importlib.import_module("cancel")
    with TestClient(create_app(settings)) as client:
        ada = User(client, "ada@example.com")
        order = ada.order()
        assert ada.get(order).json()["status"] == "PENDING"
        servers.wait_until(lambda: ada.processed(order), 10)
        servers.wait_until(
            lambda: ada.get(order).json()["status"] == "CANCELED", 2
        )
        history = ada.call("GET", f"/orders/{order}/events").json()

    assert [event["kind"] for event in history] == [
        *("new_order", "status_changed")
    ]


def test_a_handler_and_a_change_take_turns(settings, monkeypatch):
    """The change comes while the handler has the order, and finds it gone."""
    kind, entered = EventKind.NEW_ORDER, threading.Event()

    def cancel(session, event):
        order = session.get(Order, event.order_id, with_for_update=True)
        entered.set()
        time.sleep(0.5)
        order.status = OrderStatus.CANCELED
        return "canceled"

    handler = HANDLERS[kind]._replace(work=cancel, delay=timedelta(0))
    monkeypatch.setitem(HANDLERS, kind, handler)
    embedded = replace(settings, rabbitmq_url=None)
    with TestClient(create_app(embedded)) as client:
        ada = User(client, "ada@example.com")
        order = ada.order()
        assert entered.wait(10)
        changed = ada.change(order, "PAID")

    assert changed.status_code == 409
    assert changed.json()["current"] == "CANCELED"


def test_the_models_alone_know_all_tables():
    """Each process may write any of them, whatever else it imports."""
    look = (
        "from orders import models\n"
        "from sqlmodel import SQLModel\n"
        "print(*(table.name for table in SQLModel.metadata.sorted_tables))"
    )
    done = subprocess.run(
        [servers.PYTHON / "python", "-W", "error", "-c", look],
        env=servers.without_coverage(),
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["users", "orders", "events"]
