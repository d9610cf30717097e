"""The worker is Celery's own: its options, its monitors, its dead letters.

Every worker is a real process. Most tests publish messages themselves, as the
relay would, for events that they have written into PostgreSQL.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pika
import psycopg
import pytest
import servers
from conftest import environment, replace
from faults import Journal, proxying, through
from test_faults import (
    TASK,
    channel_to,
    due_message,
    lock_waits,
    poison,
    purged,
    ready_in,
    warnings,
)
from test_settings import run_to_its_end

from orders.broker import (
    DEAD_LETTERS,
    QUEUE,
    QUEUE_ARGUMENTS,
    Message,
    Publisher,
)
from orders.handlers import HANDLERS

CELERY = ["celery", "-A", "orders.tasks"]
BURST = 200  # orders, many more than a worker prefetches


def worker_with(*options, code="", log="worker.log"):
    """Return what makes a worker with options of Celery's own.

    `code`: of a module that has the app, if it is not that of the package.
    """

    def make(folder, env):
        server = servers.worker(folder, env)
        if code:
            (folder / "altered.py").write_text(code)
            server.command[server.command.index("-A") + 1] = "altered"
        server.command += options
        server.log = folder / log
        return server

    return make


def publish(channel, events):
    """Publish the message of each event, as one that is due."""
    for event_id, _ in events:
        properties, body = due_message(event_id)
        channel.basic_publish("", QUEUE, body, properties)


def complaints(worker):
    """Return the lines of a log that an operator looks at."""
    # Celery warns of root, as whom the tests may run.
    return [line for line in warnings(worker) if "superuser" not in line]


def check_each_processed_once(channel, journal, *workers, timeout=30):
    """Check that nothing was lost, doubled, rejected or left behind."""
    journal.settle(*workers, timeout=timeout)
    for worker in workers:
        assert worker.stop() == 0, worker.text()
    # What no worker had acknowledged is in the queue again.
    assert ready_in(channel, QUEUE, DEAD_LETTERS) == 0


def celery(settings, folder, *arguments):
    """Return what a command of Celery's, beside the worker, prints."""
    done = subprocess.run(
        [servers.PYTHON / CELERY[0], *CELERY[1:], *arguments],
        cwd=folder,
        env={**os.environ, **environment(settings)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- Celery's monitors ------------------------------------------------------


def test_celery_inspect_knows_each_handler_and_what_runs(
    production, run, tmp_path
):
    """There is a task for each handler, and a stock monitor sees it run."""
    worker, journal = run(servers.worker, production), Journal(production)
    [(event_id, _)] = events = journal.insert(1)

    def inspect(what):
        answers = celery(production, tmp_path, "inspect", what, "--json")
        [answer] = json.loads(answers).values()
        return answer

    with ThreadPoolExecutor() as pool:
        registered, stats, pong = pool.map(
            inspect, ("registered", "stats", "ping")
        )
    with channel_to(production) as channel:
        with psycopg.connect(journal.url) as lock:
            lock.execute("SELECT 1 FROM events FOR UPDATE")
            publish(channel, events)
            lock_waits(journal, 1)
            active = inspect("active")
        check_each_processed_once(channel, journal, worker)

    assert set(registered) == {each.task for each in HANDLERS.values()}
    assert [(task["name"], task["args"]) for task in active] == [
        (TASK, [str(event_id)])
    ]
    assert active[0]["id"] == str(event_id)
    assert stats["pool"]["implementation"].endswith("thread:TaskPool")
    assert pong == {"ok": "pong"}
    assert complaints(worker) == []


def test_celery_events_shows_each_task_run(production, run, tmp_path):
    """Received and started, then succeeded or failed, as Flower shows it."""
    run(worker_with("-E"), production)
    journal = Journal(production)
    [(bad, _), *good] = events = journal.insert(4)
    poison(journal, bad)
    watcher = servers.Server(
        [servers.PYTHON / CELERY[0], *CELERY[1:], "events", "--dump"],
        port=0,
        folder=tmp_path,
        env=environment(production) | {"PYTHONUNBUFFERED": "1"},
        ready=lambda: "heartbeat" in watcher.text(),
    )
    watcher.log = tmp_path / "events.log"
    with channel_to(production) as channel, servers.running(watcher):
        publish(channel, events)
        servers.wait_until(
            lambda: watcher.text().count("task succeeded") == 3, 20
        )
        servers.wait_until(lambda: "task failed" in watcher.text(), 20)
        purged(channel)

    seen = Counter(re.findall(r"\] task (\w+)", watcher.text()))
    assert seen["received"] == seen["started"] == 4
    assert (seen["succeeded"], seen["failed"]) == (3, 1)
    for event_id, _ in good:
        assert f"{TASK}({event_id})" in watcher.text()


def test_a_failed_task_is_one_line_that_says_why(production, run):
    """It names the event and ends with a traceback; the order is retried."""
    journal = Journal(production)
    [(bad, _)] = events = journal.insert(1)
    poison(journal, bad)
    worker = run(servers.worker, production)
    with channel_to(production) as channel:
        publish(channel, events)
        servers.wait_until(lambda: ready_in(channel, DEAD_LETTERS), 10)
        purged(channel)
    worker.stop()

    [line] = complaints(worker)
    assert re.search(rf"ERROR .*{bad}.*poisoned", line)
    assert "Traceback" in worker.text()


# --- Celery's options -------------------------------------------------------

PREFORK = "--pool=prefork"
OPTIONS = {
    "-c 8": ("-c", "8"),  # as it is without an option
    "-c 4": ("-c", "4"),
    "-c 1": ("-c", "1"),
    "more threads than connections": ("-c", "30"),
    "autoscale": ("--autoscale=4,2",),
    "one at a time": ("-E", "--without-heartbeat", "--prefetch-multiplier=1"),
    "solo": ("--pool=solo",),
    "solo, autoscale": ("--pool=solo", "--autoscale=4,2"),
    "prefork": (PREFORK, "-c", "4"),
    "prefork, autoscale": (PREFORK, "--autoscale=4,2", "-E"),
    "prefork, spawn": (PREFORK, "-c", "2", "--pool-start-method=spawn"),
    "prefork, few tasks each": (PREFORK, "-c2", "--max-tasks-per-child=50"),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_burst_is_processed_once_with_each_option(production, run, options):
    """No acknowledgement is lost or doubled, and no order is left."""
    journal = Journal(production)
    worker = run(worker_with(*options), production)
    with channel_to(production) as channel:
        publish(channel, journal.insert(BURST))
        check_each_processed_once(channel, journal, worker)

    assert complaints(worker) == []
    pool = [o.partition("=")[2] for o in options if o.startswith("--pool=")]
    expected = pool[0] if pool else "thread"
    assert f"({expected})" in worker.text()  # in Celery's banner


# --- Workers that end, or lose something ------------------------------------


@pytest.mark.parametrize("options", [(), (PREFORK, "-c", "2"), ("-P", "solo")])
def test_a_worker_that_is_stopped_in_a_burst_gives_the_rest_back(
    production, run, options
):
    """What it has begun is done; another does the rest, each order once."""
    # It goes on for up to half a second after it was asked to stop.
    number = 6 * BURST
    journal = Journal(production)
    worker = run(worker_with(*options), production)
    with channel_to(production) as channel:
        publish(channel, journal.insert(number))
        servers.wait_until(lambda: " processed" in worker.text(), 10)
        # Processes of the prefork pool wait 30 s for Celery to hear them.
        assert worker.stop(timeout=45) == 0, worker.text()
        done = worker.text().count(" processed")
        rest = number - done
        # A pool may end before Celery hears of the last tasks: their messages
        # come again, too, and do nothing.
        servers.wait_until(lambda: ready_in(channel, QUEUE) >= rest, 10)
        worker.start()
        check_each_processed_once(channel, journal, worker)

    assert rest > 0
    assert complaints(worker) == []


def test_a_task_whose_process_is_killed_is_run_by_another(production, run):
    """A child of the prefork pool dies in the middle of a task."""
    journal = Journal(production)
    worker = run(worker_with(PREFORK, "-c", "2"), production)
    events = journal.insert(20)
    with channel_to(production) as channel:
        with psycopg.connect(journal.url) as lock:
            lock.execute("SELECT 1 FROM events FOR UPDATE")
            publish(channel, events)
            lock_waits(journal, 2)
            _, *children = servers.family(worker.process.pid)
            os.kill(children[0], signal.SIGKILL)
            time.sleep(1)
        check_each_processed_once(channel, journal, worker)

    assert "Worker exited prematurely" in worker.text()


def test_two_workers_of_one_name_share_the_work(production, run):
    """Only Celery's monitors need different names."""
    journal = Journal(production)
    workers = [
        run(worker_with(log=f"{name}.log"), production)
        for name in ("one", "two")
    ]
    with channel_to(production) as channel:
        publish(channel, journal.insert(BURST))
        check_each_processed_once(channel, journal, *workers)

    assert all(" processed" in worker.text() for worker in workers)


SHORT = "from orders import tasks\ntasks.MAX_OUTAGE = 2.0\napp = tasks.app\n"
SHORT_TIMEOUT = 4  # seconds
IMPATIENT = f"""
from orders import broker, db
broker.BROKER_TIMEOUT = {SHORT_TIMEOUT}
db.WORKER_DEADLINE = {SHORT_TIMEOUT}.0
from orders.tasks import app
"""


def test_a_worker_without_its_database_gives_its_messages_back(
    production, stack, run
):
    """Before the broker loses patience; another worker can do them."""
    journal = Journal(production)
    with proxying(stack.postgres) as proxy, channel_to(production) as channel:
        proxy.cut = lambda connection, data: True
        make = worker_with("-n", "cut@%h", code=SHORT, log="cut.log")
        cut = run(make, through(proxy, production, stack.postgres))
        publish(channel, journal.insert(20))
        servers.wait_until(lambda: "is away" in cut.text(), 10)
        worker = run(servers.worker, production)
        journal.settle(cut, worker, timeout=40)
        cut.stop()
        worker.stop()
        left = ready_in(channel, QUEUE, DEAD_LETTERS)

    assert left == 0
    [line] = complaints(cut)
    assert "The database is away: " in line


def test_an_event_that_alone_is_refused_is_no_outage_for_ever(production, run):
    """Its statement is canceled, as in an outage, but the database is well."""
    journal = Journal(production)
    [(bad, _)] = journal.insert(1)
    journal.acknowledged.clear()
    poison(journal, bad, "USING ERRCODE = 'query_canceled'")
    with channel_to(production) as channel:
        worker = run(worker_with("-c", "2", code=SHORT), production)
        publish(channel, [(bad, None), *journal.insert(20)])
        servers.wait_until(lambda: ready_in(channel, DEAD_LETTERS) == 1, 10)
        servers.wait_until(
            lambda: worker.text().count(" processed\n") == 20, 10
        )
        purged(channel)

    assert re.search(f"ERROR .*{bad}.*poisoned", worker.text())


@pytest.mark.parametrize(
    ("end", "options"),
    [
        (signal.SIGTERM, ()),
        (signal.SIGTERM, ("-P", "solo")),
        (signal.SIGQUIT, ()),
        (signal.SIGQUIT, (PREFORK, "-c", "2")),
    ],
)
def test_a_worker_without_its_database_stops_soon(
    production, stack, run, end, options
):
    """The messages that it had are in the queue again."""
    journal = Journal(production)
    with proxying(stack.postgres) as proxy, channel_to(production) as channel:
        proxy.cut = lambda connection, data: True
        settings = through(proxy, production, stack.postgres)
        worker = run(worker_with(*options), settings)
        publish(channel, journal.insert(10))
        servers.wait_until(lambda: "is away" in worker.text(), 10)
        # Celery hangs at a SIGQUIT in the middle of a submit to its pool of
        # threads: its handler waits for the lock that the submit holds.
        servers.wait_until(lambda: ready_in(channel, QUEUE) == 0, 10)
        time.sleep(0.5)
        worker.process.send_signal(end)
        worker.process.wait(40)
        servers.wait_until(lambda: ready_in(channel, QUEUE) == 10, 5)
        purged(channel)

    assert "Traceback" not in worker.text()


@pytest.mark.parametrize("options", [(), (PREFORK, "-c", "2")])
def test_a_connection_to_the_database_that_is_silent_is_given_up(
    production, stack, run, options
):
    """In each process of a pool; another connection does the work."""
    journal = Journal(production)
    with proxying(stack.postgres) as proxy, channel_to(production) as channel:
        settings = through(proxy, production, stack.postgres)
        worker = run(worker_with(*options, code=IMPATIENT), settings)
        publish(channel, journal.insert(50))
        servers.wait_until(lambda: not journal.where("processed_at IS NULL"))
        proxy.swallow_present()
        publish(channel, journal.insert(50))
        check_each_processed_once(channel, journal, worker, timeout=40)

    assert "The database is away" in worker.text()


def test_a_worker_whose_connection_is_silent_makes_another(
    production, stack, run
):
    """It says so in one line."""
    journal = Journal(production)
    with proxying(stack.rabbitmq) as proxy, channel_to(production) as channel:
        settings = through(proxy, production, stack.rabbitmq)
        worker = run(worker_with("-E", code=IMPATIENT), settings)
        proxy.swallow_present()
        publish(channel, journal.insert(50))
        servers.wait_until(lambda: "broker lost" in worker.text(), 40)
        check_each_processed_once(channel, journal, worker, timeout=40)

    assert len(complaints(worker)) == 1


def test_a_worker_is_not_locked_out_by_the_one_before(production, stack, run):
    """Its machine lost its power, and the broker has not noticed yet."""
    journal = Journal(production)
    with proxying(stack.rabbitmq) as proxy, channel_to(production) as channel:
        settings = through(proxy, production, stack.rabbitmq)
        worker = run(worker_with(code=IMPATIENT), settings)
        proxy.hold()
        time.sleep(1.2 * SHORT_TIMEOUT)  # heartbeats are held back
        worker.kill()
        worker.start()
        publish(channel, journal.insert(50))
        # The broker gives some of them to the one before, too.
        journal.settle(worker, timeout=6 * SHORT_TIMEOUT)
        said = complaints(worker)

    # Celery sees that the name is taken, and no more.
    assert all("already using this process mailbox" in line for line in said)


@contextlib.contextmanager
def impatient(rabbitmq, seconds):
    """Let a broker end a consumer that is this long silent."""

    def set_limits(timeout, look):
        limits = f"[{{consumer_timeout,{timeout}}},"
        limits += f"{{channel_tick_interval,{look}}}]"
        expression = f"application:set_env([{{rabbit,{limits}}}])."
        servers.rabbitmqctl(rabbitmq, "eval", expression)

    set_limits(seconds * 1000, 1000)
    try:
        yield
    finally:
        set_limits(1_800_000, 60_000)  # milliseconds, its defaults


@pytest.mark.parametrize(
    "options", [(), (PREFORK, "-c", "2"), ("-P", "solo"), ("-c", "1", "-E")]
)
def test_a_worker_outlives_the_brokers_patience(
    private_rabbitmq, private_postgres, run, options
):
    """It loses its consumer while its database hangs, and goes on by itself.

    A PRECONDITION_FAILED is no lost connection to kombu.
    """
    rabbitmq, _ = private_rabbitmq
    postgres, settings = private_postgres
    url = servers.rabbitmq_url(rabbitmq)
    settings = replace(settings, rabbitmq_url=url)
    journal = Journal(settings)
    with impatient(rabbitmq, seconds=3), channel_to(settings) as channel:
        purged(channel)
        worker = run(worker_with(*options), settings)
        events = journal.insert(40)
        postgres.signal(signal.SIGSTOP)
        publish(channel, events)
        time.sleep(6)
        postgres.signal(signal.SIGCONT)
        publish(channel, journal.insert(40))
        check_each_processed_once(channel, journal, worker, timeout=60)

    assert "PRECONDITION_FAILED" in worker.text()
    assert "Traceback" not in worker.text()
    assert [line for line in complaints(worker) if "CRITICAL" in line] == []


# --- RabbitMQ as people have it ---------------------------------------------

USER = "orders_limited"
RIGHTS = "^orders.*"
REFUSAL = "ACCESS_REFUSED"


@pytest.fixture(scope="session")
def virtual_host(stack):
    """Return the name of a virtual host with an owner and a user."""
    name = "limited"
    everything = ".*", ".*", ".*"
    for command in (
        ("add_vhost", name),
        ("add_user", USER, "made-up"),
        ("set_permissions", "-p", name, "guest", *everything),
    ):
        servers.rabbitmqctl(stack.rabbitmq, *command)
    return name


@pytest.fixture
def limited(stack, production, virtual_host):
    """Return the settings of its owner and its user, and give rights."""
    owner = servers.rabbitmq_url(stack.rabbitmq) + virtual_host
    address = owner.partition("@")[2]
    user = f"amqp://{USER}:made-up@{address}"

    def give(*rights):
        place = "-p", virtual_host
        servers.rabbitmqctl(
            stack.rabbitmq, "set_permissions", *place, USER, *rights
        )

    owners = replace(production, rabbitmq_url=owner)
    with channel_to(owners) as channel:
        for queue in QUEUE_ARGUMENTS:
            channel.queue_delete(queue)  # an earlier test's
    return owners, replace(production, rabbitmq_url=user), give


def test_rights_for_names_of_orders_are_enough_to_work(limited, run):
    """The worker declares no name of Celery's, once the API has begun."""
    owner, user, give = limited
    give(RIGHTS, RIGHTS, RIGHTS)
    journal = Journal(owner)
    with channel_to(owner) as channel:
        purged(channel)
        worker = run(worker_with("-E"), user)
        publish(channel, journal.insert(BURST))
        check_each_processed_once(channel, journal, worker)

    assert complaints(worker) == []


def test_a_worker_that_may_not_answer_a_monitor_goes_on(
    limited, run, tmp_path
):
    """The answer goes to a name of Celery's own; the log says so."""
    owner, user, give = limited
    give(RIGHTS, RIGHTS, RIGHTS)
    journal = Journal(owner)
    with channel_to(owner) as channel:
        purged(channel)
        worker = run(worker_with(), user)
        with pytest.raises(AssertionError, match="No nodes replied"):
            celery(owner, tmp_path, "inspect", "ping")
        publish(channel, journal.insert(20))
        check_each_processed_once(channel, journal, worker)

    assert "ACCESS_REFUSED" in worker.text()
    assert "lost" not in worker.text()


def refused(folder, env):
    """Return a worker that is started when the broker has refused it."""
    server = servers.worker(folder, env)
    server.ready = lambda: REFUSAL in server.text()
    return server


def check_refused_a_line_a_try(worker, reason):
    """Check that the worker says why, seldom, and goes on trying."""
    time.sleep(4.5)
    assert worker.process.poll() is None
    said = complaints(worker)
    assert 1 <= len(said) <= 4  # two lines a try
    assert all(REFUSAL in line and reason in line for line in said)
    assert "Traceback" not in worker.text()


@pytest.mark.parametrize("missing", ["configure", "write", "read"])
def test_a_worker_without_a_right_says_which_until_it_has_it(
    limited, run, missing
):
    """It does not try again without a pause, and works at last."""
    owner, user, give = limited
    kinds = ("configure", "write", "read")
    give(*("^$" if kind == missing else RIGHTS for kind in kinds))
    journal = Journal(owner)
    with channel_to(owner) as channel:
        purged(channel)
        worker = run(refused, user)
        check_refused_a_line_a_try(worker, "orders")
        give(RIGHTS, RIGHTS, RIGHTS)
        publish(channel, journal.insert(20))
        check_each_processed_once(channel, journal, worker)


def test_a_worker_that_may_not_make_the_queues_waits_for_them(limited, run):
    """It would need to write to the nameless exchange, as the API does."""
    owner, user, give = limited
    give(RIGHTS, RIGHTS, RIGHTS)
    journal = Journal(owner)
    worker = run(refused, user)
    check_refused_a_line_a_try(worker, "amq.default")
    with channel_to(owner) as channel:
        publish(purged(channel), journal.insert(20))
        check_each_processed_once(channel, journal, worker)


def test_a_virtual_host_that_is_not_there_is_one_line_a_try(
    production, stack, run
):
    """It may be made later."""
    url = stack.rabbitmq_url.rstrip("/") + "/absent"

    def start(folder, env):
        server = servers.worker(folder, env)
        server.ready = lambda: "NOT_ALLOWED" in server.text()
        return server

    worker = run(start, replace(production, rabbitmq_url=url))
    time.sleep(4.5)

    assert worker.process.poll() is None
    [line] = complaints(worker)
    assert "absent" in line


@pytest.fixture
def secure(private_rabbitmq, tls_port, monkeypatch):
    """Return what makes settings for TLS, by a host name or another.

    The certificate has signed itself: it is trusted if the environment says
    so.
    """
    rabbitmq, plain = private_rabbitmq
    certificate = rabbitmq.folder / "certificate.pem"
    login = f"guest:{servers.BROKER_PASSWORD}"

    def make(host, *, trusted=True):
        trust = str(certificate) if trusted else "/dev/null"
        monkeypatch.setenv("SSL_CERT_FILE", trust)
        url = f"amqps://{login}@{host}:{tls_port}/%2F"
        return replace(plain, rabbitmq_url=url)

    return plain, make


def test_a_broker_with_a_good_certificate_is_used(secure, run):
    """By the worker and by the publisher, under load."""
    plain, make = secure
    settings, journal = make("localhost"), Journal(plain)
    with channel_to(plain) as channel:
        purged(channel)
        worker = run(servers.worker, settings)
        publisher = Publisher(settings.rabbitmq_url)
        publisher.deliver(
            [
                Message(event_id, TASK, timedelta(seconds=number % 2))
                for number, (event_id, _) in enumerate(journal.insert(BURST))
            ]
        )
        publisher.close()
        check_each_processed_once(channel, journal, worker)

    assert complaints(worker) == []


@pytest.mark.parametrize(
    ("host", "trusted", "reason"),
    [("127.0.0.1", True, "mismatch"), ("localhost", False, "self.signed")],
)
def test_a_broker_with_another_certificate_is_refused(
    secure, run, host, trusted, reason
):
    """It may be another's: neither side sends a password, both go on."""
    _, make = secure
    settings = make(host, trusted=trusted)

    def start(folder, env):
        server = servers.worker(folder, env)
        server.ready = lambda: "is away" in server.text()
        return server

    worker = run(start, settings)
    with pytest.raises(ConnectionError, match=reason):
        Publisher(settings.rabbitmq_url).count_ready()

    time.sleep(3)
    assert worker.process.poll() is None
    [line] = complaints(worker)
    assert re.search(f"RabbitMQ is away: .*{reason}", line)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("CELERY_BROKER_URL", ["worker"]),
        ("CELERY_BROKER_READ_URL", ["inspect", "ping"]),
        ("BROKER_URL", ["worker"]),
    ],
)
def test_a_broker_of_celerys_own_variables_is_refused(tmp_path, name, command):
    """It would win over RABBITMQ_URL, and the relay's messages would wait."""
    ended = run_to_its_end(
        tmp_path,
        [*CELERY, *command],
        RABBITMQ_URL="amqp://127.0.0.1/",
        **{name: "amqp://elsewhere.example/"},
    )

    assert ended.returncode == 3
    assert ended.stderr.startswith("orders cannot start: CELERY_BROKER")
    assert ended.stderr.count("\n") == 1
    assert name in ended.stderr


# --- The log, and strange messages to the monitor's queue -------------------


def test_each_line_of_a_json_log_is_an_object(production, run):
    """Warnings of Python, faults and malformed messages, too; no banner."""
    journal = Journal(production)
    [(bad, _), *good] = journal.insert(4)
    poison(journal, bad)
    worker = run(servers.worker, production, LOG_FORMAT="json")
    with channel_to(production) as channel:
        publish(channel, [(bad, None), *good])
        channel.basic_publish("", QUEUE, b"malformed")
        servers.wait_until(lambda: ready_in(channel, DEAD_LETTERS) == 2, 10)
        worker.stop()
        purged(channel)

    lines = [
        json.loads(line)
        for line in worker.text().splitlines()
        # Celery says to a person that it shuts down.
        if line and not line.startswith("worker: ")
    ]
    said = Counter(line["level"] for line in lines)
    assert said["ERROR"] == 2
    assert sum(" processed" in line["message"] for line in lines) == 3
    assert all(line["time"] and line["logger"] for line in lines)


PLAIN = {"content_type": "application/json"}
STRANGE_PROPERTIES = [
    PLAIN,
    {},
    PLAIN | {"headers": {"clock": "banana"}},
    PLAIN | {"headers": {"compression": "zlib"}},
    PLAIN | {"content_encoding": "klingon"},
    PLAIN | {"correlation_id": b"\xff"},
]
REPLY_TO = {"exchange": "amq.topic", "routing_key": "x"}  # not of its type
STRANGE_BODIES = [
    *(b"", b"{", b"7", b"[]", b"{}", b'{"method": []}', b"\xff"),
    json.dumps({"method": "ping", "reply_to": REPLY_TO}).encode(),
]


def test_strange_commands_of_a_monitor_end_no_worker(
    production, run, tmp_path
):
    """Whoever may publish there, the worker goes on and answers others."""
    worker, journal = run(servers.worker, production), Journal(production)
    with channel_to(production) as channel:
        for properties, body in itertools.product(
            STRANGE_PROPERTIES, STRANGE_BODIES
        ):
            channel.basic_publish(
                "orders.control.pidbox",
                "",
                body,
                pika.BasicProperties(**properties),
            )
        answer = celery(production, tmp_path, "inspect", "ping")
        publish(channel, journal.insert(20))
        check_each_processed_once(channel, journal, worker)

    assert "pong" in answer
    assert "lost" not in worker.text()
