"""The operator's tools: `uv run orders prune` and `uv run orders dead`."""

import subprocess
import time
from datetime import timedelta
from uuid import UUID, uuid4

import psycopg
import pytest
import servers
from click.testing import CliRunner
from conftest import ITEMS, User, environment, replace
from fastapi.testclient import TestClient
from faults import Journal
from sqlmodel import Session, func, select, update
from test_faults import channel_to, due_message, poison, purged, ready_in
from test_settings import run_to_its_end

from orders import __main__ as cli
from orders import handlers
from orders.__main__ import main
from orders.api import create_app
from orders.broker import DEAD_LETTERS, QUEUE
from orders.db import create_sync_engine
from orders.handlers import prune_orders
from orders.models import Event, Order, now

DAY = timedelta(days=1)


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Return what runs `orders` with arguments, in this process.

    It returns (exit code, what was printed).
    """
    monkeypatch.chdir(tmp_path)

    def call(settings, *arguments):
        env = environment(settings)
        ended = CliRunner().invoke(main, arguments, env=env)
        return ended.exit_code, ended.output

    return call


@pytest.fixture
def engine(settings):
    """Return an engine on the database of the app."""
    engine = create_sync_engine(settings.database_url)
    yield engine
    engine.dispose()


def make_old(engine, *order_ids, age=400 * DAY, processed=True):
    """Let orders and their events be made and processed so long ago."""
    moment = now() - age
    ids = [UUID(order_id) for order_id in order_ids]
    with Session(engine) as session:
        session.exec(
            update(Order).where(Order.id.in_(ids)).values(created_at=moment)
        )
        session.exec(
            update(Event)
            .where(Event.order_id.in_(ids))
            .values(
                created_at=moment, processed_at=moment if processed else None
            )
        )
        session.commit()


def count(engine, table):
    """Return how many rows a table has."""
    with Session(engine) as session:
        return session.exec(select(func.count()).select_from(table)).one()


def test_prune_deletes_what_is_old_and_done(
    settings, client, ada, engine, tool
):
    """Beside a running service: it keeps what anything happened to since."""
    old, changed, waiting, young = (ada.order() for _ in range(4))
    make_old(engine, old, changed)
    make_old(engine, waiting, processed=False)
    ada.change(changed, "PAID")
    servers.wait_until(
        lambda: all(
            event["processed_at"]
            for event in ada.call("GET", f"/orders/{changed}/events").json()
        ),
        10,
    )
    events = count(engine, Event)

    counted = tool(settings, "prune", "--older-than=365d", "--dry-run")
    still = count(engine, Order), count(engine, Event)
    pruned = tool(settings, "prune", "--older-than=365d")

    assert counted[0] == pruned[0] == 0
    assert "1 orders would be pruned." in counted[1]
    assert "1 orders pruned. Their idempotency keys are free" in pruned[1]
    assert still == (4, events)
    assert (count(engine, Order), count(engine, Event)) == (3, events - 1)
    left = {order["id"] for order in ada.call("GET", "/orders/user/1").json()}
    assert left == {changed, waiting, young}


def test_prune_works_in_batches(client, ada, engine, monkeypatch):
    """It goes through all orders, and says after each batch where it is."""
    monkeypatch.setattr(handlers, "PRUNE_BATCH", 4)
    orders = sorted(ada.order() for _ in range(10))
    make_old(engine, *orders[:5], orders[9])

    steps = [*prune_orders(engine, now() - 365 * DAY, dry_run=False)]

    assert [number for number, _ in steps] == [4, 1, 1]
    assert [str(last) for _, last in steps] == [
        orders[3],
        orders[7],
        orders[9],
    ]
    assert count(engine, Order) == 4


def test_a_key_of_a_pruned_order_is_free_again(settings, engine, tool):
    """Nobody reads the old order, which may be cached still."""
    with TestClient(create_app(settings)) as client:
        ada = User(client, "ada@example.com")
        key = {"Idempotency-Key": "cart-7"}
        old = ada.create(headers=key).json()
        make_old(engine, old["id"])
        servers.wait_until(
            lambda: ada.get(old["id"]).headers["x-cache"] == "hit", 15
        )
        tool(settings, "prune", "--older-than=365d")
        cached = ada.get(old["id"])
        new = ada.create([*ITEMS, *ITEMS], headers=key)

        read = ada.get(old["id"])

    assert cached.json()["items"] == ITEMS
    assert new.json()["id"] == old["id"]
    assert "idempotency-replayed" not in new.headers
    assert read.json() == new.json()
    assert read.json()["items"] == [*ITEMS, *ITEMS]


def test_a_change_and_a_prune_that_meet_lose_no_change(
    production, run, http, tmp_path
):
    """The change comes first, and the order is kept."""
    journal = Journal(production)
    [(_, order_id)] = journal.insert(1, age=86_400 * 400)
    journal.query("UPDATE events SET processed_at = due_at RETURNING id")
    with psycopg.connect(production.database_url) as change:
        change.execute("UPDATE orders SET status = 'PAID'")
        command = [servers.PYTHON / "orders", "prune", "--older-than=365d"]
        with subprocess.Popen(
            command,
            cwd=tmp_path,
            env=servers.without_coverage() | environment(production),
            stdout=subprocess.DEVNULL,
        ) as prune:
            waits = (
                "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                " AND datname = current_database()"
            )
            servers.wait_until(lambda: journal.query(waits), 10)
            change.execute(
                "INSERT INTO events (id, order_id, kind, payload, created_at,"
                " attempts, due_at) VALUES (gen_random_uuid(), %s,"
                " 'status_changed', '{}', now(), 0, now())",
                [order_id],
            )
            change.commit()
            assert prune.wait(20) == 0

    assert journal.query("SELECT status FROM orders") == [("PAID",)]
    assert journal.query("SELECT count(*) FROM events") == [(2,)]


@pytest.mark.parametrize("age", ["365", "d", "0d", "-1d", "1y", "1.5d"])
def test_an_age_that_is_none_is_refused(embedded, tool, age):
    """Nothing is deleted by a slip of the keyboard."""
    code, text = tool(embedded, "prune", f"--older-than={age}")

    assert code == 2
    assert "a number of days, such as 365d" in text
    assert tool(embedded, "prune")[0] == 2


@pytest.mark.parametrize("command", [["prune", "--older-than=1d"], ["dead"]])
def test_a_server_that_is_away_is_one_line(production, tool, command):
    """No traceback: an operator reads it."""
    nowhere = f"127.0.0.1:{servers.free_port()}"
    settings = replace(
        production,
        database_url=f"postgresql://postgres@{nowhere}/orders",
        rabbitmq_url=f"amqp://{nowhere}/",
    )

    code, text = tool(settings, *command)

    assert code == 1
    assert "Traceback" not in text
    assert "Error: " in text


# --- Dead letters -----------------------------------------------------------


def test_dead_lists_what_workers_rejected(production, run, tool):
    """Which event of which order, when and why; then it empties the queue."""
    journal = Journal(production)
    [(bad, order_id)] = journal.insert(1)
    journal.acknowledged.clear()
    poison(journal, bad)
    with channel_to(production) as channel:
        purged(channel)
        run(servers.worker, production)
        properties, body = due_message(bad)
        channel.basic_publish("", QUEUE, body, properties)
        channel.basic_publish("", QUEUE, b"no message of ours")
        servers.wait_until(lambda: ready_in(channel, DEAD_LETTERS) == 2, 15)

        channel.basic_publish("", DEAD_LETTERS, b"put there by hand")
        servers.wait_until(lambda: ready_in(channel, DEAD_LETTERS) == 3, 5)

        code, text = tool(production, "dead")
        kept = ready_in(channel, DEAD_LETTERS)
        _, discarded = tool(production, "dead", "--discard")
        left = ready_in(channel, DEAD_LETTERS)
        _, nothing = tool(production, "dead")

    assert code == 0, text
    lines = text.splitlines()
    [failed] = [line for line in lines if str(bad) in line]
    assert str(order_id) in failed
    assert "its task failed" in failed
    assert failed.startswith(f"{now():%Y-%m-%d}")
    assert [line for line in lines if "malformed" in line]
    assert [line for line in lines if line.startswith("at an unknown time")]
    assert "3 dead letters. The outbox delivers" in text
    assert kept == 3
    assert "3 dead letters, discarded." in discarded
    assert left == 0
    assert "0 dead letters" in nothing


def test_dead_may_take_longer_than_a_call_of_the_database(
    production, tool, monkeypatch
):
    """Many letters come from far away; their list must not be lost."""
    read = cli.read_dead_letters

    def read_slowly(*arguments, **options):
        letters = read(*arguments, **options)
        time.sleep(1.5)
        return letters

    monkeypatch.setattr(cli, "WORKER_DEADLINE", 0.5)
    monkeypatch.setattr(cli, "read_dead_letters", read_slowly)
    properties, body = due_message(uuid4())
    with channel_to(production) as channel:
        purged(channel)
        channel.basic_publish("", DEAD_LETTERS, body, properties)
        servers.wait_until(lambda: ready_in(channel, DEAD_LETTERS) == 1, 5)
        code, text = tool(production, "dead", "--discard")

    assert code == 0, text
    assert "1 dead letters, discarded." in text


def test_dead_needs_a_broker(embedded, tool):
    """In the embedded mode there are no messages."""
    code, text = tool(embedded, "dead")

    assert code == 1
    assert "RABBITMQ_URL is not set" in text


def test_the_commands_are_listed(embedded, tmp_path):
    """`orders --help`, a process, says what there is; nothing is started."""
    env = environment(embedded)
    ended = run_to_its_end(tmp_path, ["orders", "--help"], **env)

    assert ended.returncode == 0
    assert "prune" in ended.stdout
    assert "dead" in ended.stdout
    assert not (tmp_path / ".env").exists()
