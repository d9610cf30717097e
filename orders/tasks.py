"""The Celery worker: one task for each handler, run when a message arrives.

    uv run celery -A orders.tasks worker

The API publishes with pika, in Celery's protocol; the broker delays messages.
Celery runs the tasks, so that signals, `celery inspect` and Flower see them. A
message is acknowledged when its task has succeeded. A malformed message and
one whose task fails become dead letters; the outbox delivers the latter again.
"""

import logging
import os
import re
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from amqp.exceptions import AccessRefused, AMQPError
from amqp.serialization import PROPERTY_CLASSES, decode_properties_basic
from amqp.spec import Basic
from celery import Celery
from celery.bin import worker as command
from celery.exceptions import Reject
from celery.signals import celeryd_init, setup_logging, worker_process_init
from celery.worker import autoscale, state
from celery.worker.consumer import Consumer
from kombu import Exchange, Message, Queue

from orders import broker, db
from orders.handlers import HANDLERS, run_handler
from orders.logs import Outage, configure_logging
from orders.problems import database_answers, is_outage
from orders.settings import load_settings, refuse_to_start

THREADS = db.POOL_SIZE - 2  # each uses a connection while it works
# Messages that wait for a thread: few, as a slow task holds them up.
PREFETCH = 8  # for each thread
OUTAGE_PAUSE = 1.0  # seconds until a task tries its database again
# Much less than RabbitMQ's `consumer_timeout` (30 minutes, unless it is set),
# after which it ends a consumer that acknowledges nothing.
MAX_OUTAGE = 60.0  # seconds until a task gives its message back
MAX_RECONNECT_PAUSE = 4  # seconds; Celery itself would pause for half a minute
ALIVE_FILE = Path("/tmp/worker-alive")  # noqa: S108  (a health check reads it)
ALIVE_INTERVAL = 0.5  # seconds; so often the loop also sees whether to stop

logger = logging.getLogger(__name__)

settings = load_settings(secret=False)
if settings.rabbitmq_url is None:
    refuse_to_start("RABBITMQ_URL is not set: a worker needs a broker")
for name in ("", "_READ", "_WRITE"):
    if f"CELERY_BROKER{name}_URL" in os.environ:
        refuse_to_start(
            f"CELERY_BROKER{name}_URL would overrule RABBITMQ_URL: unset it,"
            " and BROKER_URL, and leave out `--broker`"
        )


class Worker:
    """The engine and the logs of outages, which the tasks share."""

    def __init__(self) -> None:
        """Make an engine; it connects when it is first used."""
        self.engine = db.create_sync_engine(
            settings.database_url, db.WORKER_DEADLINE
        )
        self.database_outage = Outage(__name__, "The database")
        self.broker_outage = Outage(__name__, "RabbitMQ")

    def process(self, kind: str, event_id: UUID) -> None:
        """Run the handler of an event; wait while the database is away.

        After MAX_OUTAGE, or when the worker is asked to stop, raise Reject,
        which gives the message back to the queue. But if the database answers
        after MAX_OUTAGE, the event itself is at fault: raise its error.
        """
        ends_at = time.monotonic() + MAX_OUTAGE
        while True:
            try:
                run_handler(self.engine, kind, event_id)
            except Exception as error:
                if not is_outage(error):
                    raise  # Celery logs the event's id, and the reason
                self.database_outage.report(error)
                is_late = time.monotonic() > ends_at
                if is_late and database_answers(self.engine):
                    raise
                # Each is None, or the exit status that Celery was asked for.
                asked = state.should_stop, state.should_terminate
                if is_late or asked != (None, None):
                    raise Reject(str(error), requeue=True) from error
                time.sleep(OUTAGE_PAUSE)
            else:
                self.database_outage.end()
                return


worker = Worker()


@worker_process_init.connect
def begin_process(**_: object) -> None:
    """Give each process of `--pool prefork` connections of its own."""
    worker.engine = db.create_sync_engine(
        settings.database_url, db.WORKER_DEADLINE
    )


# --- The app and its tasks --------------------------------------------------

app = Celery("orders", broker=settings.rabbitmq_url)
queue, dead_letters = (
    Queue(
        name, Exchange(""), name, queue_arguments=broker.QUEUE_ARGUMENTS[name]
    )
    for name in (broker.QUEUE, broker.DEAD_LETTERS)
)
app.conf.update(
    accept_content=["json"],
    broker_channel_error_retry=True,  # such as after a `consumer_timeout`
    broker_connection_retry_on_startup=True,
    broker_heartbeat=broker.BROKER_TIMEOUT,
    # The names begin with `orders`, for a user whose rights end there.
    control_exchange="orders.control",
    event_exchange="orders.events",
    event_queue_prefix="orders.events",
    task_default_exchange="",
    # An exclusive queue would be refused to a worker that connects again,
    # until the broker notices that the first connection is lost. RabbitMQ 4.3
    # refuses a queue that is neither exclusive nor durable.
    control_queue_durable=True,
    control_queue_exclusive=False,
    task_acks_late=True,
    task_acks_on_failure_or_timeout=False,
    task_ignore_result=True,
    task_queues=[queue],
    task_reject_on_worker_lost=True,
    worker_autoscaler=f"{__name__}:Autoscaler",
    worker_concurrency=THREADS,
    worker_consumer=f"{__name__}:CheckingConsumer",
    worker_prefetch_multiplier=PREFETCH,
    worker_soft_shutdown_timeout=5.0,  # seconds, after SIGQUIT
)
if settings.rabbitmq_url.startswith("amqps"):
    # Without a host name, any valid certificate would do.
    app.conf.broker_use_ssl = {
        "cert_reqs": ssl.CERT_REQUIRED,
        "server_hostname": urlsplit(settings.rabbitmq_url).hostname,
    }


def add_task(kind: str, name: str) -> None:
    """Make the Celery task of a kind of event."""

    @app.task(name=name)
    def handle(event_id: str) -> None:
        """Handle one event."""
        worker.process(kind, UUID(event_id))


for kind, handler in HANDLERS.items():
    add_task(kind, handler.task)

# --- The consumer -----------------------------------------------------------


class CheckingConsumer(Consumer):
    """Celery's consumer, which dead-letters malformed messages.

    A stock worker dies of some of them: a task that is a list, a message
    without an id (celery#7975, #4308, #5204).
    """

    task_consumer: Any  # the stubs of the type checker lack it

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Leave out what workers tell each other: these share nothing."""
        options |= {"without_gossip": True, "without_mingle": True}
        super().__init__(*arguments, **options)

    def ensure_connected(self, connection: Any) -> Any:
        """Connect soon after the broker's return."""
        connection.ensure_connection(
            errback=lambda error, _: worker.broker_outage.report(error),
            interval_max=MAX_RECONNECT_PAUSE,
            callback=touch_or_stop,
        )
        dead_letters.bind(connection.default_channel).declare()
        worker.broker_outage.end()
        return connection

    def on_connection_error_before_connected(self, error: Exception) -> None:
        """Say that the broker refuses a login, or a right; try again."""
        worker.broker_outage.report(error)
        pause()

    def on_connection_error_after_connected(self, error: Exception) -> None:
        """Connect again, but not at once if the broker refuses a right."""
        super().on_connection_error_after_connected(error)
        if isinstance(error, AccessRefused):
            pause()

    def register_with_event_loop(self, hub: Any) -> None:
        """Touch the file of the health check while the loop turns."""
        super().register_with_event_loop(hub)
        hub.call_repeatedly(ALIVE_INTERVAL, ALIVE_FILE.touch)

    def cancel_active_requests(self) -> None:
        """End what runs, at SIGQUIT; threads have to end by themselves."""
        with suppress(NotImplementedError):
            super().cancel_active_requests()

    def create_task_handler(
        self, *arguments: Any, **options: Any
    ) -> Callable[[Message], None]:
        """Return what takes each message: check it, then hand it on."""
        handle = super().create_task_handler(*arguments, **options)
        self.task_consumer.on_decode_error = reject_malformed

        def receive(message: Message) -> None:
            """Hand a message on to Celery, unless it is malformed."""
            try:
                check_message(message)
            except Exception as error:  # each part raises errors of its own
                reject_malformed(message, error)
            else:
                handle(message)

        return receive


def check_message(message: Message) -> None:
    """Raise unless the publisher would write such a message."""
    # Headers with an x are the broker's own.
    headers = {
        name: value
        for name, value in message.headers.items()
        if not name.startswith("x-")
    }
    task, trace = headers["task"], headers.get("traceparent")
    event_id = UUID(headers["id"])
    sent = broker.Message(event_id, task, timedelta(0), trace)
    expected = broker.celery_content(sent)
    tasks = {handler.task for handler in HANDLERS.values()}
    is_ours = task in tasks and message.content_encoding == broker.ENCODING
    if not is_ours or (headers, message.payload) != expected:
        raise ValueError("the publisher writes no such message")


def reject_malformed(message: Message, error: Exception) -> None:
    """Let the broker keep a malformed message as a dead letter."""
    logger.error("Rejected a malformed message: %r", error)
    message.reject_log_error(logger, (OSError, AMQPError))


def touch_or_stop() -> None:
    """Touch the file of the health check, or end if asked to stop."""
    ALIVE_FILE.touch()
    state.maybe_shutdown()


def pause() -> None:
    """Wait before the next try to connect."""
    for _ in range(MAX_RECONNECT_PAUSE):
        touch_or_stop()
        time.sleep(1)


touch_or_stop()  # before anything that may wait

# --- The worker's log -------------------------------------------------------


@celeryd_init.connect
def prepare(instance: Any, **_: object) -> None:
    """Name the node, and keep the banner for people."""
    instance.hostname = instance.hostname.replace("celery@", "orders@", 1)
    instance.quiet = settings.log_format == "json"
    set_up_logging()


@setup_logging.connect
def set_up_logging(**_: object) -> None:
    """Log as the API does; Python's warnings, too."""
    configure_logging(settings.log_format)
    logging.captureWarnings(capture=True)
    # Otherwise each order, and each message that is given back, is a line.
    for name in ("celery.app.trace", "celery.worker.strategy"):
        logging.getLogger(name).setLevel("ERROR")
    for name in ("celery.worker.loops", "celery.worker.request"):
        logging.getLogger(name).addFilter(is_news)
    logging.getLogger("py.warnings").addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
    """Return whether a line about a lost connection is of any use.

    Celery says that it can neither acknowledge by the connection nor clean it
    up, and advertises a setting. The messages come again.
    """
    noise = "Couldn't (ack|reject)|Error cleaning|CPendingDeprecationWarning"
    return re.search(noise, record.getMessage()) is None


# --- Patches of libraries ---------------------------------------------------


class Autoscaler(autoscale.Autoscaler):
    """Leaves a pool alone that cannot grow, as one of threads (celery#5333).

    Test: burst[autoscale].
    """

    def maybe_scale(self, request: Any = None) -> None:
        """Change the size of the pool, if need be."""
        if hasattr(self.pool, "grow"):
            super().maybe_scale(request)


# Celery: its own delayed delivery declares 28 queues, which nobody needs here.
# Test: rights_for_names_of_orders.
Consumer.Blueprint.default_steps.remove(
    "celery.worker.consumer.delayed_delivery:DelayedDelivery"
)
# Celery: the setting `worker_pool` would overrule the option `--pool prefork`
# (celery#6711), so change the default of the option. Test: burst[prefork].
for option in command.worker.params:
    if option.name == "pool":
        option.default = "threads"


def read_properties(buffer: bytes, offset: int) -> tuple[Any, int]:
    """Return a message's properties, or none if they cannot be read."""
    try:
        return decode_properties_basic(buffer, offset)
    except Exception:  # bytes that are not UTF-8, a time out of range, ...
        return {}, offset


# py-amqp: an unreadable property ends the worker (celery#5204). A message
# without properties is rejected later. Test: hostile_messages.
parsers: dict[int, Any] = PROPERTY_CLASSES
parsers[Basic.CLASS_ID] = read_properties
