"""The Celery worker: processes each order two seconds after its event.

The API publishes with pika, in Celery's own protocol, so a stock worker reads
it. The settings here lose nothing when the worker, the broker or the database
is killed, and a malformed message ends in the dead-letter queue.
"""

import logging
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

from amqp.serialization import PROPERTY_CLASSES, decode_properties_basic
from amqp.spec import Basic
from celery import Celery, bootsteps
from celery.signals import setup_logging, task_retry
from celery.worker.consumer import Consumer
from celery.worker.request import Request
from kombu import Exchange, Message, Queue
from kombu.common import QoS
from sqlalchemy.exc import SQLAlchemyError

from orders import logs
from orders.db import AUTOCOMMIT, OutageLog, create_sync_engine
from orders.models import now
from orders.rabbitmq import DEAD_LETTERS, QUEUE, QUEUE_ARGUMENTS, TASK
from orders.service import process_order
from orders.settings import load_settings

THREADS = 8
PREFETCH = 1000  # messages a thread; those that wait for their eta count too
MAX_DELAY = timedelta(minutes=10)  # that a message may ask for
MAX_RETRY_BACKOFF = 4  # seconds between two tries while the database is away
RECONNECT = {"interval_start": 1, "interval_step": 1, "interval_max": 4}

logger = logging.getLogger(__name__)

settings = load_settings(worker=True)
engine = create_sync_engine(settings.database_url).execution_options(
    **AUTOCOMMIT
)
outage = OutageLog()
app = Celery("orders", broker=settings.rabbitmq_url)
app.conf.update(
    broker_connection_max_retries=None,
    broker_connection_retry_on_startup=True,
    broker_heartbeat=10,
    task_acks_late=True,
    task_acks_on_failure_or_timeout=False,
    task_default_queue=QUEUE,
    task_ignore_result=True,
    task_queues=[
        Queue(
            QUEUE,
            Exchange(""),
            routing_key=QUEUE,
            queue_arguments=QUEUE_ARGUMENTS,
        )
    ],
    task_reject_on_worker_lost=True,
    worker_concurrency=THREADS,
    worker_consumer=f"{__name__}:StrictConsumer",
    worker_enable_prefetch_count_reduction=False,
    # RabbitMQ 4.3 refuses the exclusive queue that remote control declares.
    worker_enable_remote_control=False,
    worker_pool="threads",
    worker_prefetch_multiplier=PREFETCH,
    worker_redirect_stdouts=False,
    worker_soft_shutdown_timeout=5.0,
)


@setup_logging.connect
def _configure_logging(**_: object) -> None:
    logs.configure_logging()


@task_retry.connect
def _report_retry(reason: object, **_: object) -> None:
    outage.report(reason)


class FixedPrefetch(QoS):
    """A prefetch count that stays.

    Celery changes it for each message that waits for its eta, a round trip to
    the broker both times, and to no effect: a consumer of a quorum queue
    keeps the count that it began with.
    """

    def increment_eventually(self, n: int = 1) -> int:
        """Leave the count as it is."""
        return self.value

    decrement_eventually = increment_eventually


class Preparation(bootsteps.StartStopStep):
    """What Celery does not do at each connect."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Consumer) -> None:
        """Fix the prefetch count, and declare the dead-letter queue."""
        parent.qos = FixedPrefetch(parent.qos.callback, parent.qos.value)
        with parent.app.connection_for_write() as connection:
            Queue(
                DEAD_LETTERS, queue_arguments={"x-queue-type": "quorum"}
            ).bind(connection.default_channel).declare()


app.steps["consumer"].add(Preparation)


class StrictConsumer(Consumer):
    """Celery's consumer, with malformed messages dead-lettered.

    A stock worker dies of a message whose task is a list or which lacks an
    id, and is killed by it again after each restart.
    """

    def ensure_connected(self, conn: Any) -> Any:
        """Connect soon after the broker's return.

        Celery's pauses between two tries grow to half a minute, and no
        setting of it says otherwise.
        """
        connect = partial(conn.ensure_connection, **RECONNECT)
        conn.ensure_connection = connect
        return super().ensure_connected(conn)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Any:
        """Return Celery's handler behind a check of the message."""
        handle = super().create_task_handler(*args, **kwargs)

        def handle_strictly(message: Message) -> None:
            try:
                check_message(message)
            except Exception as error:  # it raises whatever its parts raise
                logger.error("Rejected a malformed message: %r", error)
                message.reject_log_error(logger, self.connection_errors)
            else:
                handle(message)

        return handle_strictly


def read_properties(buffer: bytes, offset: int) -> tuple[Any, int]:
    """Return a message's properties, or none if they cannot be read.

    Where py-amqp reads them, an error would end the worker; a message without
    any is rejected later.
    """
    try:
        return decode_properties_basic(buffer, offset)
    except Exception:  # bytes that are not UTF-8, a time out of range, ...
        return {}, offset


PROPERTY_CLASSES[Basic.CLASS_ID] = read_properties


def check_message(message: Message) -> None:
    """Raise unless it is what the publisher, or a retry of ours, sends."""
    headers = message.headers
    if headers["task"] != TASK:
        raise ValueError("another task")
    UUID(headers["id"])
    if eta := headers.get("eta"):
        due = datetime.fromisoformat(eta).astimezone(UTC)
        if due > now() + MAX_DELAY:
            raise ValueError("due too late: the worker would hold it so long")
        # What is due already needs no timer, and a time no second parsing.
        headers["eta"] = due if due > now() else None
    if any(headers.get("timelimit") or ()) or headers.get("expires"):
        raise ValueError("a limit that the publisher does not set")
    if headers.get("stamped_headers"):
        raise ValueError("stamps, which the publisher does not set")
    _, kwargs, _ = message.payload
    for name in ("event_id", "order_id"):
        UUID(kwargs[name])


class OrderRequest(Request):
    """Celery's request, spared to look up the zone of its eta each time."""

    _tzlocal = UTC


@app.task(
    name=TASK,
    Request=OrderRequest,
    autoretry_for=(SQLAlchemyError,),
    max_retries=None,
    retry_backoff=True,
    retry_backoff_max=MAX_RETRY_BACKOFF,
)
def process_new_order(
    *, event_id: str, order_id: str, request_id: str
) -> None:
    """Process the order of an event; again while the database is away."""
    logs.request_id.set(request_id)
    with engine.connect() as connection:
        process_order(connection, UUID(event_id))
