"""The Celery worker: processes each order when its message arrives.

The API publishes with pika, in Celery's own protocol, so a stock worker reads
it; the broker delays the message. The settings here lose nothing when the
worker, the broker or the database is killed, and a malformed message ends in
the dead-letter queue.
"""

import logging
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from amqp.exceptions import AccessRefused, AMQPError
from amqp.serialization import PROPERTY_CLASSES, decode_properties_basic
from amqp.spec import Basic
from celery import Celery, bootsteps
from celery.exceptions import Reject
from celery.signals import celeryd_init, setup_logging
from celery.worker import state
from celery.worker.consumer import Consumer
from kombu import Exchange, Message, Queue

from orders import broker, db, logs
from orders.service import process_order
from orders.settings import load_settings, refuse_to_start

THREADS = 8
PREFETCH = 16  # messages a thread; few, as the relay counts what is queued
RETRY_PAUSE = 1.0  # seconds between two tries while the database is away
RECONNECT = {"interval_start": 1, "interval_step": 1, "interval_max": 4}
ALIVE = Path("/tmp/worker-alive")  # noqa: S108  touched till it hangs
ALIVE_INTERVAL = 5.0  # seconds

logger = logging.getLogger(__name__)

settings = load_settings(secret=False)
if settings.rabbitmq_url is None:
    mend = "without a broker the API processes the orders itself"
    refuse_to_start(f"RABBITMQ_URL is not set: a worker needs it; {mend}")
engine = db.create_sync_engine(settings.database_url, db.WORKER_DEADLINE)
engine = engine.execution_options(**db.AUTOCOMMIT)
outage = logs.Outage(logger, "The database")


def queue_of(name: str) -> Queue:
    """Return a queue as the publisher declares it."""
    arguments = broker.QUEUE_ARGUMENTS[name]
    return Queue(name, Exchange(""), name, queue_arguments=arguments)


app = Celery("orders", broker=settings.rabbitmq_url)
app.conf.update(
    broker_connection_max_retries=None,
    broker_connection_retry_on_startup=True,
    broker_heartbeat=broker.BROKER_TIMEOUT,
    task_acks_late=True,
    task_acks_on_failure_or_timeout=False,
    task_default_queue=broker.QUEUE,
    task_ignore_result=True,
    task_queues=[queue_of(broker.QUEUE)],
    task_reject_on_worker_lost=True,
    worker_concurrency=THREADS,
    worker_consumer=f"{__name__}:StrictConsumer",
    # RabbitMQ 4.3 refuses the exclusive queue that remote control declares.
    worker_enable_remote_control=False,
    worker_pool="threads",
    worker_prefetch_multiplier=PREFETCH,
    worker_redirect_stdouts=False,
    worker_soft_shutdown_timeout=5.0,
)
setup_logging.connect(
    lambda **_: logs.configure_logging(settings.log_format), weak=False
)


@celeryd_init.connect
def _keep_banner_for_people(instance: Any, **_: object) -> None:
    """Print no banner among lines that a program reads."""
    instance.quiet = settings.log_format == "json"


# Said at each reconnect: of a default that Celery 6 will change, of what the
# broker delivers again, and of the connection that is lost.
QUIET = ("CPendingDeprecationWarning", "Couldn't ack", "Error cleaning up")
for name in ("py.warnings", "celery.worker.request", "celery.worker.loops"):
    logging.getLogger(name).addFilter(
        lambda record: not any(it in record.getMessage() for it in QUIET)
    )
ALIVE.touch()  # before anything that may wait


class Preparation(bootsteps.StartStopStep):
    """What Celery does not do at each connect."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        """Declare the dead-letter queue, and show that the worker lives."""
        # On the consumer's own connection: the failure of another one would
        # be no connection error to Celery, and end the worker.
        channel = parent.connection.default_channel
        queue_of(broker.DEAD_LETTERS).bind(channel).declare()
        self.timer = parent.timer.call_repeatedly(ALIVE_INTERVAL, ALIVE.touch)

    def stop(self, _: Any) -> None:
        """End the timer of this connection."""
        self.timer.cancel()


app.steps["consumer"].add(Preparation)
# Without the 28 queues of Celery's own delay, which is not used.
blueprint: Any = Consumer.Blueprint
blueprint.default_steps = [
    step for step in blueprint.default_steps if "DelayedDelivery" not in step
]


class StrictConsumer(Consumer):
    """Celery's consumer, with malformed messages dead-lettered.

    A stock worker dies of a message whose task is a list or which lacks an
    id (celery#7975, #4308, #5204), and again after each restart.
    """

    def ensure_connected(self, conn: Any) -> Any:
        """Connect soon after the broker's return, and look alive."""
        connect = conn.ensure_connection

        def connect_soon(errback: Any, tries: Any, callback: Any) -> Any:
            """Pause for seconds; Celery would for up to half a minute."""

            def look_alive() -> None:
                """Be called each second of a pause."""
                ALIVE.touch()
                callback()

            return connect(errback, tries, callback=look_alive, **RECONNECT)

        conn.ensure_connection = connect_soon
        while True:
            try:
                return super().ensure_connected(conn)
            except AccessRefused as error:  # to Celery no outage: it ends
                logger.error("%s: %s", conn.as_uri(), error.reply_text)
            time.sleep(RECONNECT["interval_max"])
            state.maybe_shutdown()

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Return Celery's handler behind a check of the message."""
        handle = super().create_task_handler(*args, **kwargs)

        def handle_checked(message: Message) -> None:
            """Give Celery a message, unless it is malformed."""
            try:
                check_message(message)
            except Exception as error:  # it raises whatever its parts raise
                self.on_decode_error(message, error)
            else:
                handle(message)

        return handle_checked

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Reject a malformed message: Celery would acknowledge it."""
        logger.error("Rejected a malformed message: %r", exc)
        message.reject_log_error(logger, (OSError, AMQPError))


def read_properties(buffer: bytes, offset: int) -> tuple[Any, int]:
    """Return a message's properties, or none if they cannot be read."""
    # An error would end the worker; a message without any is rejected later.
    try:
        properties, end = decode_properties_basic(buffer, offset)
        return properties, end
    except Exception:  # bytes that are not UTF-8, a time out of range, ...
        return {}, offset


parsers: dict[int, Any] = PROPERTY_CLASSES
parsers[Basic.CLASS_ID] = read_properties


def check_message(message: Message) -> None:
    """Raise unless it is what the publisher sends, and nothing besides."""
    if message.content_encoding != "utf-8":  # Celery reads it as that anyhow
        raise ValueError("an encoding that the publisher does not write")
    # Those with an x are the broker's own.
    ours = {name for name in message.headers if not name.startswith("x-")}
    task, event_id = message.headers["task"], message.headers["id"]
    if ours != {"lang", "task", "id"} or task != broker.TASK:
        raise ValueError("headers that the publisher does not write")
    _, kwargs, _ = message.payload
    for each in (event_id, kwargs["event_id"], kwargs["order_id"]):
        UUID(each)


@app.task(name=broker.TASK)
def process_new_order(
    *, event_id: str, order_id: str, request_id: str
) -> None:
    """Process the order of an event; wait while the database is away."""
    logs.request_id.set(request_id)
    while True:
        try:
            with engine.connect() as connection:
                process_order(connection, UUID(event_id))
            outage.end()
            return
        except Exception as error:
            if not db.is_outage(error):
                raise
            outage.report(error)
        if state.should_stop is not None:  # the worker is being stopped
            raise Reject("the database is away", requeue=True)
        time.sleep(RETRY_PAUSE)
