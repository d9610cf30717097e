"""Publish messages to RabbitMQ, so that a stock Celery worker reads them.

A batch of messages is delivered when RabbitMQ has confirmed each of them. Any
failure is a ConnectionError and closes the connection, because a channel that
refused one message may go on refusing. The next call connects again, and makes
queues that are missing.

pika's `SelectConnection` does not block: a question returns at once, and
pika's loop calls back with the answer. The calling thread runs that loop here,
and only while it waits for an answer, so that every wait has a deadline.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import pika
from pika import spec
from pika.adapters import select_connection
from pika.channel import Channel
from pika.exceptions import AMQPError
from pika.frame import Method

DELAY_QUEUE = "orders.delay"  # a message waits here until it is due
QUEUE = "orders"  # a message that is due waits here for a worker
DEAD_LETTERS = "orders.dead"  # what a worker rejected is kept here
BROKER_TIMEOUT = 10  # seconds; heartbeat, and the longest wait for an answer
ENCODING = "utf-8"  # of the bodies
CLOSE_TIMEOUT = 1  # seconds that a polite end of the connection may take

# By default pika's loop opens a file (epoll) each time it runs, and could not
# run in a process whose clients have used up all files that it may open.
select_connection.SELECT_TYPE = "poll"

# Publisher and worker declare the queues with the same arguments: RabbitMQ
# refuses a second declaration with other ones (406 PRECONDITION_FAILED).
QUORUM: Mapping[str, str | int] = {"x-queue-type": "quorum"}
FORWARDING = {**QUORUM, "x-dead-letter-exchange": ""}  # also when it expires
FORWARD_TO = "x-dead-letter-routing-key"  # the name of the next queue
QUEUE_ARGUMENTS = {
    DEAD_LETTERS: {**QUORUM, "x-max-length": 10_000},
    # RabbitMQ 4 would give up a message after 20 deliveries.
    QUEUE: {**FORWARDING, FORWARD_TO: DEAD_LETTERS, "x-delivery-limit": 1000},
    DELAY_QUEUE: {**FORWARDING, FORWARD_TO: QUEUE},
}

Answer = TypeVar("Answer")


class Message(NamedTuple):
    """An event to be handled by a worker."""

    event_id: UUID
    task: str  # the name of the Celery task that handles the event
    delay: timedelta  # what is left of the handler's delay
    traceparent: str | None = None  # the W3C trace that the task continues

    @property
    def queue(self) -> str:
        """Return the queue that the message is published to."""
        return DELAY_QUEUE if self.delay > timedelta(0) else QUEUE


def celery_content(message: Message) -> tuple[dict[str, str], list[Any]]:
    """Return the headers and the content of the body: Celery's protocol 2."""
    event_id = str(message.event_id)
    headers = {"lang": "py", "task": message.task, "id": event_id}
    if message.traceparent is not None:
        headers["traceparent"] = message.traceparent
    embedded = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))
    return headers, [[event_id], {}, embedded]


def celery_message(message: Message) -> tuple[pika.BasicProperties, bytes]:
    """Return the properties and the body of a message."""
    headers, payload = celery_content(message)
    properties = pika.BasicProperties(
        content_type="application/json",
        content_encoding=ENCODING,
        delivery_mode=pika.DeliveryMode.Persistent.value,
        message_id=headers["id"],
        correlation_id=headers["id"],
        headers=headers,
    )
    if message.queue == DELAY_QUEUE:
        # In milliseconds. RabbitMQ then moves the message to `orders`.
        delay = math.ceil(message.delay / timedelta(milliseconds=1))
        properties.expiration = str(delay)
    return properties, json.dumps(payload).encode(ENCODING)


class DeadLetter(NamedTuple):
    """A message that a worker rejected."""

    rejected_at: datetime | None  # in UTC. None: no worker has rejected it
    event_id: UUID | None  # None: the message is malformed

    @classmethod
    def of(cls, headers: Mapping[str, Any]) -> "DeadLetter":
        """Read the headers; RabbitMQ adds `x-death` when it moves a letter."""
        event_id = None
        with suppress(ValueError):
            event_id = UUID(str(headers.get("id")))
        deaths = headers.get("x-death") or [{}]
        return cls(deaths[0].get("time"), event_id)


def read_dead_letters(url: str, *, discard: bool) -> list[DeadLetter]:
    """Return the dead letters; delete them from their queue to discard them.

    Raise ConnectionError if RabbitMQ is away, or has no such queue.
    """
    letters = []
    try:
        with closing(pika.BlockingConnection(pika.URLParameters(url))) as link:
            channel = link.channel()
            queue = channel.queue_declare(DEAD_LETTERS, passive=True)
            for _ in range(queue.method.message_count):
                found, properties, _body = channel.basic_get(DEAD_LETTERS)
                if found is None or properties is None:
                    break  # somebody else reads the queue, too
                letters.append(DeadLetter.of(properties.headers or {}))
                if discard:
                    channel.basic_ack(found.delivery_tag or 0)
            # Letters that are not acknowledged return to the queue here.
    except (AMQPError, OSError) as error:
        raise ConnectionError(repr(error)) from error
    return letters


class Publisher:
    """The relay's way to RabbitMQ, over one connection at a time."""

    def __init__(self, url: str) -> None:
        """Read the URL of RabbitMQ. The first call connects."""
        self._parameters = pika.URLParameters(url)
        self._parameters.heartbeat = BROKER_TIMEOUT
        # Shorter than the deadline of a wait: the first limit leaves time for
        # the second address of a host name, and the second limit lets pika
        # say that RabbitMQ is short of memory.
        self._parameters.socket_timeout = 0.4 * BROKER_TIMEOUT
        self._parameters.blocked_connection_timeout = 0.8 * BROKER_TIMEOUT
        self._connection: BrokerConnection | None = None

    def count_ready(self) -> int:
        """Return how many messages are due and wait for a worker.

        The relay asks this often, so that heartbeats are answered in time. A
        missing queue is a ConnectionError.
        """
        with self._connected() as connection:
            connection.declare(DELAY_QUEUE, passive=True)
            return connection.declare(QUEUE, passive=True)

    def deliver(self, messages: Sequence[Message]) -> None:
        """Publish the messages. Return when RabbitMQ has confirmed them all.

        After an error RabbitMQ may have any part of them.
        """
        with self._connected() as connection:
            connection.publish(messages)

    def close(self) -> None:
        """Close the connection, if there is one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    @contextmanager
    def _connected(self) -> Iterator["BrokerConnection"]:
        """Lend the connection, a new one if need be; close it on an error."""
        try:
            if self._connection is None:
                self._connection = BrokerConnection(self._parameters)
                self._connection.open()
            yield self._connection
        except (AMQPError, OSError) as error:
            self.close()
            raise ConnectionError(str(error)) from error
        except BaseException:
            # A mistake in this code may have published a part of a batch, and
            # the numbers of later confirms would not fit any more.
            self.close()
            raise


class BrokerConnection:
    """A connection to RabbitMQ, with one channel.

    Each question to RabbitMQ has the same form: give pika the `set_result` of
    a future as the callback, and wait for that future. pika calls the
    callbacks, and the methods `_on_…`, only while `_run_loop` runs.
    """

    def __init__(self, parameters: pika.URLParameters) -> None:
        """Begin to connect. `open` must follow."""
        self._failure: str | None = None  # why the connection is of no use
        self._published = 0  # messages; RabbitMQ counts them from 1, too
        self._unconfirmed = set[int]()  # the numbers of these messages
        self._confirmed = Future[None]()  # done when no message is unconfirmed
        self._opened = Future[pika.SelectConnection]()
        self._connection = pika.SelectConnection(
            parameters,
            on_open_callback=self._opened.set_result,
            on_open_error_callback=self._on_connection_closed,
            on_close_callback=self._on_connection_closed,
        )

    def open(self) -> None:
        """Wait for the connection, declare the queues, ask for confirms."""
        self._wait(self._opened, "open a connection")
        channel_opened = Future[Channel]()
        self._connection.channel(on_open_callback=channel_opened.set_result)
        self._channel = self._wait(channel_opened, "open a channel")
        self._channel.add_on_close_callback(self._on_channel_closed)
        for queue in QUEUE_ARGUMENTS:
            self.declare(queue, passive=False)
        self._channel.add_on_return_callback(self._on_return)
        confirming = Future[Method[spec.Confirm.SelectOk]]()
        self._channel.confirm_delivery(
            self._on_confirm, callback=confirming.set_result
        )
        self._wait(confirming, "agree to confirm messages")

    def declare(self, queue: str, *, passive: bool) -> int:
        """Make a queue, or only look for it; return its messages that wait.

        If `passive`, a missing queue is not made, but a ConnectionError.
        """
        declared = Future[Method[spec.Queue.DeclareOk]]()
        self._channel.queue_declare(
            queue,
            passive=passive,
            durable=True,
            arguments=QUEUE_ARGUMENTS[queue],
            callback=declared.set_result,
        )
        answer = self._wait(declared, f"declare the queue {queue}")
        return answer.method.message_count

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish messages, and wait until RabbitMQ has confirmed each.

        A confirm for each message alone would be seven times slower. In a
        transaction (`tx`) a full queue's refusal would pass unnoticed.
        """
        if not messages:
            return
        self._confirmed = Future()
        for message in messages:
            properties, body = celery_message(message)
            # Mandatory: RabbitMQ returns the message if the queue is missing.
            self._channel.basic_publish(
                "", message.queue, body, properties, mandatory=True
            )
            self._published += 1
            self._unconfirmed.add(self._published)
        self._wait(self._confirmed, f"confirm a batch of {len(messages)}")

    def close(self) -> None:
        """Close the connection, in whatever state it is, and pika's loop."""
        if self._connection.is_open and self._failure is None:
            self._connection.close()
            self._run_loop(CLOSE_TIMEOUT, "RabbitMQ did not say goodbye")
        if not self._connection.is_closed:
            self._abort()
            # Otherwise pika would leave its socket open.
            self._run_loop(CLOSE_TIMEOUT, "pika did not close its socket")
        self._connection.ioloop.close()

    def _abort(self) -> None:
        """Make pika drop the connection at once.

        pika's own `close` waits for RabbitMQ's consent, for 15 s if RabbitMQ
        hangs; and before the connection is open, `close` breaks an assertion
        of pika's. But pika drops a connection at once when RabbitMQ closes it.
        So give pika the message with which RabbitMQ would do that.
        """
        closing = spec.Connection.Close(spec.CONNECTION_FORCED, "", 0, 0)
        self._connection.callbacks.process(
            0, spec.Connection.Close, self._connection, Method(0, closing)
        )

    def _wait(self, answer: Future[Answer], what: str) -> Answer:
        """Return the answer of RabbitMQ, or raise a ConnectionError.

        `what` completes the sentence "RabbitMQ did not …".
        """
        answer.add_done_callback(lambda _: self._connection.ioloop.stop())
        late = f"RabbitMQ did not {what} within {BROKER_TIMEOUT} s"
        self._run_loop(BROKER_TIMEOUT, late)
        if self._failure is not None:
            raise ConnectionError(self._failure)
        return answer.result()

    def _run_loop(self, seconds: float, late: str) -> None:
        """Run pika's loop until a callback stops it, or the time is over."""
        loop = self._connection.ioloop
        deadline = loop.call_later(seconds, partial(self._fail, late))
        loop.start()
        loop.remove_timeout(deadline)

    def _fail(self, reason: str) -> None:
        """Note why the connection is of no use, and end the wait."""
        self._failure = self._failure or reason
        self._connection.ioloop.stop()

    def _on_connection_closed(
        self, _connection: pika.SelectConnection, error: BaseException
    ) -> None:
        """Note that connecting failed, or that the connection ended."""
        self._fail(repr(error))

    def _on_channel_closed(self, _channel: Channel, error: Exception) -> None:
        """Note that RabbitMQ closed the channel: a queue is missing, say."""
        # When the whole connection ends, its own callback knows the reason.
        if self._connection.is_open:
            self._fail(repr(error))

    def _on_return(
        self,
        _channel: Channel,
        returned: spec.Basic.Return,
        _properties: pika.BasicProperties,
        _body: bytes,
    ) -> None:
        """Note that there is no queue for a message."""
        self._fail(f"{returned.routing_key} is missing: {returned.reply_text}")

    def _on_confirm(
        self, frame: Method[spec.Basic.Ack | spec.Basic.Nack]
    ) -> None:
        """Note which messages RabbitMQ has, or that it refused one."""
        confirm = frame.method
        if isinstance(confirm, spec.Basic.Nack):
            self._fail("RabbitMQ refused a message, as a full queue does")
            return
        if confirm.multiple:
            last = confirm.delivery_tag
            self._unconfirmed = {n for n in self._unconfirmed if n > last}
        else:
            self._unconfirmed.discard(confirm.delivery_tag)
        if not self._unconfirmed:
            self._confirmed.set_result(None)
