"""Publish new orders to RabbitMQ, so that a stock Celery worker reads them.

Messages are mandatory, persistent, and confirmed, a batch at a time: not by
`tx`, whose commit RabbitMQ confirms though a full queue refused. Whatever
fails closes the connection, as a channel that refused once may go on so.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import pika
from pika.exceptions import AMQPError
from pika.spec import Basic

from orders.models import PROCESS_DELAY, now

TASK = "orders.process_order"
DELAY_QUEUE = "orders.delay"  # a message waits here until its order is due
QUEUE = "orders"  # the worker reads what is due
DEAD_LETTERS = "orders.dead"  # what the worker rejected
BROKER_TIMEOUT = 10  # seconds; heartbeat, and the longest wait for an answer

# Publisher and worker declare the queues with these same arguments, or the
# second to come is refused with a 406.
QUORUM: dict[str, Any] = {"x-queue-type": "quorum"}
FORWARDING = QUORUM | {"x-dead-letter-exchange": ""}
TO = "x-dead-letter-routing-key"  # in that exchange, a queue's name
QUEUE_ARGUMENTS = {
    DEAD_LETTERS: QUORUM | {"x-max-length": 10_000},
    # RabbitMQ 4 would give a message up after 20 deliveries.
    QUEUE: FORWARDING | {TO: DEAD_LETTERS, "x-delivery-limit": 1000},
    DELAY_QUEUE: FORWARDING | {TO: QUEUE},
}


class DueEvent(NamedTuple):
    """A claimed event; the columns that the claim returns."""

    created_at: datetime  # first: it sorts them
    id: UUID
    order_id: UUID
    payload: dict[str, Any]
    attempts: int  # this one included


class Publisher:
    """The relay's way to RabbitMQ; ConnectionError if that is away."""

    def __init__(self, url: str) -> None:
        """Prepare; the first round of the relay connects."""
        self._parameters = pika.URLParameters(url)
        self._parameters.heartbeat = BROKER_TIMEOUT
        self._parameters.blocked_connection_timeout = BROKER_TIMEOUT
        self._parameters.stack_timeout = BROKER_TIMEOUT
        self._connection: Any = None
        self._channel: Any = None

    def is_idle(self) -> bool:
        """Return whether no message is ready in the queues."""
        # The question serves the heartbeat, too, and finds a queue missing:
        # so both are asked, in the order in which messages move.
        with self._opened() as channel:
            asked = [
                channel.queue_declare(queue, passive=True).method
                for queue in (DELAY_QUEUE, QUEUE)
            ]
        return not any(answer.message_count for answer in asked)

    def deliver(self, events: Sequence[DueEvent]) -> None:
        """Publish the events, and have the broker confirm them all."""
        with self._opened() as channel:
            # Not pika's blocking one, which flushes after each message.
            publish = channel._impl.basic_publish
            for event in events:
                properties, body = celery_message(event)
                self._sent += 1
                self._waiting.add(self._sent)
                publish("", DELAY_QUEUE, body, properties, mandatory=True)
            channel._flush_output(lambda: not self._waiting)
            if self._refused:
                raise AMQPError("a queue is full, or gone")

    def close(self) -> None:
        """Close the connection, whatever state it is in."""
        with suppress(AMQPError, OSError):
            if self._connection is not None and self._connection.is_open:
                self._connection.close()
        self._connection = self._channel = None

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """Lend the channel, or a new one; what fails closes the connection."""
        try:
            if self._channel is None:
                self._connection = pika.BlockingConnection(self._parameters)
                channel: Any = self._connection.channel()
                for queue, given in QUEUE_ARGUMENTS.items():
                    channel.queue_declare(queue, durable=True, arguments=given)
                self._sent = 0  # messages, through this channel
                self._waiting = set[int]()  # their numbers, till confirmed
                self._refused = False  # one, by the broker or by all queues
                # pika's own confirms wait for each message: go below them.
                channel._impl.confirm_delivery(self._note_confirm)
                channel._impl.add_on_return_callback(self._note_return)
                self._channel = channel
            yield self._channel
        except (AMQPError, OSError) as error:
            self.close()
            raise ConnectionError(repr(error)) from error

    def _note_return(self, *_: object) -> None:
        """Note that no queue took a message."""
        self._refused = True

    def _note_confirm(self, frame: Any) -> None:
        """Note which messages the broker has, or refuses to have."""
        confirm, last = frame.method, frame.method.delivery_tag
        if confirm.multiple:
            self._waiting = {tag for tag in self._waiting if tag > last}
        self._waiting.discard(last)
        self._refused |= isinstance(confirm, Basic.Nack)


def celery_message(event: DueEvent) -> tuple[pika.BasicProperties, bytes]:
    """Return an event as a stock Celery worker reads it, when it is due."""
    # Source: Celery's message protocol, version 2.
    left = event.created_at + PROCESS_DELAY - now()
    event_id = str(event.id)
    kwargs = {
        "event_id": event_id,
        "order_id": str(event.order_id),
        "request_id": event.payload.get("request_id", "-"),
    }
    properties = pika.BasicProperties(
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=2,
        message_id=event_id,
        correlation_id=event_id,
        headers={"lang": "py", "task": TASK, "id": event_id},
        expiration=str(max(0, int(left.total_seconds() * 1000))),
    )
    embed = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
    return properties, json.dumps([[], kwargs, embed]).encode()
