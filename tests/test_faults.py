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
from functools import partial
from typing import NamedTuple

import pika
import psycopg
import pytest
import servers
from faults import Journal, calling, user_of

from orders.events import DueEvent
from orders.models import now
from orders.rabbitmq import DEAD_LETTERS, QUEUE, celery_message

THREADS = 8  # of a worker
LOCK_WAITS = (
    "SELECT pid FROM pg_stat_activity"
    " WHERE wait_event_type = 'Lock' AND datname = current_database()"
)


@contextlib.contextmanager
def channel_to(settings):
    """Open a channel to the broker."""
    parameters = pika.URLParameters(settings.rabbitmq_url)
    with pika.BlockingConnection(parameters) as connection:
        yield connection.channel()


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
            lock_waits(journal, len(writers))
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
    for _ in range(2 * THREADS):
        journal.place(ada)
    time.sleep(0.5)  # the relay skips what is locked
    with psycopg.connect(journal.url) as lock:
        lock.execute("SELECT 1 FROM events FOR UPDATE")
        lock_waits(journal, THREADS)
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

HOSTILE = {
    "no id": {"id": None},
    "a list for an id": {"id": ["a", "b"]},
    "no task": {"task": None},
    "an unknown task": {"task": "orders.nothing"},
    "an unknown task without an id": {"task": "orders.nothing", "id": None},
    "a list for a task": {"task": [1]},
    "a task that only the body names": {"task": None, "body": b'{"task":[]}'},
    "neither a task nor JSON": {"task": None, "body": b"{"},
    "an eta that is no time": {"eta": "banana"},
    "a number for an eta": {"eta": 7},
    "an eta in another age": {"eta": "9999-12-31T23:59:59+00:00"},
    "an eta before all time": {"eta": "0001-01-01T00:00:00+14:00"},
    "an expiry that is no time": {"expires": "banana"},
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
    "a uuid that is none": {
        "body": b'[[], {"event_id": "banana", "order_id": "banana"}, {}]'
    },
    "no request id": {
        "body": b'[[], {"event_id": "%(id)s", "order_id": "%(id)s"}, {}]'
        % {b"id": str(uuid.uuid4()).encode()}
    },
}


def hostile_message(name):
    """Return a good message with something wrong, and its name as its id."""
    event = DueEvent(uuid.uuid4(), uuid.uuid4(), {}, now())
    properties, body = celery_message(event)
    properties.message_id = name
    del properties.headers["eta"]  # so that it is not waited for
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
                time.sleep(0.5)
                check_degraded(client)
                time.sleep(seconds)
                check_degraded(client)
        if fault == "wiped":
            journal.end_leases()
        journal.settle(worker, timeout=15)
        assert len(warnings(api)) - said <= MAX_WARNINGS, warnings(api)

    assert {code for code, _ in journal.answers} == {201}
    assert max(seconds for _, seconds in journal.answers) < 1
    assert fault != "blocked" or "an alarm is set" in api.text()
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


def test_a_relay_killed_before_the_confirm_loses_no_order(
    private_rabbitmq, run, http, rounds, chance
):
    """What it had claimed is published by the next one, at least once.

    The hung broker reads later what it was sent, so the worker sees that
    twice; the killed one never does.
    """
    rabbitmq, settings = private_rabbitmq
    api, worker = run(servers.api, settings), run(servers.worker, settings)
    journal, ada = Journal(settings), user_of(http(api))
    for number in rounds(2):
        worker.signal(signal.SIGSTOP)
        with harmed(rabbitmq, FAULTS["killed" if number % 2 else "hung"]):
            with journal.filling(ada):
                time.sleep(chance.uniform(0.5, 1.5))
            claimed = journal.where("due_at > now() AND processed_at IS NULL")
            api.kill()
            api.start()
        assert claimed
        journal.end_leases()
        servers.wait_until(
            lambda: (
                not journal.where("due_at <= now() AND processed_at IS NULL")
            )
        )
        worker.signal(signal.SIGCONT)
        journal.settle(worker)
