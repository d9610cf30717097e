"""The Celery worker: processes each order two seconds after its event.

The API publishes with pika, in Celery's own protocol, so a stock worker reads
it. The settings here lose nothing when the worker, the broker or the database
is killed, and a malformed message ends in the dead-letter queue.
"""

import logging
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from celery import Celery, bootsteps
from celery.signals import setup_logging, task_retry
from celery.worker.consumer import Consumer
from kombu import Exchange, Message, Queue
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session

from orders import logs
from orders.db import OutageLog, create_sync_engine
from orders.models import now
from orders.rabbitmq import DEAD_LETTERS, QUEUE, QUEUE_ARGUMENTS, TASK
from orders.service import process_order
from orders.settings import load_settings

THREADS = 8
PREFETCH = 500  # messages a thread; those that wait for their eta count too
MAX_DELAY = timedelta(minutes=10)  # that a message may ask for
MAX_RETRY_BACKOFF = 4  # seconds between two tries while the database is away

logger = logging.getLogger(__name__)

settings = load_settings(worker=True)
engine = create_sync_engine(settings.database_url)
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


class DeadLetterQueue(bootsteps.StartStopStep):
    """Declare the dead-letter queue at each connect, as the publisher does."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Consumer) -> None:
        """Declare the queue; nothing consumes it."""
        with parent.app.connection_for_write() as connection:
            Queue(
                DEAD_LETTERS, queue_arguments={"x-queue-type": "quorum"}
            ).bind(connection.default_channel).declare()


app.steps["consumer"].add(DeadLetterQueue)


class StrictConsumer(Consumer):
    """Celery's consumer, with malformed messages dead-lettered.

    A stock worker dies of a message whose task is a list or which lacks an
    id, and is killed by it again after each restart.
    """

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


def check_message(message: Message) -> None:
    """Raise unless it is what the publisher, or a retry of ours, sends."""
    headers = message.headers
    if headers["task"] != TASK:
        raise ValueError("another task")
    UUID(headers["id"])
    eta = headers.get("eta")
    if eta and datetime.fromisoformat(eta) > now() + MAX_DELAY:
        raise ValueError("due too late: the worker would hold it until then")
    if any(headers.get("timelimit") or ()) or headers.get("expires"):
        raise ValueError("a limit that the publisher does not set")
    _, kwargs, _ = message.payload
    for name in ("event_id", "order_id"):
        UUID(kwargs[name])


@app.task(
    name=TASK,
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
    with Session(engine) as session:
        process_order(session, UUID(event_id))
