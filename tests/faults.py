"""What the tests of faults share: a journal, and clients that go on calling.

A journal keeps the orders that were answered with 201. At rest each of them
is in the events table and processed, and the logs of all processes together
say so once. A proxy makes a server slow.
"""

import contextlib
import re
import socket
import socketserver
import threading
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx2
import psycopg
import servers
from conftest import User

from orders.events import LEASES

PAUSE = 0.02  # seconds between two calls of a client

UNPROCESSED = """
SELECT id FROM orders WHERE id NOT IN (
    SELECT order_id FROM events
    WHERE kind = 'new_order' AND processed_at IS NOT NULL
)
"""


class Journal:
    """What the service has acknowledged."""

    def __init__(self, settings):
        """Take where the orders must be."""
        self.url = settings.database_url
        self.acknowledged = []
        self.answers = []  # status and seconds

    def place(self, user):
        """Create an order."""
        began = time.monotonic()
        answer = user.create()
        self.answers.append((answer.status_code, time.monotonic() - began))
        if answer.status_code == 201:
            self.acknowledged.append(answer.json()["id"])

    @contextlib.contextmanager
    def filling(self, *users):
        """Let users create orders for the time of the block."""
        with calling(*(lambda user=user: self.place(user) for user in users)):
            yield

    def query(self, statement):
        """Return the rows of a statement."""
        with psycopg.connect(self.url) as connection:
            return connection.execute(statement).fetchall()

    def where(self, condition):
        """Return the orders whose creation's event meets a condition."""
        rows = self.query(
            "SELECT order_id FROM events"
            f" WHERE kind = 'new_order' AND {condition}"
        )
        return {str(order) for (order,) in rows}

    def processed(self, orders):
        """Return whether all these orders were processed."""
        return not self.where("processed_at IS NULL").intersection(orders)

    def end_leases(self):
        """Make what is not processed due now, to save the 30 s of a lease.

        But not a lease that would never end.
        """
        self.query(
            "UPDATE events SET due_at = now() WHERE processed_at IS NULL"
            f" AND due_at < now() + interval '{LEASES[-1]} s' RETURNING id"
        )

    def settle(self, *processes, timeout=20, unsaid=0):
        """Check that each order is kept, processed, and said to be so once.

        A kill between a commit and its log line leaves an order `unsaid`.
        """
        assert self.acknowledged
        servers.wait_until(
            lambda: not self.where("processed_at IS NULL LIMIT 1"), timeout
        )
        time.sleep(1)  # for what may be delivered a second time
        kept = {str(row[0]) for row in self.query("SELECT id FROM orders")}
        text = "".join(process.text() for process in processes)
        said = Counter(re.findall(r"Order (\S+) processed", text))
        assert set(self.acknowledged) - kept == set()
        assert self.query(UNPROCESSED) == []
        assert [order for order, n in said.items() if n > 1] == []
        assert len(set(self.acknowledged) - said.keys()) <= unsaid


@contextlib.contextmanager
def calling(*calls):
    """Repeat each call in a thread of its own for the time of the block."""
    ended = threading.Event()

    def repeat(call):
        while not ended.wait(PAUSE):
            with contextlib.suppress(httpx2.TransportError):  # API killed
                call()

    with ThreadPoolExecutor(len(calls)) as pool:
        jobs = [pool.submit(repeat, call) for call in calls]
        try:
            yield
        finally:
            ended.set()
        for job in jobs:
            job.result()


def user_of(client):
    """Return a user of their own."""
    return User(client, f"{uuid.uuid4()}@example.com")


class Proxy(socketserver.ThreadingTCPServer):
    """Forwards connections to a port, each reply `delay` seconds late."""

    daemon_threads = True

    def __init__(self, target):
        """Listen on a free port."""
        super().__init__(("127.0.0.1", 0), _Forward)
        self.target, self.delay = target, 0.0
        self.port = self.server_address[1]


class _Forward(socketserver.BaseRequestHandler):
    def handle(self):
        with socket.create_connection(
            ("127.0.0.1", self.server.target)
        ) as target:
            threading.Thread(
                target=_pump, args=(self.request, target), daemon=True
            ).start()
            _pump(target, self.request, lambda: time.sleep(self.server.delay))


def _pump(source, sink, wait=lambda: None):
    """Copy bytes until either side ends, then end both."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            wait()
            sink.sendall(data)
    for side in (source, sink):
        with contextlib.suppress(OSError):
            side.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def proxying(server):
    """Run a proxy before a server for the time of the block."""
    with Proxy(server.port) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
