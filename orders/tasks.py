"""The Celery worker: processes each order when its message arrives.

The API publishes with pika, in Celery's own protocol; the broker delays the
message. Nothing is lost when the worker, the broker or the database is killed,
and a malformed message ends in the dead-letter queue.
"""

import logging
import time
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

from amqp.exceptions import AccessRefused, AMQPError
from amqp.serialization import PROPERTY_CLASSES, decode_properties_basic
from amqp.spec import Basic
from celery import Celery
from celery.signals import celeryd_init, heartbeat_sent, setup_logging
from celery.worker import state
from celery.worker.consumer import Consumer
from celery.worker.consumer.delayed_delivery import DelayedDelivery
from kombu import Exchange, Message, Queue
from kombu.transport.pyamqp import Transport

from orders import broker, db, logs
from orders.events import process_orders
from orders.settings import load_settings, refuse_to_start

PREFETCH = 128  # messages; few, as the relay counts what is queued
BATCH = 50  # orders that share a round trip

logger = logging.getLogger(__name__)

settings = load_settings(secret=False)
if settings.rabbitmq_url is None:
    refuse_to_start("RABBITMQ_URL is not set: a worker needs a broker")
engine = db.create_sync_engine(settings.database_url, db.WORKER_DEADLINE)
database_outage = logs.Outage(__name__, "The database")
broker_outage = logs.Outage(__name__, "RabbitMQ")
waiting: deque[Message] = deque()  # to be processed

queue, dead_letters = (
    Queue(it, Exchange(""), it, queue_arguments=broker.QUEUE_ARGUMENTS[it])
    for it in (broker.QUEUE, broker.DEAD_LETTERS)
)
app = Celery("orders", broker=settings.rabbitmq_url)
app.conf.update(
    broker_heartbeat=broker.BROKER_TIMEOUT,
    task_queues=[queue],
    worker_cancel_long_running_tasks_on_connection_loss=True,
    worker_concurrency=1,
    worker_consumer=f"{__name__}:StrictConsumer",
    # RabbitMQ 4.3 refuses the exclusive queue that remote control declares.
    worker_enable_remote_control=False,
    worker_pool="threads",
    worker_prefetch_multiplier=PREFETCH,
)
setup_logging.connect(
    lambda **_: logs.configure_logging(settings.log_format), weak=False
)


@celeryd_init.connect
def _keep_banner_for_people(instance: Any, **_: object) -> None:
    """Print no banner among lines that a program reads."""
    instance.quiet = settings.log_format == "json"


@heartbeat_sent.connect
def look_alive(**_: object) -> None:
    """Show that the worker does not hang, to a health check."""
    Path("/tmp/worker-alive").touch()  # noqa: S108


look_alive()  # before anything that may wait
# At each reconnect it says that the lost connection cannot be cleaned up.
logging.getLogger("celery.worker.loops").setLevel("CRITICAL")
# Celery's own delay, which is not used, would declare 28 queues.
unused: Any = DelayedDelivery
unused.include_if = lambda *_: False
# To Celery a wrong password is no outage, and ends the worker.
Transport.recoverable_connection_errors += (AccessRefused,)


class StrictConsumer(Consumer):
    """Celery's consumer, which dead-letters what a stock one dies of."""

    # Such as a task that is a list, or no id: celery#7975, #4308, #5204.

    def ensure_connected(self, conn: Any) -> Any:
        """Connect soon after the broker's return, and look alive."""

        def wait() -> None:
            """Be called each second of a pause."""
            look_alive()
            state.maybe_shutdown()

        conn.ensure_connection(
            lambda error, _: broker_outage.report(error),
            # Celery itself would pause for up to half a minute.
            interval_max=4,
            callback=wait,
        )
        dead_letters.bind(conn.default_channel).declare()
        broker_outage.end()
        return conn

    def create_task_handler(self, *_: Any, **__: Any) -> Any:
        """Return what takes each message: Celery's own costs more than it."""

        def receive(message: Message) -> None:
            """Let a message wait for the next trip, unless it is malformed."""
            try:
                check_message(message)
            except Exception as error:  # it raises whatever its parts raise
                self.on_decode_error(message, error)
                return
            waiting.append(message)
            if len(waiting) == 1:  # the first calls who takes all
                self.pool.apply_async(process_new_orders, callback=str)

        return receive

    def on_decode_error(self, message: Message, exc: Exception) -> None:
        """Reject a malformed message: Celery would acknowledge it."""
        logger.error("Rejected a malformed message: %r", exc)
        message.reject_log_error(logger, (OSError, AMQPError))


def read_properties(buffer: bytes, offset: int) -> tuple[Any, int]:
    """Return a message's properties, or none if they cannot be read."""
    # An error would end the worker; a message without any is rejected later.
    try:
        return decode_properties_basic(buffer, offset)
    except Exception:  # bytes that are not UTF-8, a time out of range, ...
        return {}, offset


parsers: dict[int, Any] = PROPERTY_CLASSES
parsers[Basic.CLASS_ID] = read_properties


def check_message(message: Message) -> None:
    """Raise unless it is what the publisher sends, and nothing besides."""
    # Celery reads all as UTF-8. Headers with an x are the broker's own.
    ours = {name for name in message.headers if not name.startswith("x-")}
    found = message.content_encoding, ours, message.headers["task"]
    if found != ("utf-8", {"lang", "task", "id"}, broker.TASK):
        raise ValueError("it is not what the publisher writes")
    _, kwargs, _ = message.payload
    for it in (message.headers["id"], kwargs["event_id"], kwargs["order_id"]):
        UUID(it)


@app.task(name=broker.TASK)
def process_new_orders() -> None:
    """Process the orders that wait, trip after trip; wait in an outage."""
    size = BATCH
    while waiting and state.should_stop is None:
        messages = [waiting[n] for n in range(min(size, len(waiting)))]
        settle: Any = partial(Message.ack, multiple=True)
        try:
            calls = [message.payload[1] for message in messages]
            requests = {UUID(it["event_id"]): it["request_id"] for it in calls}
            process_orders(engine, requests)
            database_outage.end()
        except Exception as error:
            if db.is_outage(error):
                database_outage.report(error)
                time.sleep(1)
                continue
            if len(messages) > 1:
                size = 1  # who is bad must fail alone
                continue
            logger.exception("Rejected a message that failed")
            settle, size = Message.reject, BATCH
        for _ in messages:
            waiting.popleft()
        with suppress(OSError, AMQPError):  # else they come again
            settle(messages[-1])  # for all until here, which are in order
