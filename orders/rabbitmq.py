"""Publish new orders to RabbitMQ, so that a stock Celery worker reads them.

Messages are mandatory, persistent and confirmed, a batch in flight at a time,
on the API's own event loop. Whatever closes the connection fails the batch
that waits on it, and a new one is opened; the leases of the events do the
rest.
"""

import asyncio
import json
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

from pika import BasicProperties, DeliveryMode, URLParameters
from pika.adapters.asyncio_connection import AsyncioConnection
from pika.channel import Channel
from pika.exceptions import AMQPError
from pika.frame import Method
from pika.spec import Basic

from orders.events import PROCESS_DELAY, DeliveryFailed, DueEvent
from orders.models import EventKind

TASK = "orders.process_order"
QUEUE = "orders"
DEAD_LETTERS = "orders.dead"
# Publisher and worker declare the queue with these same arguments, or the
# second to come is refused with a 406.
QUEUE_ARGUMENTS = {
    "x-queue-type": "quorum",
    "x-dead-letter-exchange": "",
    "x-dead-letter-routing-key": DEAD_LETTERS,
    "x-delivery-limit": 1000,  # RabbitMQ 4 gives a message up after 20
}
CONFIRM_TIMEOUT = 10  # seconds
HEARTBEAT = 10  # seconds
MAX_BACKOFF = 2.0  # seconds between two tries to connect
PING_TIMEOUT = 1  # seconds
CLOSE_TIMEOUT = 1  # seconds

logger = logging.getLogger(__name__)


class RabbitPublisher:
    """Publish to RabbitMQ, mandatory and confirmed, on the event loop."""

    kind = EventKind.NEW_ORDER
    delay = timedelta(0)  # the worker waits: each message carries its `eta`

    def __init__(self, url: str) -> None:
        """Prepare; `run` connects."""
        self._parameters = URLParameters(url)
        self._parameters.heartbeat = HEARTBEAT
        self._parameters.blocked_connection_timeout = 10 * HEARTBEAT
        self._parameters.socket_timeout = CONFIRM_TIMEOUT
        self._parameters.stack_timeout = CONFIRM_TIMEOUT
        self._usable = asyncio.Event()
        self._closed: asyncio.Future[object] = asyncio.Future()
        self._channel: Channel | None = None
        self._published = 0  # delivery tag of the channel's last message
        self._unconfirmed: set[int] = set()  # delivery tags of the batch
        self._batch: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Connect, and again whenever the connection is lost."""
        tries = 0
        while True:
            try:
                reason = await self._use_connection()
                tries = 0  # it was up for a while
            except Exception as error:  # pika raises many; all are tried again
                reason = error
            if tries == 0:
                logger.warning("RabbitMQ is away: %r", reason)
            tries += 1
            backoff = min(MAX_BACKOFF, 0.1 * 2**tries)
            await asyncio.sleep(backoff * random.uniform(0.5, 1))

    async def _use_connection(self) -> object:
        """Connect, be usable until the connection is lost; return why."""
        self._closed = asyncio.Future()
        gone = asyncio.Event()

        def on_gone(_: object, reason: object) -> None:
            self._lose(reason)
            gone.set()

        connection = AsyncioConnection(
            self._parameters,
            on_open_error_callback=on_gone,
            on_close_callback=on_gone,
        )
        try:
            await self._set_up(connection)
            logger.info("RabbitMQ is connected")
            return await self._closed
        finally:
            self._lose("stopped")
            await _close(connection, gone)

    async def ready(self) -> None:
        """Wait until there is a channel and the broker takes messages."""
        await self._usable.wait()

    async def ping(self) -> bool:
        """Return whether the broker answers a question about the queue."""
        if self._channel is None or not self._usable.is_set():
            return False
        ask = partial(self._channel.queue_declare, QUEUE, passive=True)
        try:
            async with asyncio.timeout(PING_TIMEOUT):
                await self._reply(ask)
        except (AMQPError, TimeoutError):
            return False
        return True

    async def deliver(self, events: Sequence[DueEvent]) -> None:
        """Publish the events and await the confirm of each."""
        self._batch = asyncio.Future()
        try:
            for event in events:
                self._publish(event)
            async with asyncio.timeout(CONFIRM_TIMEOUT):
                await self._batch
        except TimeoutError:
            self._lose("no confirm in time")
            raise DeliveryFailed("RabbitMQ did not confirm in time") from None
        except AMQPError as error:
            raise DeliveryFailed(f"RabbitMQ: {error!r}") from error
        finally:
            self._unconfirmed.clear()
        logger.debug("Published %d events", len(events))

    def _publish(self, event: DueEvent) -> None:
        if self._channel is None:
            raise DeliveryFailed("RabbitMQ was lost")
        properties, body = celery_message(event)
        self._published += 1
        self._unconfirmed.add(self._published)
        self._channel.basic_publish(
            "", QUEUE, body, properties, mandatory=True
        )

    async def _set_up(self, connection: AsyncioConnection) -> None:
        """Open a confirming channel and declare the queues."""
        await self._reply(
            lambda callback: connection.add_on_open_callback(callback)
        )
        connection.add_on_connection_blocked_callback(self._on_blocked)
        connection.add_on_connection_unblocked_callback(
            lambda *_: self._usable.set()
        )
        channel = await self._reply(
            lambda callback: connection.channel(on_open_callback=callback)
        )
        channel.add_on_close_callback(lambda _, reason: self._lose(reason))
        channel.add_on_return_callback(self._on_return)
        declare = partial(channel.queue_declare, durable=True)
        await self._reply(
            partial(
                declare, DEAD_LETTERS, arguments={"x-queue-type": "quorum"}
            )
        )
        await self._reply(partial(declare, QUEUE, arguments=QUEUE_ARGUMENTS))
        await self._reply(partial(channel.confirm_delivery, self._on_confirm))
        self._channel, self._published = channel, 0
        self._usable.set()

    async def _reply(self, call: Callable[..., object]) -> Any:
        """Make a call of pika's and return what its callback is given."""
        reply: asyncio.Future[object] = asyncio.Future()
        call(callback=lambda frame: reply.done() or reply.set_result(frame))
        await asyncio.wait(
            {reply, self._closed},
            timeout=CONFIRM_TIMEOUT,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not reply.done():
            raise TimeoutError(
                repr(self._closed.result())
                if self._closed.done()
                else "no answer"
            )
        return reply.result()

    def _lose(self, reason: object) -> None:
        """Give the connection up, and the batch that waits on it."""
        self._usable.clear()
        self._channel = None
        if not self._closed.done():
            self._closed.set_result(reason)
        self._fail_batch(f"RabbitMQ was lost: {reason!r}")

    def _fail_batch(self, reason: str) -> None:
        if self._batch is not None and not self._batch.done():
            self._batch.set_exception(DeliveryFailed(reason))

    def _on_blocked(self, *_: object) -> None:
        self._usable.clear()
        self._fail_batch("RabbitMQ takes no messages: an alarm is set")

    def _on_return(self, *_: object) -> None:
        # The queue is gone: a new connection declares it again.
        self._lose("the message was returned, its queue is gone")

    def _on_confirm(self, frame: Method) -> None:
        method = frame.method
        if isinstance(method, Basic.Nack):
            return self._fail_batch("RabbitMQ refused a message")
        if method.multiple:
            confirmed = {
                tag for tag in self._unconfirmed if tag <= method.delivery_tag
            }
            self._unconfirmed -= confirmed
        else:
            self._unconfirmed.discard(method.delivery_tag)
        if not self._unconfirmed and self._batch and not self._batch.done():
            self._batch.set_result(None)
        return None


async def _close(connection: AsyncioConnection, gone: asyncio.Event) -> None:
    """Close a connection; a hung one is left to its heartbeat."""
    if not (connection.is_closing or connection.is_closed):
        connection.close()
    with suppress(TimeoutError):
        await asyncio.wait_for(gone.wait(), CLOSE_TIMEOUT)


def celery_message(event: DueEvent) -> tuple[BasicProperties, bytes]:
    """Return an event as a stock Celery worker reads it.

    Source: Celery's message protocol, version 2.
    """
    kwargs = {
        "event_id": str(event.id),
        "order_id": str(event.order_id),
        "request_id": event.payload.get("request_id", "-"),
    }
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    properties = BasicProperties(
        content_type="application/json",
        content_encoding="utf-8",
        delivery_mode=DeliveryMode.Persistent,
        message_id=str(event.id),
        correlation_id=str(event.id),
        headers={
            "lang": "py",
            "task": TASK,
            "id": str(event.id),
            "eta": (event.created_at + PROCESS_DELAY).isoformat(),
        },
    )
    return properties, json.dumps([[], kwargs, embed]).encode()
