"""Run the service: `uv run orders`; its operator's tools are commands.

The first run on an empty machine writes `.env` with a secret of its own.
Every run migrates the database and serves. A part of the service whose URL is
not set runs inside the process.
"""

import re
import secrets
from array import array
from asyncio import Transport
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeAlias

import click
import sqlalchemy as sa
import uvicorn
from alembic import command
from alembic.config import Config
from httptools import HttpParserUpgrade, HttpRequestParser
from sqlalchemy.exc import SQLAlchemyError
from sqlmodel import Session
from uvicorn.protocols.http.httptools_impl import (
    HttpToolsProtocol,
    RequestResponseCycle,
)

from orders.broker import read_dead_letters
from orders.db import WORKER_DEADLINE, create_sync_engine
from orders.handlers import prune_orders
from orders.logs import configure_logging
from orders.models import Event, now
from orders.problems import is_outage
from orders.settings import ENV_FILE, Settings, load_settings, refuse_to_start

ALEMBIC_INI = Path(__file__).parent.parent / "alembic.ini"
# More connections are answered with 503: a process may open 1024 files.
MAX_CONNECTIONS = 900
# Longer than clients and proxies keep an idle connection. Otherwise a call
# may be sent just when the connection is closed.
KEEP_ALIVE = 75  # seconds
MAX_HEAD = 64 * 1024  # bytes of a call's first line and headers
START_TIMEOUT = 60  # seconds that each of several processes gets to start
STOP_TIMEOUT = 5  # seconds that calls under way get to finish


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Serve the API until interrupted, or run a command."""
    if context.invoked_subcommand is None:
        serve()


def serve() -> None:
    """Set up what is missing, migrate, and serve until interrupted."""
    if not load_settings(secret=False).jwt_secret_key:
        write_env_file()
    settings = load_settings()
    configure_logging(settings.log_format)
    command.upgrade(Config(ALEMBIC_INI), "head")
    if settings.log_format == "text":
        print(banner(settings), flush=True)
    uvicorn.run(
        "orders.api:app",
        host=settings.app_host.strip("[]"),
        port=settings.app_port,
        workers=settings.web_concurrency,
        http="orders.__main__:PlainHttpProtocol",  # for `python -m orders`
        ws="none",
        log_config=None,  # ours: here, and in `orders.api` in each process
        forwarded_allow_ips=settings.forwarded_allow_ips,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_worker_healthcheck=START_TIMEOUT,
        timeout_graceful_shutdown=STOP_TIMEOUT,
    )


def write_env_file() -> None:
    """Write `.env`, for this user's eyes only, unless the file exists."""
    text = (
        "# Written by the first `uv run orders`; .env.example explains every"
        f" variable.\nJWT_SECRET_KEY={secrets.token_hex(32)}\n"
    )
    try:
        with suppress(FileExistsError):
            ENV_FILE.touch(0o600, exist_ok=False)
            ENV_FILE.write_text(text)
    except OSError as error:
        refuse_to_start(f"{error}: set JWT_SECRET_KEY, or a folder to write")


def banner(settings: Settings) -> str:
    """Return what a person wants to know first."""
    host = settings.app_host.strip("[]")
    # A program that listens on 0.0.0.0 or :: is reached by each address.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    if ":" in host:
        host = f"[{host}]"  # RFC 3986, section 3.2.2
    url = f"http://{host}:{settings.app_port}"
    cache = "in process" if settings.web_concurrency == 1 else "none"
    limit = "none"
    if settings.rate_limit:
        limit = f"{settings.rate_limit}; `RATE_LIMIT= uv run orders` lifts it"
    return f"""
  orders    {url}
  docs      {url}/docs
  database  {settings.database_url.split(":")[0]}
  cache     {"redis" if settings.redis_url else cache}
  events    {"rabbitmq, to Celery" if settings.rabbitmq_url else "in process"}
  limit     {limit}
"""


# --- The operator's tools ---------------------------------------------------

ALL = 2**16  # the length of a progress bar: the first bits of an order's id
AGAIN = "The outbox delivers waiting orders again, by itself."


@contextmanager
def connected(database_url: str) -> Iterator[sa.Engine]:
    """Lend an engine; say in one line that the database is away."""
    engine = create_sync_engine(database_url, WORKER_DEADLINE)
    try:
        yield engine
    except SQLAlchemyError as error:
        if not is_outage(error):
            raise
        reason = str(error).split("\n")[0]
        raise click.ClickException(f"The database is away: {reason}") from None
    finally:
        engine.dispose()


def parse_days(text: str) -> timedelta:
    """Return the time that a text such as `365d` names."""
    if not re.fullmatch("[1-9][0-9]{0,4}d", text):
        raise click.BadParameter("write a number of days, such as 365d")
    return timedelta(days=int(text[:-1]))


@main.command()
@click.option("--older-than", type=parse_days, required=True, metavar="DAYS")
@click.option("--dry-run", is_flag=True, help="Only count the orders.")
def prune(older_than: timedelta, dry_run: bool) -> None:
    """Delete orders that nothing has happened to for DAYS, such as 365d.

    Their events are deleted, too. The service may run meanwhile.
    """
    until, pruned, place = now() - older_than, 0, 0
    url = load_settings(secret=False).database_url
    with (
        connected(url) as engine,
        click.progressbar(length=ALL, label="Orders looked at") as bar,
    ):
        for number, last_id in prune_orders(engine, until, dry_run=dry_run):
            pruned += number
            # Ids are random, so that their first bits say how far it is.
            bar.update((last_id.int >> 112) - place)
            place = last_id.int >> 112
        bar.update(ALL - place)
    click.echo(
        f"{pruned} orders would be pruned."
        if dry_run
        else f"{pruned} orders pruned. Their idempotency keys are free again."
    )


@main.command()
@click.option("--discard", is_flag=True, help="Empty the queue, too.")
def dead(discard: bool) -> None:
    """List the messages that workers rejected: when (UTC), and why."""
    settings = load_settings(secret=False)
    if settings.rabbitmq_url is None:
        raise click.ClickException("RABBITMQ_URL is not set: no broker")
    with connected(settings.database_url) as engine:
        engine.connect().close()  # before a letter is discarded
        try:
            letters = read_dead_letters(settings.rabbitmq_url, discard=discard)
        except ConnectionError as error:
            raise click.ClickException(f"RabbitMQ: {error}") from error
        for letter in letters:
            # A session each, as the deadline is for one use of a connection.
            with Session(engine) as session:
                event = letter.event_id and session.get(Event, letter.event_id)
            reason = "malformed, or its order was pruned"
            if event:
                state = "processed since" if event.processed_at else "waits"
                reason = (
                    f"order {event.order_id}: its task failed at delivery"
                    f" {event.attempts}; {state}"
                )
            rejected_at = letter.rejected_at or "at an unknown time"
            click.echo(
                f"{rejected_at!s:19.19}"
                f"  event {letter.event_id or '-'!s:36}  {reason}"
            )
    gone = ", discarded" if discard else ""
    click.echo(f"{len(letters)} dead letters{gone}. {AGAIN}")


# --- The connection ---------------------------------------------------------

PIECE = 4 * 1024  # bytes between two looks at the size of a head
TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"connection: close\r\ncontent-length: 0\r\n\r\n"
)
# As httptools types it; a text, because an array has no [] before Python 3.12.
Readable: TypeAlias = "bytes | bytearray | memoryview | array[int]"


class PlainParser(HttpRequestParser):
    """httptools' parser, which reads on after an offer to upgrade.

    httptools takes what follows the head of such a call for another protocol,
    so that the body is lost. Java's HTTP client makes the offer with every
    plain POST. A server may ignore it (RFC 9110, section 7.8).
    """

    def __init__(self, protocol: "PlainHttpProtocol") -> None:
        """Tell `protocol` what is read."""
        super().__init__(protocol)
        # As uvicorn sets it: data may follow a call with `Connection: close`.
        self.set_dangerous_leniencies(lenient_data_after_close=True)
        self._protocol = protocol

    def feed_data(self, data: Readable) -> None:
        """Parse data; parse a head with an offer again, without the offer."""
        while True:
            try:
                super().feed_data(data)
            except HttpParserUpgrade as offer:
                if self.get_method() == b"CONNECT":
                    raise  # what follows is not HTTP
                (end_of_head,) = offer.args
                data = memoryview(data)[end_of_head:]
                super().feed_data(self._protocol.head_without_offer())
            else:
                return


class PlainHttpProtocol(HttpToolsProtocol):
    """uvicorn's protocol, without upgrades, and with a limit on headers.

    The parser keeps a header until its end is there, so that a header without
    an end would fill the memory.
    """

    # Bytes since the last head, piece of a body, or call was complete.
    _unfinished = 0
    _is_offer = False
    _is_in_head = False

    def connection_made(  # type: ignore[override]  # as uvicorn types it
        self, transport: Transport
    ) -> None:
        """Prepare for a connection."""
        super().connection_made(transport)
        self.parser = PlainParser(self)

    def data_received(self, data: bytes) -> None:
        """Parse data, and refuse a head that is too long."""
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            self._unfinished += len(piece)
            super().data_received(piece)
            if self.transport.is_closing():
                return
            if self._unfinished >= MAX_HEAD:
                self._refuse_head()
                return

    def on_message_begin(self) -> None:
        """Begin to read a head."""
        self._is_in_head = True
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header; drop a trailer, which uvicorn would take for one.

        Otherwise anybody could send an X-Forwarded-For behind the header that
        a proxy wrote (RFC 9110, section 6.5.1).
        """
        if self._is_in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin a call, unless its head is parsed again."""
        self._unfinished, self._is_in_head = 0, False
        is_tunnel = self.parser.get_method() == b"CONNECT"
        self._is_offer = self.parser.should_upgrade() and not is_tunnel
        if not self._is_offer:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of a body."""
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a call, unless its head is parsed again."""
        self._unfinished = 0
        if not self._is_offer:
            super().on_message_complete()

    def head_without_offer(self) -> bytes:
        """Return the head that was parsed, without the offer to upgrade."""
        method = self.parser.get_method()
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (method, self.url, version)]
        for name, value in self.headers:
            if name != b"upgrade":
                lines.append(b"%s: %s" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    def _refuse_head(self) -> None:
        """Close the connection; say why, unless an answer is under way."""
        # uvicorn types the cycle of a call as if there always were one.
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or cycle.response_complete:
            self.transport.write(TOO_LARGE)
        self.transport.close()


if __name__ == "__main__":
    main()
