"""Handlers of events: their registry, and one that fails like an outage."""

from datetime import timedelta

import psycopg
import pytest
import servers
from conftest import replace
from faults import Journal

from orders import handlers
from orders.db import create_sync_engine
from orders.events import Relay
from orders.handlers import HANDLERS, handles
from orders.logs import Outage
from orders.models import EventKind


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
