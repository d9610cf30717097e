"""Faults of our processes and of RabbitMQ: no acknowledged order is lost.

Every process is a real one, and the servers that a test harms are its own.
"""

import contextlib
import itertools
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import psycopg
import pytest
import servers
from conftest import channel_at, declared, purged, replace
from faults import Journal, calling, proxying, through, user_of
from sqlalchemy import event

from orders import events
from orders.broker import (
    BROKER_TIMEOUT,
    DEAD_LETTERS,
    DELAY_QUEUE,
    QUEUE,
    QUEUE_ARGUMENTS,
    Message,
    Publisher,
    celery_message,
)
from orders.db import create_sync_engine
from orders.events import ANSWER_AGE, Relay
from orders.handlers import HANDLERS
from orders.logs import Outage
from orders.models import EventKind

TASK = HANDLERS[EventKind.NEW_ORDER].task
DELAY = HANDLERS[EventKind.NEW_ORDER].delay
THREADS = 8  # of a worker: orders that it processes at once
CONFIRM = bytes.fromhex("003c0050")  # AMQP 0-9-1: class basic, ack
LOCK_WAITS = (
    "SELECT pid FROM pg_stat_activity"
    " WHERE wait_event_type = 'Lock' AND datname = current_database()"
)


def channel_to(settings):
    """Open a channel to the broker for the time of a block."""
    return channel_at(settings.rabbitmq_url)


def broker_of(client):
    """Return what the API says of its broker."""
    return client.get("/ready").json()["broker"]


def ready_in(channel, *queues):
    """Return how many messages wait in the queues, all together."""
    return sum(
        channel.queue_declare(queue, passive=True).method.message_count
        for queue in queues
    )


# --- Processes of ours ------------------------------------------------------


def api_and_worker(run, settings):
    """Start what most of these tests need."""
    return run(servers.api, settings), run(servers.worker, settings)


def lock_waits(journal, number):
    """Wait until so many sessions of the database wait for a lock."""
    servers.wait_until(lambda: len(journal.query(LOCK_WAITS)) >= number, 10)


def test_a_killed_api_loses_no_order(production, run, http, rounds, chance):
    """Kills under load, each followed by a start on the same port."""
    api, worker = api_and_worker(run, production)
    journal, ada = Journal(production), user_of(http(api))
    with journal.filling(ada, ada):
        for _ in rounds(3):
            time.sleep(chance.uniform(0.2, 1))
            api.kill()
            api.start()

    journal.end_leases()
    journal.settle(worker)


def test_a_polite_end_of_the_api_answers_what_was_begun(
    production, run, http, rounds, chance
):
    """Creates that wait for the database at SIGTERM get their 201."""
    api, worker = api_and_worker(run, production)
    journal, reader = Journal(production), user_of(http(api))
    writers = [user_of(http(api)) for _ in range(8)]
    order_id = reader.order()
    for _ in rounds(2):
        with (
            calling(lambda: reader.get(order_id)),
            ThreadPoolExecutor(len(writers)) as pool,
            psycopg.connect(journal.url) as lock,
        ):
            lock.execute("LOCK TABLE orders IN SHARE MODE")
            creates = [pool.submit(journal.place, user) for user in writers]
            lock_waits(journal, 1)  # they share a transaction, or two
            time.sleep(0.5)
            api.signal(signal.SIGTERM)
            time.sleep(chance.uniform(0.1, 1))
            lock.rollback()
            for create in creates:
                create.result()  # raises what the call raised
            answered = time.monotonic()
            assert api.process.wait(5) in (0, -signal.SIGTERM)
            assert time.monotonic() - answered < 3
        api.start()

    assert {code for code, _ in journal.answers} == {201}
    journal.settle(worker)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_ends_loses_no_order(
    production, run, http, rounds, chance, end
):
    """Again and again while orders come; two minutes make it 25 times."""
    api, worker = api_and_worker(run, production)
    journal, ada = Journal(production), user_of(http(api))
    unsaid = 0
    with journal.filling(ada, ada):
        for _ in rounds(2):
            time.sleep(chance.uniform(0, 3))
            worker.signal(end)
            if end == signal.SIGKILL:
                worker.process.wait()
                unsaid += THREADS
            else:
                assert worker.process.wait(10) == 0
            worker.start()

    journal.settle(worker, timeout=15, unsaid=unsaid)


def test_an_order_outlives_the_worker_that_processes_it(production, run, http):
    """A message is acknowledged when its order is processed, not before."""
    api, worker = api_and_worker(run, production)
    journal, ada = Journal(production), user_of(http(api))
    for _ in range(16):
        journal.place(ada)
    time.sleep(0.5)  # the relay skips what is locked
    with psycopg.connect(journal.url) as lock:
        lock.execute("SELECT 1 FROM events FOR UPDATE")
        lock_waits(journal, 1)  # they share a round trip
        worker.kill()
        # Or these sessions would do what the dead worker asked for.
        journal.query(
            f"SELECT pg_terminate_backend(pid) FROM ({LOCK_WAITS}) AS w"
        )
    worker.start()

    journal.settle(worker, timeout=15)


def test_a_worker_that_sleeps_loses_no_order(production, run, http, request):
    """Long enough, in the long form, for the broker to give it up."""
    api, worker = api_and_worker(run, production)
    journal, ada = Journal(production), user_of(http(api))
    with journal.filling(ada):
        time.sleep(3)
        worker.signal(signal.SIGSTOP)
        time.sleep(40 if request.config.getoption("fault_minutes") else 12)
        worker.signal(signal.SIGCONT)

    journal.settle(worker, timeout=15)


def test_two_apis_relay_each_order_once(production, run, http):
    """The relays race for one outbox; no event is claimed by both."""
    apis = [run(servers.api, production) for _ in range(2)]
    worker, journal = run(servers.worker, production), Journal(production)
    ada, bob = (user_of(http(api)) for api in apis)
    with journal.filling(ada, bob, ada, bob):
        time.sleep(2)

    journal.settle(worker)
    attempts = journal.query("SELECT DISTINCT attempts FROM events")
    assert attempts == [(1,)]


def test_an_api_outlives_another(production, run, http, rounds, chance):
    """The one goes on while the other is killed, and takes its events."""
    apis = [run(servers.api, production) for _ in range(2)]
    worker, journal = run(servers.worker, production), Journal(production)
    survivor, victim = Journal(production), apis[1]
    ada, bob = (user_of(http(api)) for api in apis)
    with survivor.filling(ada, ada), journal.filling(bob, bob):
        for _ in rounds(2):
            time.sleep(chance.uniform(0.5, 1))
            victim.kill()
            time.sleep(chance.uniform(0, 1))
            victim.start()
        victim.kill()

    assert {code for code, _ in survivor.answers} == {201}
    assert max(seconds for _, seconds in survivor.answers) < 2
    journal.acknowledged += survivor.acknowledged
    journal.end_leases()
    journal.settle(worker)


# --- Messages ---------------------------------------------------------------

OTHER_ID = str(uuid.uuid4()).encode()
HOSTILE = {
    "no id": {"id": None},
    "a list for an id": {"id": ["a", "b"]},
    "no task": {"task": None},
    "an unknown task": {"task": "orders.nothing"},
    "an unknown task without an id": {"task": "orders.nothing", "id": None},
    "a list for a task": {"task": [1]},
    "a task that only the body names": {"task": None, "body": b'{"task":[]}'},
    "neither a task nor JSON": {"task": None, "body": b"{"},
    "an eta": {"eta": "2020-01-01T00:00:00+00:00"},
    "an eta that is no time": {"eta": "banana"},
    "a number for an eta": {"eta": 7},
    "an eta in another age": {"eta": "9999-12-31T23:59:59+00:00"},
    "an eta before all time": {"eta": "0001-01-01T00:00:00+14:00"},
    "an expiry": {"expires": "2999-01-01T00:00:00+00:00"},
    "an expiry that is over": {"expires": "2020-01-01T00:00:00+00:00"},
    "an expiry that is no time": {"expires": "banana"},
    "a number for an expiry": {"expires": 7},
    "an unknown encoding": {"content_encoding": "klingon"},
    "an encoding of bytes to bytes": {"content_encoding": "zlib"},
    "no encoding": {"content_encoding": None},
    "an unknown compression": {"compression": "application/x-squeeze"},
    "a compression that is not there": {"compression": "zlib"},
    "a number for a compression": {"compression": 7},
    "a signature of a chord": {"group": "x", "root_id": 7, "chord": [1]},
    "retries without a number": {"retries": "many"},
    "a time limit that is no pair": {
        "timelimit": 7,
        "eta": "2020-01-01T00:00:00+00:00",
    },
    "a number for stamps": {"stamped_headers": 7},
    "no headers": {"headers": None},
    "a property that is not UTF-8": {"correlation_id": b"\xff"},
    "no content type": {"content_type": None},
    "an untrusted content type": {"content_type": "application/x-python"},
    "not JSON": {"body": b"{"},
    "not UTF-8": {"body": b'"\xff"'},
    "no body": {"body": b""},
    "a number for a body": {"body": b"7"},
    "a body of two": {"body": b"[[], {}]"},
    "no arguments": {"body": b"[[], {}, {}]"},
    "null for arguments": {"body": b"[null, null, null]"},
    "a uuid that is none": {"body": b'[["banana"], {}, {}]'},
    "another event's id": {"body": b'[["%s"], {}, {}]' % OTHER_ID},
    "an argument with a name": {
        "body": b'[[], {"event_id": "%s"}, {}]' % OTHER_ID
    },
    "a task to call afterwards": {
        "body": b'[["%s"], {}, {"callbacks": [{"task": "x"}]}]' % OTHER_ID
    },
}


def due_message(event_id):
    """Return the properties and body of a new order's message, due now."""
    return celery_message(Message(event_id, TASK, timedelta(0)))


def hostile_message(name):
    """Return a good message with something wrong, and its name as its id."""
    properties, body = due_message(uuid.uuid4())
    properties.message_id = name
    for part, value in HOSTILE[name].items():
        if part == "body":
            body = value
        elif hasattr(properties, part):
            setattr(properties, part, value)
        elif value is None:
            del properties.headers[part]
        else:
            properties.headers[part] = value
    return properties, body


def drain(channel, queue):
    """Return the ids of the messages in a queue, and empty it."""
    messages = iter(lambda: channel.basic_get(queue, auto_ack=True), None)
    taken = itertools.takewhile(lambda message: message[0], messages)
    return [properties.message_id for _, properties, _ in taken]


def test_hostile_messages_end_as_dead_letters(production, run, http):
    """The worker outlives each of them, and goes on with good ones."""
    api, worker = run(servers.api, production), run(servers.worker, production)
    journal, ada = Journal(production), user_of(http(api))
    dead, outlived = set(), set()
    with channel_to(production) as channel:
        channel.queue_purge(QUEUE)
        drain(channel, DEAD_LETTERS)
        for name in HOSTILE:
            properties, body = hostile_message(name)
            channel.basic_publish("", QUEUE, body, properties)
            deadline = time.monotonic() + 1
            while name not in dead and time.monotonic() < deadline:
                dead.update(drain(channel, DEAD_LETTERS))
                time.sleep(0.02)
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(0 if name in dead else 2)
            if worker.process.poll() is None:
                outlived.add(name)
            else:  # go on, to name all that it dies of
                channel.queue_purge(QUEUE)
                worker.start()

    assert (HOSTILE.keys() - outlived, HOSTILE.keys() - dead) == (set(), set())
    journal.place(ada)
    journal.settle(worker)


# --- RabbitMQ ---------------------------------------------------------------

MAX_WARNINGS = 4  # of an API, about one outage under load


def wipe(rabbitmq):
    """Kill the broker, and remove all that it kept."""
    rabbitmq.kill()
    shutil.rmtree(rabbitmq.env["RABBITMQ_MNESIA_BASE"])


def restart(rabbitmq):
    """Kill the broker: what it was sent and has not read is lost."""
    rabbitmq.kill()
    rabbitmq.start()


def alarm_at(share):
    """Return what lets the broker take messages below a share of memory."""
    setting = "set_vm_memory_high_watermark", share
    return lambda rabbitmq: servers.rabbitmqctl(rabbitmq, *setting)


def signalling(number):
    """Return what sends the broker a signal."""
    return lambda rabbitmq: rabbitmq.signal(number)


class Fault(NamedTuple):
    """How to harm and heal a broker, and how many seconds are between."""

    harm: Callable
    heal: Callable
    short: float
    long: float


FAULTS = {
    "stopped": Fault(servers.Server.stop, servers.Server.start, 1, 120),
    "killed": Fault(signalling(signal.SIGSTOP), restart, 1, 5),
    "hung": Fault(
        signalling(signal.SIGSTOP), signalling(signal.SIGCONT), 11, 35
    ),
    "blocked": Fault(alarm_at("0"), alarm_at("0.4"), 3, 90),
    "wiped": Fault(wipe, servers.Server.start, 0, 60),
}


@pytest.fixture
def lasting(request, chance):
    """Return how long a fault lasts in this form of a test."""
    if request.config.getoption("fault_minutes"):
        return lambda fault: fault.long * chance.uniform(1, 1.3)
    return lambda fault: fault.short


@contextlib.contextmanager
def harmed(rabbitmq, fault):
    """Harm the broker for the time of the block."""
    try:
        fault.harm(rabbitmq)
        yield
    finally:
        fault.heal(rabbitmq)


def check_degraded(client):
    """Check that the API, asked now, says that the broker is away."""
    began = time.monotonic()
    ready = client.get("/ready")
    assert time.monotonic() - began < 2
    assert ready.status_code == 200
    assert (ready.json()["status"], ready.json()["broker"]) == (
        "degraded",
        "unavailable",
    )


def warnings(api):
    """Return the lines of a log that an operator looks at."""
    return re.findall(".* (?:WARNING|ERROR|CRITICAL) .*", api.text())


@pytest.mark.parametrize("fault", FAULTS)
def test_orders_are_taken_without_the_broker(
    private_rabbitmq, run, http, rounds, chance, lasting, fault
):
    """Each create answers 201 at once; all is processed on its return."""
    rabbitmq, settings = private_rabbitmq
    api, worker = run(servers.api, settings), run(servers.worker, settings)
    journal, client = Journal(settings), http(api)
    ada = user_of(client)
    for _ in rounds(1):
        seconds, said = lasting(FAULTS[fault]), len(warnings(api))
        with journal.filling(ada):
            time.sleep(chance.uniform(0.5, 1.5))
            with harmed(rabbitmq, FAULTS[fault]):
                time.sleep(ANSWER_AGE + 0.5)
                check_degraded(client)
                time.sleep(seconds)
                check_degraded(client)
        # What moves from queue to queue as the broker ends may be lost, and
        # comes again with the end of its lease; only "killed" waits for that.
        if fault in ("wiped", "stopped"):
            journal.end_leases()
        journal.settle(worker, timeout=45)
        assert len(warnings(api)) - said <= MAX_WARNINGS, warnings(api)

    assert {code for code, _ in journal.answers} == {201}
    assert max(seconds for _, seconds in journal.answers) < 1
    if fault == "blocked" and seconds > BROKER_TIMEOUT:
        assert "ConnectionBlockedTimeout" in api.text()
    pauses = re.findall(r"Trying again in (\d+)", worker.text())
    assert max(map(int, pauses), default=0) <= 4  # seconds
    assert servers.BROKER_PASSWORD not in api.text() + worker.text()


def test_orders_outlive_their_queue(production, run, http, rounds, chance):
    """What was in the queue is published again when its lease ends.

    What comes later does not wait for that: the API makes the queue again.
    """
    api, worker = run(servers.api, production), run(servers.worker, production)
    journal, ada = Journal(production), user_of(http(api))
    for number in rounds(2):
        with channel_to(production) as channel, journal.filling(ada):
            worker.signal(signal.SIGSTOP)  # its messages come back
            time.sleep(chance.uniform(0.5, 1.5))
            worker.kill()
            time.sleep(0.5)
            harm = channel.queue_delete if number % 2 else channel.queue_purge
            harm(QUEUE)
            before = len(journal.acknowledged) + 1  # one is under way
            time.sleep(1)
        worker.start()
        after = journal.acknowledged[before:]
        servers.wait_until(partial(journal.processed, after), 15)
        journal.end_leases()
        journal.settle(worker)


def test_a_worker_outlives_its_queue(production, run, http, rounds, chance):
    """A queue deleted under a worker is declared again, and consumed."""
    api, worker = run(servers.api, production), run(servers.worker, production)
    journal, ada = Journal(production), user_of(http(api))
    for _ in rounds(1):
        with channel_to(production) as channel, journal.filling(ada):
            time.sleep(chance.uniform(0.5, 1.5))
            channel.queue_delete(QUEUE)
            time.sleep(1)
        journal.end_leases()
        journal.settle(worker)
        assert worker.process.poll() is None


# --- Relay ------------------------------------------------------------------


@pytest.mark.parametrize("lost", ["messages", "confirmation"])
def test_a_relay_killed_before_the_confirm_loses_no_order(
    production, stack, run, http, lost
):
    """What it had claimed is published by the next one, at least once.

    Either the broker was never told, or it has all and could not say so.
    """
    with proxying(stack.rabbitmq) as proxy:
        api = run(servers.api, through(proxy, production, stack.rabbitmq))
        journal, ada = Journal(production), user_of(http(api))
        servers.wait_until(lambda: broker_of(http(api)) == "ok")
        swallowed = TASK.encode() if lost == "messages" else CONFIRM
        proxy.swallow = lambda _, data: swallowed in data
        journal.place(ada)
        servers.wait_until(lambda: journal.where("attempts = 1"), 10)
        time.sleep(0.5)
        api.kill()
        proxy.swallow = lambda _, data: False
        api.start()
        for _ in range(5):
            journal.place(ada)
        worker = run(servers.worker, production)
        journal.end_leases()
        journal.settle(worker)


# --- No message twice in vain -----------------------------------------------


@pytest.fixture
def relaying(monkeypatch):
    """Return what runs a relay whose leases are short, in this process."""
    with contextlib.ExitStack() as stack:

        def start(settings, *, lease=3, sweep=0.2):
            length = timedelta(seconds=lease)
            monkeypatch.setattr(events, "LEASES", [length, 2 * length])
            monkeypatch.setattr(events, "SWEEP_INTERVAL", sweep)
            engine = create_sync_engine(settings.database_url, deadline=15)
            stack.callback(engine.dispose)
            outage = Outage(__name__, "The database")
            publisher = Publisher(settings.rabbitmq_url)
            relay = Relay(engine, publisher, outage)
            relay.start()
            stack.callback(publisher.close)
            stack.callback(relay.end, 5)
            return engine

        yield start


def test_without_a_worker_each_order_is_one_message(production, relaying):
    """However often its lease runs out, while its message waits."""
    journal = Journal(production)
    with channel_to(production) as channel:
        purged(channel)
        relaying(production, lease=2)
        for _ in range(10):
            journal.insert(5)
            time.sleep(0.1)
        servers.wait_until(lambda: ready_in(channel, QUEUE) >= 50, 10)
        time.sleep(4)
        waiting = ready_in(channel, QUEUE, DELAY_QUEUE)
        deliveries = journal.deliveries()
        purged(channel)

    assert waiting == 50
    assert deliveries == 1


def test_a_worker_away_under_load_gets_few_copies(production, relaying, run):
    """Its lease ran out for all that waits; nothing of it is lost."""
    journal = Journal(production)
    with channel_to(production) as channel:
        purged(channel)
    worker = run(servers.worker, production)
    relaying(production)
    for tenth in range(100):
        journal.insert(10)
        time.sleep(0.1)
        if tenth == 10:
            worker.signal(signal.SIGSTOP)
        if tenth == 80:
            worker.signal(signal.SIGCONT)

    journal.settle(worker)
    assert len(journal.acknowledged) == 1000
    assert journal.deliveries() <= 1.1


def test_a_purge_and_a_wiped_broker_heal_by_themselves(
    private_rabbitmq, run, http
):
    """Within 45 s, as the leases of what they took run out after 30."""
    rabbitmq, settings = private_rabbitmq
    api = run(servers.api, settings)
    journal, ada = Journal(settings), user_of(http(api))
    with channel_to(settings) as channel:
        journal.place(ada)
        servers.wait_until(lambda: journal.where("attempts = 1"), 10)
        time.sleep(0.5)
        purged(channel)
    for _ in range(3):
        journal.place(ada)
    servers.wait_until(lambda: not journal.where("attempts = 0"), 10)
    time.sleep(0.5)
    wipe(rabbitmq)
    rabbitmq.start()
    healed_by = time.monotonic() + 45
    worker = run(servers.worker, settings)
    assert journal.where("processed_at IS NULL") == set(journal.acknowledged)

    journal.settle(worker, timeout=healed_by - time.monotonic())
    assert "again" in api.text()


REFUSING = '{"max-length":5,"overflow":"reject-publish"}'


def test_a_purge_under_steady_traffic_heals_meanwhile(
    production, relaying, run
):
    """Although a message waits in the delay queue at every moment."""
    journal = Journal(production)
    worker = run(servers.worker, production)

    def order():
        """Make an order, 15 a second."""
        journal.insert(1)
        time.sleep(1 / 15)

    with channel_to(production) as channel:
        purged(channel)
        relaying(production, lease=3)
        with calling(order):
            time.sleep(3)
            purged(channel)
            lost = journal.where("attempts = 1 AND processed_at IS NULL")
            servers.wait_until(partial(journal.processed, lost), 20)
            assert ready_in(channel, DELAY_QUEUE) > 0

    journal.settle(worker)
    assert len(lost) >= 5


def test_a_queue_that_refused_is_used_again(private_rabbitmq, run, http):
    """It is said meanwhile, and what failed is no attempt."""
    rabbitmq, settings = private_rabbitmq
    api = run(servers.api, settings)
    journal, client = Journal(settings), http(api)
    ada = user_of(client)
    with channel_to(settings) as channel:
        purged(channel)
        policy = f"^{DELAY_QUEUE}$", REFUSING, "--apply-to", "queues"
        servers.rabbitmqctl(rabbitmq, "set_policy", "full", *policy)
        try:
            with journal.filling(ada):
                servers.wait_until(
                    lambda: broker_of(client) == "unavailable", 10
                )
                for _ in range(10):
                    time.sleep(0.25)
                    check_degraded(client)
        finally:
            servers.rabbitmqctl(rabbitmq, "clear_policy", "full")
    worker = run(servers.worker, settings)

    journal.settle(worker, timeout=45)
    journal.place(ada)
    journal.settle(worker, timeout=5)
    assert broker_of(client) == "ok"
    assert journal.deliveries() == 1
    assert len(warnings(api)) <= MAX_WARNINGS


def poison(journal, event_id, how=""):
    """Let the database refuse that an event is processed."""
    with psycopg.connect(journal.url) as connection:
        connection.execute(
            "CREATE FUNCTION refuse() RETURNS trigger AS"
            f" $$ BEGIN RAISE 'poisoned' {how}; END $$ LANGUAGE plpgsql"
        )
        connection.execute(
            "CREATE TRIGGER refuse BEFORE UPDATE OF processed_at ON events"
            f" FOR EACH ROW WHEN (OLD.id = '{event_id}')"
            " EXECUTE FUNCTION refuse()"
        )


def test_a_bad_order_fails_alone(production, run):
    """Those that share its round trip are processed, each once."""
    journal = Journal(production)
    made = journal.insert(20)
    (bad, _), *good = made
    poison(journal, bad)
    with channel_to(production) as channel:
        purged(channel)
        for event_id, _ in made:
            properties, body = due_message(event_id)
            channel.basic_publish("", QUEUE, body, properties)
        worker = run(servers.worker, production)
        orders = [str(order_id) for _, order_id in good]
        servers.wait_until(lambda: journal.processed(orders), 10)
        servers.wait_until(lambda: ready_in(channel, DEAD_LETTERS) == 1, 10)
        worker.stop()
        left = ready_in(channel, QUEUE)

    assert left == 0
    unprocessed = "SELECT id FROM events WHERE processed_at IS NULL"
    assert journal.query(unprocessed) == [(bad,)]
    assert worker.text().count(" processed\n") == len(good)


def test_a_dead_letter_again_and_again_is_said_each_time(
    production, relaying, run, caplog
):
    """Its event is never processed, and is not forgotten."""
    journal = Journal(production)
    [(poisoned, order)] = journal.insert(1)
    poison(journal, poisoned)
    with channel_to(production) as channel:
        purged(channel)
        worker = run(servers.worker, production)
        relaying(production, lease=0.5)
        servers.wait_until(lambda: ready_in(channel, DEAD_LETTERS) >= 3, 20)
        worker.stop()
        dead = ready_in(channel, DEAD_LETTERS)

    said = [m for m in caplog.messages if f"{order} (delivery" in m]
    deliveries = journal.deliveries()
    assert dead <= deliveries <= dead + 1
    assert deliveries - 1 <= len(said) <= deliveries
    assert len(said) == len(set(said))


def test_the_dead_letters_have_a_limit(private_rabbitmq):
    """The oldest goes; a disk is not filled by one message."""
    _, settings = private_rabbitmq
    limit = QUEUE_ARGUMENTS[DEAD_LETTERS]["x-max-length"]
    with channel_to(settings) as channel:
        purged(channel).confirm_delivery()
        channel.basic_publish("", DEAD_LETTERS, b"the oldest")
        plain = channel.connection.channel()
        for number in range(limit):
            plain.basic_publish("", DEAD_LETTERS, str(number).encode())
        plain.close()
        servers.wait_until(
            lambda: ready_in(channel, DEAD_LETTERS) == limit, 10
        )
        _, _, oldest = channel.basic_get(DEAD_LETTERS, auto_ack=True)
        purged(channel)

    assert oldest == b"0"


def test_a_forged_message_processes_no_other_kind_of_event(production, run):
    """A change of status is the keeper's, whatever a message says."""
    journal = Journal(production)
    [(change, _)] = journal.insert(1, kind="status_changed")
    [(good, order)] = journal.insert(1)
    worker = run(servers.worker, production)
    with channel_to(production) as channel:
        purged(channel)
        for event_id in (change, good):
            properties, body = due_message(event_id)
            channel.basic_publish("", QUEUE, body, properties)
        servers.wait_until(lambda: journal.processed([str(order)]), 10)
    worker.stop()

    unprocessed = "SELECT id FROM events WHERE processed_at IS NULL"
    assert journal.query(unprocessed) == [(change,)]
    assert worker.text().count(" processed") == 1


# --- The database behind a grey network -------------------------------------


def test_a_network_that_swallows_stops_nobody_for_long(
    production, stack, run, http
):
    """What worker and relay have open is silent for ever; new ones work."""
    with proxying(stack.postgres) as proxy:
        settings = through(proxy, production, stack.postgres)
        api, worker = api_and_worker(run, settings)
        journal, ada = Journal(production), user_of(http(api))
        with journal.filling(ada, ada):
            time.sleep(3)
            assert proxy.swallow_present() > 2
            swallowed_at = time.monotonic()
            time.sleep(4)
        servers.wait_until(
            lambda: not journal.where("processed_at IS NULL LIMIT 1"), 45
        )
        assert time.monotonic() - swallowed_at < 45

        # What was swallowed may be the answer to the worker's commit.
        journal.settle(worker, unsaid=THREADS)
        assert "The database is away" in worker.text()
        assert "The database is away" in api.text()


def buffers(engine, statement, parameters):
    """Return how many pages of the database a statement visits."""
    with engine.connect() as connection:
        rows = connection.exec_driver_sql(
            f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters
        )
        plan = rows.scalar()[0]["Plan"]
        return plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]


def test_a_claim_walks_no_dead_entries_again_and_again(production, relaying):
    """An old snapshot keeps what is processed in the index, for hours."""
    journal, claims = Journal(production), []
    with channel_to(production) as channel:
        purged(channel)
    journal.insert(20_000, age=600)
    with psycopg.connect(production.database_url) as snapshot:
        snapshot.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        snapshot.execute("SELECT count(*) FROM events")
        journal.query("UPDATE events SET processed_at = now() RETURNING 1")
        engine = relaying(production, sweep=5)

        def note(_, __, statement, parameters, *___):
            claims.append((statement, parameters))

        event.listen(engine, "before_cursor_execute", note)
        servers.wait_until(lambda: len(claims) >= 8, 10)
        event.remove(engine, "before_cursor_execute", note)
        pages = [buffers(engine, *claim) for claim in claims[:8]]

    assert max(pages) > 100
    assert sorted(pages)[4] < max(pages) / 10


# --- The worker's connection ------------------------------------------------

NOISE = re.compile(
    "Unrecoverable|DeprecationWarning|Couldn't ack|Error cleaning up"
)


def test_a_worker_outlives_a_connect_that_is_cut_anywhere(
    production, stack, run, rounds, chance
):
    """At each piece of data that a connect exchanges, and at each step."""
    with proxying(stack.rabbitmq) as proxy:
        worker = run(
            servers.worker, through(proxy, production, stack.rabbitmq)
        )
        pieces = proxy.connections[0].pieces
        steps = [DEAD_LETTERS.encode(), QUEUE.encode()]
        cuts = [lambda c, data, s=step: s in data for step in steps]
        for _ in rounds(6):
            last = chance.randrange(pieces + 2)
            cuts.append(lambda c, data, n=last: c.pieces > n)
        for cut in cuts:
            proxy.cut, number = cut, len(worker.text())
            proxy.end_present()
            time.sleep(1.5)
            proxy.cut = lambda connection, data: False
            proxy.end_present()
            servers.wait_until(
                lambda number=number: "Connected to" in worker.text()[number:],
                20,
            )
            assert worker.process.poll() is None, worker.text()
        journal = Journal(production)
        [(event_id, _)] = journal.insert(1)
        with channel_to(production) as channel:
            properties, body = celery_message(Message(event_id, TASK, DELAY))
            declared(channel).basic_publish("", DELAY_QUEUE, body, properties)
        journal.settle(worker)

    assert NOISE.search(worker.text()) is None, worker.text()


def test_a_worker_that_lost_its_connection_says_it_shortly(
    production, stack, run, http
):
    """Who processes meanwhile cannot acknowledge; the message comes again."""
    with proxying(stack.rabbitmq) as proxy:
        api = run(servers.api, production)
        worker = run(
            servers.worker, through(proxy, production, stack.rabbitmq)
        )
        journal, ada = Journal(production), user_of(http(api))
        for _ in range(16):
            journal.place(ada)
        time.sleep(0.5)
        with psycopg.connect(journal.url) as lock:
            lock.execute("SELECT 1 FROM events FOR UPDATE")
            lock_waits(journal, 1)  # they share a round trip
            proxy.end_present()
        journal.settle(worker)

    assert NOISE.search(worker.text()) is None, worker.text()
    assert "Connection to broker lost" in worker.text()


@pytest.mark.parametrize("process", ["api", "worker"])
def test_a_wrong_password_is_one_line_a_try(production, run, process):
    """No traceback, and the password stays unsaid, right or wrong."""
    right, wrong = servers.BROKER_PASSWORD, "a-wrong-password"
    url = production.rabbitmq_url.replace(right, wrong)

    def start(folder, env):
        server = getattr(servers, process)(folder, env)
        server.ready = lambda: "ACCESS_REFUSED" in server.text()
        return server

    server = run(start, replace(production, rabbitmq_url=url))
    time.sleep(5)
    said = re.findall(r".*ACCESS_REFUSED.*", server.text())

    assert server.process.poll() is None
    # Celery warns of root, whom the tests may be run by.
    others = [line for line in warnings(server) if "superuser" not in line]
    assert 1 <= len(said) <= 5
    assert others == said
    assert "Traceback" not in server.text()
    assert wrong not in server.text()
