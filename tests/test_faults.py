"""Faults in real processes: what was acknowledged is never lost.

A journal keeps the orders that were answered with 201. At rest each of them
is in the events table and processed, and the logs of all processes together
say so once. Servers that a test harms are its own.
"""

import contextlib
import itertools
import random
import re
import signal
import subprocess
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx2
import pika
import psycopg
import pytest
import servers
from conftest import PASSWORD, User, environment, migrate

from orders.events import DueEvent
from orders.models import now
from orders.rabbitmq import DEAD_LETTERS, QUEUE, celery_message

RANKS = {"PENDING": 0, "PAID": 1, "SHIPPED": 2}
PAUSE = 0.02  # seconds between two calls of a client


class Journal:
    """What the service has acknowledged."""

    def __init__(self, settings):
        """Take where the orders must be."""
        self.url = settings.database_url
        self.acknowledged = []
        self.answers = []  # status and seconds

    def place(self, user):
        """Create an order."""
        began = time.monotonic()
        answer = user.create()
        self.answers.append((answer.status_code, time.monotonic() - began))
        if answer.status_code == 201:
            self.acknowledged.append(answer.json()["id"])

    @contextlib.contextmanager
    def filling(self, *users):
        """Let users create orders for the time of the block."""
        with calling(*(lambda user=user: self.place(user) for user in users)):
            yield

    def query(self, statement):
        """Return the rows of a statement."""
        with psycopg.connect(self.url) as connection:
            return connection.execute(statement).fetchall()

    def end_leases(self):
        """Make what is not processed due now, to save the 30 s of a lease."""
        self.query(
            "UPDATE events SET due_at = now() WHERE processed_at IS NULL"
            " RETURNING id"
        )

    def settle(self, *processes, timeout=20, unsaid=0):
        """Check that each order is kept, processed, and said to be so once.

        A kill between a commit and its log line leaves an order `unsaid`.
        """
        assert self.acknowledged
        servers.wait_until(
            lambda: (
                not self.query(
                    "SELECT 1 FROM events WHERE kind = 'new_order'"
                    " AND processed_at IS NULL LIMIT 1"
                )
            ),
            timeout,
        )
        time.sleep(1)  # for what may be delivered a second time
        kept = {str(row[0]) for row in self.query("SELECT id FROM orders")}
        text = "".join(process.text() for process in processes)
        said = Counter(re.findall(r"Order (\S+) processed", text))
        assert set(self.acknowledged) - kept == set()
        assert [order for order, n in said.items() if n > 1] == []
        assert len(set(self.acknowledged) - said.keys()) <= unsaid


@contextlib.contextmanager
def calling(*calls):
    """Repeat each call in a thread of its own for the time of the block."""
    ended = threading.Event()

    def repeat(call):
        while not ended.wait(PAUSE):
            with contextlib.suppress(httpx2.TransportError):  # API killed
                call()

    with ThreadPoolExecutor(len(calls)) as pool:
        jobs = [pool.submit(repeat, call) for call in calls]
        try:
            yield
        finally:
            ended.set()
        for job in jobs:
            job.result()


def user_of(client):
    """Return a user of their own."""
    return User(client, f"{uuid.uuid4()}@example.com")


@pytest.fixture
def private_rabbitmq(production, tmp_path):
    """Run a broker that may be harmed."""
    with servers.running(servers.rabbitmq(tmp_path)) as server:
        url = f"amqp://guest:guest@127.0.0.1:{server.port}/"
        yield server, replace(production, rabbitmq_url=url)


@pytest.fixture
def private_redis(production, tmp_path):
    """Run a Redis that may be harmed."""
    with servers.running(servers.redis(tmp_path)) as server:
        url = f"redis://127.0.0.1:{server.port}/0"
        yield server, replace(production, redis_url=url)


@pytest.fixture
def private_postgres(production, tmp_path):
    """Run a database that may be harmed."""
    with servers.running(servers.postgres(tmp_path)) as server:
        url = f"postgresql://postgres@127.0.0.1:{server.port}/postgres"
        migrate(url)
        yield server, replace(production, database_url=url)


@pytest.fixture
def run(tmp_path):
    """Return what runs an API or a worker until the test ends."""
    with contextlib.ExitStack() as stack:

        def start(factory, settings, **env):
            env = environment(settings) | env
            server = factory(tmp_path, env)
            return stack.enter_context(servers.running(server))

        yield start


@contextlib.contextmanager
def channel_to(settings):
    """Open a channel to the broker."""
    parameters = pika.URLParameters(settings.rabbitmq_url)
    with pika.BlockingConnection(parameters) as connection:
        yield connection.channel()


# --- Processes of ours ------------------------------------------------------


def test_a_killed_api_loses_no_order(production, run, http):
    """Three kills under load, each followed by a start on the same port."""
    api, worker = run(servers.api, production), run(servers.worker, production)
    journal, ada = Journal(production), user_of(http(api))
    with journal.filling(ada, ada):
        for _ in range(3):
            time.sleep(0.7)
            api.kill()
            api.start()

    journal.end_leases()
    journal.settle(worker)


def test_a_killed_worker_loses_no_order(production, run, http):
    """Kills at different moments, and polite ends, while orders come."""
    api, worker = run(servers.api, production), run(servers.worker, production)
    journal, ada = Journal(production), user_of(http(api))
    with journal.filling(ada):
        for end in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL):
            time.sleep(2.5)
            worker.signal(end)
            worker.process.wait(20)
            worker.start()

    journal.settle(worker, unsaid=2)


def test_two_apis_relay_each_order_once(production, run, http):
    """The relays race for one outbox; no event is claimed by both."""
    apis = [run(servers.api, production) for _ in range(2)]
    worker, journal = run(servers.worker, production), Journal(production)
    ada, bob = (user_of(http(api)) for api in apis)
    with journal.filling(ada, bob, ada, bob):
        time.sleep(4)

    journal.settle(worker)
    attempts = journal.query("SELECT DISTINCT attempts FROM events")
    assert attempts == [(1,)]


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
    "no headers": {"headers": None},
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
                # A new worker may see its first message a heartbeat late.
                worker.process.wait(0 if name in dead else 10)
            if worker.process.poll() is None:
                outlived.add(name)
            else:  # go on, to name all that it dies of
                channel.queue_purge(QUEUE)
                worker.start()

    assert (HOSTILE.keys() - outlived, HOSTILE.keys() - dead) == (set(), set())
    journal.place(ada)
    journal.settle(worker)


# --- RabbitMQ ---------------------------------------------------------------


@pytest.mark.parametrize("fault", ["killed", "hung"])
def test_orders_are_taken_without_the_broker(
    private_rabbitmq, run, http, fault
):
    """Each create answers 201 at once; all is processed on its return."""
    rabbitmq, settings = private_rabbitmq
    api, worker = run(servers.api, settings), run(servers.worker, settings)
    journal, ada = Journal(settings), user_of(http(api))
    with journal.filling(ada):
        time.sleep(1)
        if fault == "killed":
            rabbitmq.kill()
            time.sleep(3)
            rabbitmq.start()
        else:
            rabbitmq.signal(signal.SIGSTOP)
            time.sleep(15)
            rabbitmq.signal(signal.SIGCONT)
        time.sleep(1)

    assert {code for code, _ in journal.answers} == {201}
    assert max(seconds for _, seconds in journal.answers) < 1
    journal.settle(worker, timeout=25)


@pytest.mark.parametrize("fault", ["queue_purge", "queue_delete"])
def test_orders_outlive_their_queue(production, run, http, fault):
    """What was in the queue is published again when its lease ends."""
    api, worker = run(servers.api, production), run(servers.worker, production)
    journal, ada = Journal(production), user_of(http(api))
    worker.signal(signal.SIGSTOP)  # its messages stay with it, and come back
    with channel_to(production) as channel, journal.filling(ada):
        time.sleep(1)
        worker.kill()
        time.sleep(0.5)
        getattr(channel, fault)(QUEUE)
        time.sleep(1)
    worker.start()

    journal.end_leases()
    journal.settle(worker)


def test_a_worker_outlives_its_queue(production, run, http):
    """A queue deleted under a worker is declared again, and consumed."""
    api, worker = run(servers.api, production), run(servers.worker, production)
    journal, ada = Journal(production), user_of(http(api))
    pid = worker.process.pid
    with channel_to(production) as channel, journal.filling(ada):
        time.sleep(1)
        channel.queue_delete(QUEUE)
        time.sleep(1)

    journal.end_leases()
    journal.settle(worker)
    assert worker.process.pid == pid
    assert worker.process.poll() is None


# --- Redis ------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["killed", "hung"])
def test_reads_and_changes_work_without_redis(private_redis, run, http, fault):
    """Reads stay quick, the limit holds, and nothing stale comes back."""
    redis, settings = private_redis
    api = run(servers.api, settings)
    limited = run(servers.api, settings, RATE_LIMIT="5/hour")
    ada, answers = user_of(http(api)), []
    orders = [ada.order() for _ in range(5)]

    def read():
        began = time.monotonic()
        answer = ada.get(random.choice(orders))
        answers.append((answer.status_code, time.monotonic() - began))

    for order in orders * 2:
        ada.get(order)
    assert ada.get(orders[0]).headers["x-cache"] == "hit"
    if fault == "killed":
        redis.kill()
    else:
        redis.signal(signal.SIGSTOP)
    with calling(read, read, read, read):
        time.sleep(4)
        changes = [ada.change(order, "PAID").status_code for order in orders]
    codes = [http(limited).get("/orders/user/1").status_code for _ in range(7)]
    if fault == "killed":
        redis.start()
    else:
        redis.signal(signal.SIGCONT)
    time.sleep(1.5)

    assert {code for code, _ in answers} == {200}
    seconds = sorted(seconds for _, seconds in answers)
    assert seconds[int(len(seconds) * 0.99)] < 0.3
    assert changes == [200] * 5
    assert codes == [401] * 5 + [429] * 2
    for order in orders * 2:
        assert ada.get(order).json()["status"] == "PAID"
    servers.wait_until(
        lambda: ada.get(orders[0]).headers["x-cache"] == "hit", 15
    )


def test_no_read_is_older_than_an_acknowledged_change(production, run, http):
    """Readers of two APIs race a writer; a read never goes back."""
    apis = [run(servers.api, production) for _ in range(2)]
    ada = user_of(http(apis[0]))
    orders = [ada.order() for _ in range(80)]
    acknowledged = dict.fromkeys(orders, 0)
    reads, stale, front = itertools.count(), [], [orders[0]]

    def reader(client):
        def read():
            for _ in range(5):
                order = random.choice(front)
                oldest = acknowledged[order]
                path = f"/orders/{order}"
                answer = client.get(path, headers=ada.headers).json()
                next(reads)
                if RANKS[answer["status"]] < oldest:
                    stale.append((order, oldest, answer["status"]))

        return read

    readers = [reader(http(api)) for api in apis for _ in range(2)]
    with calling(*readers):
        for order in orders:
            front[:] = [order, *random.sample(orders, 2)]
            for status in ("PAID", "SHIPPED"):
                time.sleep(random.uniform(0, 0.06))
                assert ada.change(order, status).status_code == 200
                acknowledged[order] = RANKS[status]

    assert stale == []
    assert next(reads) > 500


# --- PostgreSQL -------------------------------------------------------------


def call_all(user, order_id):
    """Make each call that needs the database, all at once."""
    account = {"email": f"{uuid.uuid4()}@example.com", "password": PASSWORD}
    form = {"username": account["email"], "password": PASSWORD}
    post = user.client.post
    calls = [
        lambda: post("/register/", json=account),
        lambda: post("/token/", data=form),
        lambda: user.create(),
        lambda: user.create(headers={"Idempotency-Key": "a-key"}),
        lambda: user.get(order_id),
        lambda: user.change(order_id, "PAID"),
        lambda: user.call("GET", f"/orders/{order_id}/events"),
        lambda: user.call("GET", f"/orders/user/{user.id}"),
    ] * 3

    def timed(call):
        began = time.monotonic()
        return call(), time.monotonic() - began

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(timed, calls))


@pytest.mark.parametrize("fault", ["killed", "hung"])
def test_a_lost_database_is_a_503_until_it_is_back(
    private_postgres, run, http, fault
):
    """Clients are told to come back, in time, and find all well."""
    postgres, settings = private_postgres
    api = run(servers.api, settings)
    ada = user_of(http(api))
    order_id = ada.order()  # never read, hence not in the cache
    began = time.monotonic()
    if fault == "killed":
        postgres.kill()
    else:
        postgres.signal(signal.SIGSTOP)
    ready = http(api).get("/ready")
    ready_after = time.monotonic() - began
    answers = call_all(ada, order_id)
    health = http(api).get("/health")
    answers += call_all(ada, order_id)
    time.sleep(max(0, began + 7 - time.monotonic()))
    if fault == "killed":
        postgres.start()
    else:
        postgres.signal(signal.SIGCONT)
    back = time.monotonic()
    servers.wait_until(lambda: ada.create().status_code == 201, 5)
    servers.wait_until(lambda: http(api).get("/ready").is_success, 5)

    assert time.monotonic() - back < 5
    assert (ready.status_code, health.status_code) == (503, 200)
    assert ready_after < 2
    assert Counter(a.status_code for a, _ in answers) == {503: len(answers)}
    assert all(answer.headers["Retry-After"] for answer, _ in answers)
    assert max(seconds for _, seconds in answers) < 5
    after = Counter(a.status_code for a, _ in call_all(ada, order_id))
    assert not any(code >= 500 for code in after), after


def test_a_worker_waits_for_its_database(private_postgres, run, http):
    """Orders that were due while it was away are processed on its return."""
    postgres, settings = private_postgres
    api, worker = run(servers.api, settings), run(servers.worker, settings)
    journal, ada = Journal(settings), user_of(http(api))
    with journal.filling(ada):
        time.sleep(3)
        postgres.kill()
        time.sleep(6)
    postgres.start()

    journal.settle(worker, timeout=15, unsaid=8)
