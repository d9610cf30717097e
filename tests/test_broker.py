"""The publisher and RabbitMQ: what is delivered, and each way to fail.

RabbitMQ is a real one. A test that would wait for ten seconds shortens the
time limits first.
"""

import contextlib
import json
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from urllib.parse import quote
from uuid import UUID, uuid4

import pika
import pytest
import servers
from conftest import channel_at, purged
from faults import proxying

from orders import broker
from orders.broker import (
    DELAY_QUEUE,
    QUEUE,
    QUEUE_ARGUMENTS,
    Message,
    Publisher,
)

TASK = "orders.some_task"
DUE = timedelta(0)
LATER = timedelta(minutes=10)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CONFIRM = bytes.fromhex("003c0050")  # AMQP 0-9-1: class basic, ack
SLACK = 0.8  # seconds that a deadline may come late on a busy machine


def message(delay=DUE, **members):
    """Return a message of a new event."""
    return Message(uuid4(), TASK, delay, **members)


@pytest.fixture
def url(stack):
    """Return where RabbitMQ is, its queues empty."""
    with channel_at(stack.rabbitmq_url) as channel:
        purged(channel)
    return stack.rabbitmq_url


@pytest.fixture
def frail(frail_rabbitmq):
    """Return a RabbitMQ that may be harmed, its queues empty and ours."""
    with channel_at(servers.rabbitmq_url(frail_rabbitmq)) as channel:
        for queue in QUEUE_ARGUMENTS:
            channel.queue_delete(queue)
        purged(channel)
    return frail_rabbitmq


@pytest.fixture
def publishing():
    """Return what makes publishers, which are closed when the test ends."""
    with contextlib.ExitStack() as closing:

        def start(url):
            publisher = Publisher(url)
            closing.callback(publisher.close)
            return publisher

        yield start


@pytest.fixture
def impatient(monkeypatch):
    """Shorten the time limits of the publishers, and return the longest."""
    monkeypatch.setattr(broker, "BROKER_TIMEOUT", 1)
    return broker.BROKER_TIMEOUT


def waiting_in(channel, queue):
    """Return how many messages wait in a queue."""
    return channel.queue_declare(queue, passive=True).method.message_count


def taken_from(channel, queue):
    """Take the messages of a queue; return their properties and bodies."""
    taken = []
    while (got := channel.basic_get(queue, auto_ack=True))[0]:
        taken.append(got[1:])
    return taken


def ids_in(url, queue):
    """Take the messages of a queue; return the ids of their events."""
    with channel_at(url) as channel:
        return [
            UUID(json.loads(body)[0][0])
            for _, body in taken_from(channel, queue)
        ]


def ids_of(messages):
    """Return the ids of the events of messages."""
    return [message.event_id for message in messages]


def at_port(url, port):
    """Return the URL with another port."""
    return re.sub(r":\d+/", f":{port}/", url)


def open_files():
    """Return how many file descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.contextmanager
def at_once(seconds):
    """Check that the block, which may fail, takes no longer than that."""
    began = time.monotonic()
    try:
        yield
    finally:
        assert time.monotonic() - began < seconds + SLACK


@contextlib.contextmanager
def virtual_host(server, name):
    """Yield the URL of a virtual host that exists for the block's time."""
    tell = partial(servers.rabbitmqctl, server)
    tell("add_vhost", name)
    try:
        tell("set_permissions", "--vhost", name, "guest", ".*", ".*", ".*")
        yield f"{servers.rabbitmq_url(server)}{name}"
    finally:
        tell("delete_vhost", name)


@contextlib.contextmanager
def hung(server):
    """Let a server hang for the time of the block."""
    server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.signal(signal.SIGCONT)


def deliver_one(publisher):
    """Deliver a message that is due."""
    publisher.deliver([message()])


def recovers(call, *arguments):
    """Repeat a call until it works: after a fault it may need a moment."""

    def works():
        with contextlib.suppress(ConnectionError):
            call(*arguments)
            return True
        return False

    servers.wait_until(works)


# --- What is delivered ------------------------------------------------------


@pytest.mark.parametrize("trace", [None, TRACE])
@pytest.mark.parametrize(
    ("delay", "queue", "expiration"),
    [
        (timedelta(days=-1), QUEUE, None),
        (DUE, QUEUE, None),
        (LATER, DELAY_QUEUE, "600000"),
        (timedelta(seconds=2, microseconds=1), DELAY_QUEUE, "2001"),
    ],
)
def test_a_message_is_as_celery_s_protocol_says(
    url, publishing, delay, queue, expiration, trace
):
    """It carries nothing but the event's id, and waits while it must."""
    sent = message(delay, traceparent=trace)

    publishing(url).deliver([sent])

    with channel_at(url) as channel:
        [(properties, body)] = taken_from(channel, queue)
    del properties.headers["x-delivery-count"]  # RabbitMQ's own
    event_id = str(sent.event_id)
    headers = {"lang": "py", "task": TASK, "id": event_id}
    assert properties == pika.BasicProperties(
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=2,
        message_id=event_id,
        correlation_id=event_id,
        headers=headers | ({"traceparent": trace} if trace else {}),
        expiration=expiration,
    )
    assert json.loads(body) == [
        [event_id],
        {},
        {"callbacks": None, "errbacks": None, "chain": None, "chord": None},
    ]


STOCK_APP = """
import json
import os

from celery import Celery
from kombu import Exchange, Queue

arguments = json.loads(os.environ["ARGUMENTS"])
app = Celery(broker=os.environ["BROKER"])
app.conf.task_queues = [
    Queue("orders", Exchange(""), "orders", queue_arguments=arguments)
]


@app.task(name="orders.some_task", bind=True)
def handle(self, *args, **kwargs):
    trace = (self.request.headers or {}).get("traceparent")
    print(f"handled {self.request.id} {args} {kwargs} {trace}")
"""


def test_a_stock_celery_worker_runs_the_task(frail, publishing, tmp_path):
    """It needs no code of ours, and finds the event's id as the argument."""
    (tmp_path / "stock.py").write_text(STOCK_APP)
    sent = [message(), message(timedelta(seconds=0.5), traceparent=TRACE)]
    with virtual_host(frail, "stock") as url:  # Celery makes 28 more queues
        worker = servers.Server(
            [servers.PYTHON / "celery", "-A", "stock", "worker", "-P", "solo"],
            port=0,
            folder=tmp_path,
            env={
                "BROKER": url,
                "ARGUMENTS": json.dumps(QUEUE_ARGUMENTS[QUEUE]),
            },
            ready=lambda: worker.text().count("handled") == len(sent),
        )
        publishing(url).deliver(sent)
        with servers.running(worker):
            handled = re.findall("handled (.*)", worker.text())

    assert handled == [
        f"{each.event_id} ('{each.event_id}',) {{}} {each.traceparent}"
        for each in sent
    ]


def test_a_message_waits_until_it_is_due(url, publishing):
    """Then it moves to the queue of the workers, by itself."""
    publisher = publishing(url)
    due, short = message(), message(timedelta(seconds=1.5))
    instant = message(timedelta(microseconds=1))

    began = time.monotonic()
    publisher.deliver([short, due])
    ready = publisher.count_ready()
    servers.wait_until(lambda: publisher.count_ready() == 2, 5)
    waited = time.monotonic() - began
    publisher.deliver([instant])
    servers.wait_until(lambda: publisher.count_ready() == 3, 5)

    assert ready == 1
    assert 1.4 < waited < 3
    assert ids_in(url, QUEUE) == ids_of([due, short, instant])


def test_only_what_no_worker_has_taken_is_ready(url, publishing):
    """Neither what a worker holds, nor what waits to be due."""
    publisher = publishing(url)
    publisher.deliver([message(), message(), message(), message(LATER)])

    with channel_at(url) as channel:
        channel.basic_get(QUEUE)
        counted = publisher.count_ready()

    assert counted == 2


def test_batches_are_confirmed_one_after_the_other(url, publishing):
    """Each returns only when RabbitMQ has it; an empty one waits for none."""
    publisher = publishing(url)
    batches = [
        [message(DUE if number % 2 else LATER) for number in range(size)]
        for size in (1, 0, 500, 2, 500)
    ]
    counted = []
    with channel_at(url) as channel:
        for batch in batches:
            publisher.deliver(batch)
            queues = QUEUE, DELAY_QUEUE
            counted.append(sum(waiting_in(channel, name) for name in queues))

    assert counted == [1, 1, 501, 503, 1003]
    assert sorted(ids_in(url, QUEUE) + ids_in(url, DELAY_QUEUE)) == sorted(
        ids_of(each for batch in batches for each in batch)
    )


@pytest.mark.parametrize("path", ["/", "/%2F", ""])
def test_the_url_may_name_the_virtual_host_or_not(stack, publishing, path):
    """The settings write it out; what is left out is RabbitMQ's own."""
    publisher = publishing(stack.rabbitmq_url.rstrip("/") + path)

    assert publisher.count_ready() >= 0


# --- What RabbitMQ refuses --------------------------------------------------


def fill(publisher, delay):
    """Publish until RabbitMQ refuses, some time after the queue is full."""
    for _ in range(20):
        publisher.deliver([message(delay) for _ in range(10)])
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("queue", "delay"), [(QUEUE, DUE), (DELAY_QUEUE, LATER)]
)
def test_a_full_queue_is_an_error_until_it_takes_messages(
    frail, publishing, queue, delay
):
    """The refusal of one message is that of the batch."""
    publisher = publishing(servers.rabbitmq_url(frail))
    policy = '{"max-length":5,"overflow":"reject-publish"}'
    apply = f"^{queue}$", policy, "--apply-to", "queues"
    servers.rabbitmqctl(frail, "set_policy", "full", *apply)
    try:
        with pytest.raises(ConnectionError, match="refused a message"):
            fill(publisher, delay)
    finally:
        servers.rabbitmqctl(frail, "clear_policy", "full")

    publisher.deliver([message(delay)])


@pytest.mark.parametrize(
    ("queue", "delay"), [(QUEUE, DUE), (DELAY_QUEUE, LATER)]
)
def test_a_message_for_a_missing_queue_is_returned(
    frail, publishing, queue, delay
):
    """That is an error; the next connect makes the queue again."""
    url = servers.rabbitmq_url(frail)
    publisher = publishing(url)
    publisher.deliver([message(delay)])
    with channel_at(url) as channel:
        channel.queue_delete(queue)
    again = message(delay)

    reason = f"^{queue} is missing: NO_ROUTE"
    with pytest.raises(ConnectionError, match=reason):
        publisher.deliver([message(LATER), message(delay), message()])
    publisher.deliver([again])

    assert ids_in(url, queue)[-1] == again.event_id


@pytest.mark.parametrize("queue", [QUEUE, DELAY_QUEUE])
def test_counting_notices_a_missing_queue(frail, publishing, queue):
    """And makes it the next time."""
    url = servers.rabbitmq_url(frail)
    publisher = publishing(url)
    publisher.count_ready()
    with channel_at(url) as channel:
        channel.queue_delete(queue)

    with pytest.raises(ConnectionError, match=f"NOT_FOUND.*'{queue}'"):
        publisher.count_ready()

    assert publisher.count_ready() == 0


@pytest.mark.parametrize("queue", QUEUE_ARGUMENTS)
def test_a_queue_with_other_arguments_is_named(frail, publishing, queue):
    """The reason is RabbitMQ's own, which the README explains."""
    url = servers.rabbitmq_url(frail)
    with channel_at(url) as channel:
        channel.queue_delete(queue)
        channel.queue_declare(queue, durable=True)
    publisher = publishing(url)

    reason = f"PRECONDITION_FAILED - inequivalent arg.*'{queue}'"
    for _ in range(2):
        with pytest.raises(ConnectionError, match=reason):
            publisher.count_ready()
    with channel_at(url) as channel:
        channel.queue_delete(queue)

    assert publisher.count_ready() == 0


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        (servers.BROKER_PASSWORD, "a-wrong-secret", "ACCESS_REFUSED"),
        ("guest:", "nobody:", "ACCESS_REFUSED"),
        ("/$", "/another", "vhost another not found"),
        ("127.0.0.1", "a-host.invalid", "gaierror"),
        (r":\d+/", ":1/", "Connection refused"),
    ],
)
def test_a_wrong_url_is_explained_without_its_password(
    stack, publishing, right, wrong, reason
):
    """Neither a right password nor a wrong one is ever said."""
    publisher = publishing(re.sub(right, wrong, stack.rabbitmq_url))

    with pytest.raises(ConnectionError, match=reason) as raised:
        publisher.count_ready()

    said = f"{raised.value} {raised.value!r}"
    assert servers.BROKER_PASSWORD not in said
    assert "a-wrong-secret" not in said


# --- What never comes -------------------------------------------------------


def test_a_confirm_that_is_swallowed_is_waited_for_only_so_long(
    url, stack, publishing, impatient
):
    """The next connection works, as only this one is broken."""
    with proxying(stack.rabbitmq) as proxy:
        publisher = publishing(at_port(url, proxy.port))
        publisher.deliver([message()])
        proxy.swallow = lambda _, data: CONFIRM in data
        reason = "^RabbitMQ did not confirm a batch of 3 within 1 s$"
        with pytest.raises(ConnectionError, match=reason), at_once(impatient):
            publisher.deliver([message(), message(), message()])
        proxy.swallow = lambda _, data: False

        recovers(publisher.count_ready)
        publisher.deliver([message()])


# A queue that has lost the majority of its members answers like this one.
SUSPEND, RESUME = (
    f"sys:{action}(whereis('%2F_{QUEUE}'))."
    for action in ("suspend", "resume")
)


def test_a_queue_that_does_not_confirm_is_waited_for_only_so_long(
    frail, publishing, monkeypatch
):
    """RabbitMQ itself is well, and answers the heartbeats."""
    publisher = publishing(servers.rabbitmq_url(frail))
    publisher.deliver([message(), message(LATER)])
    servers.rabbitmqctl(frail, "eval", SUSPEND)
    # Not before: it would be the heartbeat, too, and the command takes long.
    monkeypatch.setattr(broker, "BROKER_TIMEOUT", 1)
    try:
        publisher.deliver([message(LATER)])
        reason = "did not confirm a batch of 2"
        with pytest.raises(ConnectionError, match=reason), at_once(1):
            publisher.deliver([message(LATER), message()])
    finally:
        servers.rabbitmqctl(frail, "eval", RESUME)

    recovers(deliver_one, publisher)


@pytest.mark.parametrize(
    ("connected", "call", "asked"),
    [
        (False, Publisher.count_ready, "open a connection"),
        (True, Publisher.count_ready, "declare the queue orders.delay"),
        (True, deliver_one, "confirm a batch of 1"),
    ],
)
def test_a_hung_broker_is_waited_for_only_so_long(
    frail, publishing, impatient, connected, call, asked
):
    """Whatever it was asked; and it is used again when it goes on."""
    publisher = publishing(servers.rabbitmq_url(frail))
    if connected:
        publisher.count_ready()
    with (
        hung(frail),
        pytest.raises(ConnectionError, match=f"did not {asked} within"),
        at_once(impatient),
    ):
        call(publisher)

    recovers(call, publisher)


def test_the_end_does_not_wait_for_a_hung_broker(frail, publishing):
    """Nor for its heartbeat."""
    publisher = publishing(servers.rabbitmq_url(frail))
    publisher.count_ready()

    with hung(frail), at_once(broker.CLOSE_TIMEOUT):
        publisher.close()


def test_a_broker_that_is_short_of_memory_is_named(
    frail, publishing, impatient
):
    """It blocks the connections that publish, and takes messages later."""
    publisher = publishing(servers.rabbitmq_url(frail))
    publisher.deliver([message()])
    memory = partial(
        servers.rabbitmqctl, frail, "set_vm_memory_high_watermark"
    )
    memory("0")
    try:
        for _ in range(2):
            recovers(publisher.count_ready)  # as it publishes nothing
            with (
                pytest.raises(ConnectionError, match="BlockedTimeout"),
                at_once(impatient),
            ):
                publisher.deliver([message()])
    finally:
        memory("0.4")

    recovers(deliver_one, publisher)


MANY = 20_000  # messages; more than the buffers of two sockets hold


def test_a_batch_waits_while_the_network_is_slow(url, stack, publishing):
    """Each of its messages arrives once."""
    batch = [message(traceparent=TRACE) for _ in range(MANY)]
    with proxying(stack.rabbitmq) as proxy:
        publisher = publishing(at_port(url, proxy.port))
        publisher.count_ready()
        proxy.hold()
        release = threading.Timer(1.5, proxy.release)
        release.start()
        began = time.monotonic()
        publisher.deliver(batch)
        release.join()

    assert time.monotonic() - began > 1.5
    with channel_at(url) as channel:
        assert waiting_in(channel, QUEUE) == MANY


def test_a_batch_is_given_up_while_the_network_is_full(
    frail, publishing, impatient
):
    """What a hung broker does not read is no reason to wait for it."""
    url = servers.rabbitmq_url(frail)
    publisher = publishing(url)
    publisher.count_ready()
    batch = [message(traceparent=TRACE) for _ in range(MANY)]
    with hung(frail), pytest.raises(ConnectionError, match=f"batch of {MANY}"):
        publisher.deliver(batch)
    few = batch[:500]

    recovers(publisher.deliver, few)

    with channel_at(url) as channel:
        assert waiting_in(channel, QUEUE) >= len(few)


# --- What is cut ------------------------------------------------------------


def test_a_connection_that_is_cut_anywhere_is_made_anew(
    url, stack, publishing
):
    """At each piece of data that a connect and a batch exchange."""
    with proxying(stack.rabbitmq) as proxy:
        proxied = at_port(url, proxy.port)
        failed = 0
        for last in range(100):
            publisher = publishing(proxied)
            proxy.cut = lambda c, data, last=last: c.pieces > last
            try:
                publisher.deliver([message()])
            except ConnectionError:
                failed += 1
            else:
                break
            proxy.cut = lambda connection, data: False
            publisher.deliver([message()])
            publisher.close()

    assert 10 < failed == last


def test_a_connection_that_is_cut_before_the_confirm_is_an_error(
    url, stack, publishing
):
    """RabbitMQ has the message, and cannot say so: it is delivered again."""
    sent = message()
    with proxying(stack.rabbitmq) as proxy:
        publisher = publishing(at_port(url, proxy.port))
        publisher.count_ready()
        proxy.cut = lambda _, data: CONFIRM in data
        with pytest.raises(ConnectionError, match=r"EOF|reset"):
            publisher.deliver([sent])
        proxy.cut = lambda connection, data: False
        publisher.deliver([sent])

    assert ids_in(url, QUEUE) == [sent.event_id] * 2


def test_a_connection_that_ends_between_two_calls_is_noticed(
    url, stack, publishing
):
    """By the next call, which fails; the one after connects."""
    with proxying(stack.rabbitmq) as proxy:
        publisher = publishing(at_port(url, proxy.port))
        publisher.count_ready()
        proxy.end_present()
        with pytest.raises(ConnectionError):
            publisher.count_ready()
        publisher.deliver([message()])

        assert publisher.count_ready() == 1


def test_heartbeats_are_answered_by_counting(frail, publishing, monkeypatch):
    """RabbitMQ would end the connection after two that it misses."""
    monkeypatch.setattr(broker, "BROKER_TIMEOUT", 2)  # the heartbeat, too
    url = servers.rabbitmq_url(frail)
    asking, silent = publishing(url), publishing(url)
    silent.count_ready()

    end = time.monotonic() + 7
    while time.monotonic() < end:
        asking.count_ready()
        time.sleep(0.25)

    with pytest.raises(ConnectionError):
        silent.count_ready()


# --- What is left behind ----------------------------------------------------


@contextlib.contextmanager
def deaf():
    """Yield the port of a listener that neither accepts nor refuses."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=0) as listener,
        socket.create_connection(listener.getsockname()),
    ):
        yield listener.getsockname()[1]


@contextlib.contextmanager
def mute():
    """Yield the port of a listener that accepts, and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_no_connect_leaves_a_file_open(url, stack, publishing, impatient):
    """However it ends, and with no help of the garbage collector."""
    missing = re.sub("/$", "/another", url)
    with mute() as silent, deaf() as unreachable:
        urls = [
            *[url, missing] * 20,
            *(at_port(url, port) for port in (1, silent, unreachable)),
        ]
        publishing(url).count_ready()  # what is opened once for all
        before = open_files()
        ends = []
        for each in urls:
            publisher = publishing(each)
            try:
                publisher.count_ready()
                ends.append("connected")
            except ConnectionError as error:
                ends.append(str(error))
            publisher.close()
            assert open_files() == before, ends[-1]

    assert ends.count("connected") == 20
    assert len(set(ends)) == 5


def test_no_failure_leaves_a_file_open(frail, publishing, impatient):
    """Not a channel that RabbitMQ closed, nor a hang, nor a fault of ours."""
    url = servers.rabbitmq_url(frail)
    with channel_at(url) as channel:
        publisher = publishing(url)
        before = open_files()
        publisher.count_ready()
        channel.queue_delete(QUEUE)
        with pytest.raises(ConnectionError):
            publisher.count_ready()
        assert open_files() == before
        publisher.count_ready()
        with hung(frail), pytest.raises(ConnectionError):
            publisher.deliver([message()] * 500)
        assert open_files() == before
        recovers(publisher.count_ready)
        with pytest.raises(TypeError):
            publisher.deliver([message(), message(None)])
        assert open_files() == before


def test_a_process_that_is_out_of_files_goes_on_publishing(url, publishing):
    """Its clients have used them up, and some of them still send orders."""
    publisher = publishing(url)
    publisher.count_ready()
    with contextlib.ExitStack() as files:
        with contextlib.suppress(OSError):
            while True:
                files.enter_context(Path("/dev/null").open())
        publisher.deliver([message()])
        counted = publisher.count_ready()

    assert counted == 1


def test_the_end_is_polite(frail, publishing):
    """RabbitMQ warns of the clients that leave without a word."""
    # Those of other tests end about now, too.
    name = str(uuid4())
    properties = quote(str({"connection_name": name}))
    url = f"{servers.rabbitmq_url(frail)}?client_properties={properties}"
    end = rf"\[(\w+)\] \S+ closing AMQP connection .* - {name}"

    def ends():
        """Return how serious the broker found each end."""
        logs = Path(frail.env["RABBITMQ_LOG_BASE"]).glob("*.log")
        return re.findall(end, "".join(log.read_text() for log in logs))

    publisher = publishing(url)
    publisher.deliver([message()])
    publisher.close()
    publisher.close()  # a second time is nothing to do
    servers.wait_until(ends, 10)

    assert ends() == ["info"]


# --- Names and certificates -------------------------------------------------


def test_a_second_address_is_tried_when_the_first_is_dead(
    url, publishing, impatient, monkeypatch
):
    """As the name of a cluster has several, and one of them may be down."""
    with deaf() as dead:
        name = re.sub("@127.0.0.1", "@cluster.example", url)
        real = socket.getaddrinfo

        def resolve(host, port, **options):
            assert host == "cluster.example"
            ports = dead, port
            return [
                each
                for port in ports
                for each in real("127.0.0.1", port, **options)
            ]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        publisher = publishing(name)

        assert publisher.count_ready() == 0


SELF_SIGNED = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"]


@pytest.mark.parametrize(
    ("name", "trusted"), [("127.0.0.1", True), ("127.0.0.2", False)]
)
def test_a_certificate_must_be_the_host_s(
    tmp_path, publishing, impatient, monkeypatch, name, trusted
):
    """Otherwise nothing is said to it, the password least of all."""
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    names = "-subj", "/CN=broker", "-addext", f"subjectAltName=IP:{name}"
    files = "-keyout", key, "-out", certificate
    subprocess.run(
        [*SELF_SIGNED, *names, *files], check=True, capture_output=True
    )
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    heard = []

    def listen(listener):
        with contextlib.suppress(OSError):
            plain, _ = listener.accept()
            with context.wrap_socket(plain, server_side=True) as client:
                heard.append(client.recv(4))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=listen, args=[listener])
        server.start()
        port = listener.getsockname()[1]
        publisher = publishing(f"amqps://guest:secret@127.0.0.1:{port}/")
        with pytest.raises(ConnectionError) as raised:
            publisher.count_ready()
        server.join()

    assert heard == [b"AMQP"] * trusted
    assert ("certificate" in str(raised.value)) is not trusted
    assert "secret" not in str(raised.value)
