"""What the tests of faults share: a journal, and clients that go on calling.

A journal keeps the orders that were answered with 201. When nothing is left to
do, each of these orders has a processed event, and the logs of all processes
together say once that it was processed. A proxy makes a server slow, cuts
connections to it, or swallows what they carry.
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
import redis
import servers
from conftest import User, replace

PAUSE = 0.04  # seconds between two calls of a client

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

    def insert(self, number, kind="new_order", age=0):
        """Write so many orders and their events, as an API would.

        They are `age` seconds old, and acknowledged if they are new orders.
        """
        created = f"now() - interval '{age} s'"
        email = uuid.uuid4()
        rows = self.query(
            f"""
            WITH owner AS (
                INSERT INTO users (email, hashed_password)
                VALUES ('{email}', '') RETURNING id
            ), new AS (
                INSERT INTO orders
                    (id, user_id, items, total_price, status, created_at)
                SELECT gen_random_uuid(), id, '[]', 0, 'PENDING', {created}
                FROM owner, generate_series(1, {number}) RETURNING id
            )
            INSERT INTO events
                (id, order_id, kind, payload, created_at, attempts, due_at)
            SELECT gen_random_uuid(), id, '{kind}', '{{}}', {created}, 0,
                {created} + interval '2 s'
            FROM new RETURNING id, order_id
            """
        )
        if kind == "new_order":
            self.acknowledged += [str(order) for _, order in rows]
        return rows

    def deliveries(self):
        """Return how often each new order was delivered, on average."""
        rows = self.query(
            "SELECT sum(attempts), count(*) FROM events"
            " WHERE kind = 'new_order'"
        )
        return float(rows[0][0] / rows[0][1])

    def end_leases(self):
        """Make what is not processed due now, to save the 30 s of a lease.

        It is delivered again by the next sweep that finds the queues empty.
        """
        self.query(
            "UPDATE events SET due_at = now()"
            " WHERE processed_at IS NULL AND attempts > 0 RETURNING id"
        )

    def settle(self, *processes, timeout=20, unsaid=0):
        """Check that each order is kept, processed, and said to be so once.

        A kill between a commit and its log line leaves an order `unsaid`.
        """
        assert self.acknowledged
        servers.wait_until(
            lambda: not self.where("processed_at IS NULL LIMIT 1"), timeout
        )
        time.sleep(0.5)  # for what may be delivered a second time
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
    """Forwards connections to a port, and harms them as it is told.

    Each reply comes `delay` seconds late. `cut` and `swallow` are called with
    each piece of data. If `cut` returns true, the connection ends. If
    `swallow` does, it stays open, but is silent in both directions.
    """

    daemon_threads = False  # the end waits for them

    def __init__(self, target):
        """Listen on a free port."""
        super().__init__(("127.0.0.1", 0), _Forward)
        self.target, self.delay = target, 0.0
        self.cut = self.swallow = lambda connection, data: False
        self.holds = False  # new connections, too
        self.connections = []
        self.port = self.server_address[1]

    def hold(self, *, new=False):
        """Hold back what present connections carry; with `new`, later ones."""
        self.holds = new
        for connection in list(self.connections):
            connection.flows.clear()

    def release(self):
        """Let all that was held back arrive."""
        self.holds = False
        for connection in list(self.connections):
            connection.flows.set()

    def swallow_present(self):
        """Swallow what the present connections carry; return their number."""
        present = set(self.connections)
        self.swallow = lambda connection, data: connection in present
        return len(present)

    def end_present(self):
        """Cut the present connections; new ones work."""
        for connection in list(self.connections):
            connection.end()


class _Forward(socketserver.BaseRequestHandler):
    """One connection; `pieces` of data went through it so far."""

    def handle(self):
        """Copy bytes in both directions until either side ends."""
        self.pieces, self.silent, self.sides = 0, False, [self.request]
        self.flows = threading.Event()
        if not self.server.holds:
            self.flows.set()
        self.server.connections.append(self)
        self.flows.wait()
        address = "127.0.0.1", self.server.target
        with (
            contextlib.suppress(OSError),  # nobody is there
            socket.create_connection(address) as target,
        ):
            self.sides.append(target)
            back = threading.Thread(
                target=self.pump, args=(self.request, target), daemon=True
            )
            back.start()
            self.pump(target, self.request, late=True)
            back.join()
        self.server.connections.remove(self)

    def pump(self, source, sink, *, late=False):
        """Copy bytes until either side ends, then end both."""
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.pieces += 1
                self.flows.wait()
                if late:
                    time.sleep(self.server.delay)
                if self.server.cut(self, data):
                    break
                self.silent |= bool(self.server.swallow(self, data))
                if not self.silent:
                    sink.sendall(data)
        self.end()

    def end(self):
        """End both sides, whatever state they are in."""
        for side in self.sides:
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
            proxy.release()
            proxy.end_present()


def through(proxy, settings, server):
    """Return settings that reach a server by its proxy."""
    changes = {
        name: url.replace(f":{server.port}/", f":{proxy.port}/")
        for name in ("rabbitmq_url", "database_url", "redis_url")
        if (url := getattr(settings, name))
    }
    return replace(settings, **changes)


@contextlib.contextmanager
def refusing(server, fault):
    """Let a Redis answer reads and refuse writes for the block's time."""
    tell = redis.Redis(port=server.port).execute_command
    dump = server.folder / "dump.rdb"

    def snapshot(wanted):
        tell("BGSAVE")
        servers.wait_until(
            lambda: wanted == tell("INFO")["rdb_last_bgsave_status"], 5
        )

    if fault == "no snapshot":
        tell("CONFIG SET", "save", "3600 1")
        dump.mkdir()
        snapshot("err")
    else:
        tell(*REFUSALS[fault][0])
    try:
        yield
    finally:
        if fault == "no snapshot":
            dump.rmdir()
            snapshot("ok")
        else:
            tell(*REFUSALS[fault][1])


# What makes a Redis refuse writes, and what heals it.
REFUSALS = {
    "no memory": (
        ("CONFIG SET", "maxmemory", 1),
        ("CONFIG SET", "maxmemory", 0),
    ),
    "read-only": (("REPLICAOF", "127.0.0.1", 1), ("REPLICAOF", "NO", "ONE")),
    "no replica": (
        ("CONFIG SET", "min-replicas-to-write", 1),
        ("CONFIG SET", "min-replicas-to-write", 0),
    ),
    "no snapshot": (),
}
