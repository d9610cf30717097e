"""HTTP as people send it: offers to upgrade, long heads, idle connections."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from urllib.parse import urljoin

import httpx2
import pytest
import servers
import uvicorn
from conftest import ITEMS, PASSWORD, User, environment, replace
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

import orders.__main__
from orders.api import create_app
from orders.service import OrderService

KIBIBYTE = 1024
MAX_HEAD = 64 * KIBIBYTE
FLOOD = 32 * KIBIBYTE * KIBIBYTE  # bytes
# uvicorn's own limits, which were too short for some.
UVICORN_HEALTHCHECK = 5  # seconds


@contextlib.contextmanager
def connected(server, timeout=10):
    """Open a connection for the time of the block."""
    address = "127.0.0.1", server.port
    with socket.create_connection(address, timeout) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield connection


def read_answers(connection, count):
    """Return the status and the body of some answers."""
    answers = []
    with connection.makefile("rb") as stream:
        for _ in range(count):
            status = int(stream.readline().split()[1])
            size = 0
            while (line := stream.readline().lower()) not in (b"\r\n", b""):
                if line.startswith(b"content-length:"):
                    size = int(line.split()[1])
            answers.append((status, stream.read(size)))
    return answers


def post(body, *lines, path="/register/", chunked=False):
    """Return the bytes of a call with further lines in its head."""
    if chunked:
        framing = "Transfer-Encoding: chunked"
        half = len(body) // 2
        pieces = body[:half], body[half:], ""
        body = "".join(f"{len(p):x};a=b\r\n{p}\r\n" for p in pieces)
    else:
        framing = f"Content-Length: {len(body)}"
    head = [f"POST {path} HTTP/1.1", "Host: x", *lines, framing]
    head += ["Content-Type: application/json", "", body]
    return "\r\n".join(head).encode()


# --- Offers to upgrade the protocol -----------------------------------------

H2C = (
    "Connection: Upgrade, HTTP2-Settings",
    "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    "Upgrade: h2c",
)
WEBSOCKET = (
    "Upgrade: websocket",
    "Connection: keep-alive, upgrade",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)
OTHERS = ("UPGRADE: TLS/1.0, foo/2", "connection: UPGRADE")
OFFERS = {"java": H2C, "websocket": WEBSOCKET, "others": OTHERS, "none": ()}
offers = pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)


def refused(name, *lines, **options):
    """Return a call that is answered 422, with what was wrong in its body."""
    return post(
        json.dumps({"email": name, "password": "x"}), *lines, **options
    )


def wrong_members(answer):
    """Return which members of the body a 422 names."""
    status, body = answer
    assert status == 422
    return [fault["loc"] for fault in json.loads(body)["detail"]]


READ = [["body", "email"], ["body", "password"]]


@offers
@pytest.mark.parametrize("chunked", [False, True])
def test_an_offer_to_upgrade_is_ignored(server, offer, chunked):
    """RFC 9110, 7.8: the body is read, and the connection goes on."""
    begin = len(server.text())
    with connected(server) as connection:
        for _ in range(2):
            connection.sendall(refused("a", *offer, chunked=chunked))
            (answer,) = read_answers(connection, 1)
            assert wrong_members(answer) == READ

    assert "upgrade" not in server.text()[begin:].lower()


@offers
def test_the_body_may_come_after_the_offer(server, offer):
    """Java sends a head and its body in two segments."""
    head, _, body = refused("a", *offer).partition(b"\r\n\r\n")
    with connected(server) as connection:
        connection.sendall(head + b"\r\n\r\n")
        time.sleep(0.1)
        connection.sendall(body)
        (answer,) = read_answers(connection, 1)

    assert wrong_members(answer) == READ


@offers
def test_an_account_is_made_in_spite_of_an_offer(server, offer):
    """A journey: what was sent is what is kept."""
    email = f"offer-of-{len(offer)}-lines@example.com"
    account = json.dumps({"email": email, "password": PASSWORD})
    with connected(server) as connection:
        connection.sendall(post(account, *offer, path="/register"))
        ((status, body),) = read_answers(connection, 1)

    assert status == 201
    assert json.loads(body)["email"] == email


@given(
    calls=st.lists(
        st.tuples(st.sampled_from(list(OFFERS.values())), st.booleans()),
        min_size=1,
        max_size=4,
    ),
    cuts=st.lists(st.integers(0, 1600), max_size=4),
)
@examples(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_offers_may_be_cut_anywhere(server, calls, cuts):
    """Several calls on one connection, in segments of any size."""
    data = b"".join(
        refused("a", *offer, chunked=chunked) for offer, chunked in calls
    )
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    with connected(server) as connection:
        for begin, end in itertools.pairwise(places):
            connection.sendall(data[begin:end])
            time.sleep(0.002)
        answers = read_answers(connection, len(calls))

    assert [wrong_members(answer) for answer in answers] == [READ] * len(calls)


def test_a_tunnel_is_no_call(server):
    """CONNECT is refused, and what follows it is not run as a call."""
    with connected(server) as connection:
        connection.sendall(b"CONNECT x.example:80 HTTP/1.1\r\n\r\n")
        ((status, _),) = read_answers(connection, 1)

    assert 400 <= status < 500


# --- Heads without a bound --------------------------------------------------

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n"
CHUNKED = (
    b"POST /orders/ HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
)
# The begin of a call, and what comes again and again.
ENDLESS = {
    "value": (GET + b"X: ", b"a"),
    "name": (GET, b"a"),
    "headers": (GET, b"A: b\r\n"),
    "different headers": (GET, b"Abcdefgh: ijklmnop\r\n"),
    "address": (b"GET /", b"a"),
    "query": (b"GET /health?", b"a=1&"),
    "method": (b"", b"G"),
    "after a call": (GET + b"\r\n" + GET + b"X: ", b"a"),
    "after a body": (post("{}") + GET + b"X: ", b"a"),
    "with an offer": (GET + "\r\n".join((*H2C, "X: ")).encode(), b"a"),
    "trailer": (CHUNKED + b"\r\n1\r\n{\r\n0\r\nX: ", b"a"),
    "trailers": (CHUNKED + b"\r\n1\r\n{\r\n0\r\n", b"A: b\r\n"),
    "extension": (CHUNKED + b"\r\n1;", b"a"),
}


def memory(server):
    """Return the resident memory of a process and its children, in bytes."""
    total = 0
    for pid in servers.family(server.process.pid):
        status = Path(f"/proc/{pid}/status").read_text()
        total += int(re.search(r"VmRSS:\s+(\d+)", status)[1]) * KIBIBYTE
    return total


def send_until_closed(connection, begin, again):
    """Send something again and again; return how much was taken."""
    block = again * (MAX_HEAD // len(again))
    sent = connection.send(begin)
    with contextlib.suppress(ConnectionError):
        while sent < FLOOD:
            sent += connection.send(block)
    return sent


@pytest.mark.parametrize(("begin", "again"), ENDLESS.values(), ids=ENDLESS)
def test_a_head_without_an_end_is_cut_off(server, begin, again):
    """And costs no memory, however it is made."""
    before = memory(server)

    with connected(server) as connection:
        sent = send_until_closed(connection, begin, again)

    assert sent < FLOOD
    assert memory(server) - before < 8 * KIBIBYTE * KIBIBYTE
    assert servers.healthy(server.port)
    assert "Traceback" not in server.text()


def is_cut_off(connection, data):
    """Return whether a call is answered 431, or its connection closed."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        connection.sendall(data)
        answer = connection.recv(KIBIBYTE)
    return answer == b"" or b" 431 " in answer.splitlines()[0]


def test_a_refusal_says_why(server):
    """431, unless the bytes that nobody reads reset the connection."""
    data = GET + b"X: " + b"a" * MAX_HEAD
    with connected(server) as connection:
        connection.sendall(data[: MAX_HEAD + 1])
        ((status, _),) = read_answers(connection, 1)

    assert status == 431


@pytest.mark.parametrize("calls_before", [0, 1, 3])
def test_a_long_head_is_refused_in_one_piece_too(server, calls_before):
    """The limit is each call's own: 60 KiB are taken, 72 KiB are not."""
    long = b"X: " + b"a" * (60 * KIBIBYTE) + b"\r\n\r\n"
    longer = b"X: " + b"a" * (72 * KIBIBYTE) + b"\r\n\r\n"
    with connected(server) as connection:
        for _ in range(calls_before):
            connection.sendall(GET + long)
            assert read_answers(connection, 1)[0][0] == 200
        connection.sendall(GET + long)
        assert read_answers(connection, 1)[0][0] == 200
        assert is_cut_off(connection, GET + longer)


@pytest.mark.parametrize(
    "lines",
    [
        b"".join(b"X-%d: y\r\n" % number for number in range(8000)),
        b"Cookie: a=b\r\n" * 6000,
        b"A:\r\n" * 20_000,
    ],
)
def test_many_headers_are_as_long_as_one(server, lines):
    """It is their sum that counts."""
    with connected(server) as connection:
        assert is_cut_off(connection, GET + lines + b"\r\n")


def test_a_long_body_is_no_head(server):
    """A body as large as is allowed passes, in one piece or in many."""
    body = json.dumps({"email": "a", "password": "x" * 60 * KIBIBYTE})
    tiny = "".join(f"1\r\n{letter}\r\n" for letter in body) + "0\r\n\r\n"
    with connected(server) as connection:
        connection.sendall(post(body))
        connection.sendall(post(body, chunked=True))
        connection.sendall(
            CHUNKED.replace(b"orders", b"register")
            + b"Content-Type: application/json\r\n\r\n"
            + tiny.encode()
        )
        answers = read_answers(connection, 3)

    assert [wrong_members(answer) for answer in answers] == [READ] * 3


def test_calls_behind_each_other_are_not_one_head(server):
    """Some hundred small calls that come at once are some hundred calls."""
    calls = 700
    with connected(server) as connection:
        connection.sendall((GET + b"X: " + b"a" * 200 + b"\r\n\r\n") * calls)
        answers = read_answers(connection, calls)

    assert {status for status, _ in answers} == {200}


# --- Connections that are idle ----------------------------------------------

BEFORE_THE_PAUSE = [
    GET + b"\r\n",
    GET.replace(b"GET", b"HEAD") + b"\r\n",
    refused("a"),
    b"",  # a client may connect before it has something to say
]


@pytest.mark.long
def test_an_idle_connection_takes_the_next_call(server):
    """After 8 s, longer than uvicorn's 5 s: no call meets its end."""
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(connected(server)) for _ in range(20)
        ]
        for number, connection in enumerate(connections):
            before = BEFORE_THE_PAUSE[number % len(BEFORE_THE_PAUSE)]
            connection.sendall(before)
            if before.startswith(b"HEAD"):
                connection.recv(KIBIBYTE)
            elif before:
                read_answers(connection, 1)
        time.sleep(8)

        for connection in connections:
            connection.sendall(refused("a"))
            (answer,) = read_answers(connection, 1)
            assert wrong_members(answer) == READ


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Return what `uv run orders` tells uvicorn."""
    told = {}
    monkeypatch.setattr(uvicorn, "run", lambda _, **rest: told.update(rest))
    monkeypatch.setenv("DATABASE_URL", f"sqlite:///{tmp_path}/orders.db")
    monkeypatch.chdir(tmp_path)
    orders.__main__.serve()
    return told


def test_a_connection_is_kept_longer_than_by_proxies(options):
    """The load balancer of AWS keeps one for 60 s, nginx for 60 or 75 s."""
    assert options["timeout_keep_alive"] == 75


def test_several_processes_get_a_minute_to_start(options):
    """Imports take 20 s on a third of a core beside others."""
    assert options["timeout_worker_healthcheck"] >= 60


# --- Several processes on a slow machine ------------------------------------


def workers_of(server):
    """Return the processes that serve, or are about to."""
    return [
        pid
        for pid in servers.family(server.process.pid)[1:]
        if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def answers_from(server, count):
    """Return whether so many processes have started to serve."""
    return server.text().count("Application startup complete") >= count


@contextlib.contextmanager
def two_processes(folder, env=None):
    """Run `uv run orders` with two processes; do not wait for them."""
    server = servers.orders(folder, {"WEB_CONCURRENCY": "2", **(env or {})})
    server.ready = lambda: True
    with servers.running(server):
        servers.wait_until(lambda: len(workers_of(server)) == 2)
        yield server


def freeze(pids, seconds):
    """Let processes do nothing for a time, as on a machine that is busy."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@pytest.mark.long
@pytest.mark.parametrize("moment", ["at the start", "in service"])
def test_processes_that_are_slow_are_not_killed(tmp_path, moment):
    """Those that are silent for 5 s were killed, again and again."""
    with two_processes(tmp_path) as server:
        if moment == "in service":
            servers.wait_until(lambda: answers_from(server, 2))
        slow = workers_of(server)
        freeze(slow, UVICORN_HEALTHCHECK + 2)
        servers.wait_until(lambda: answers_from(server, 2))
        assert servers.healthy(server.port)
        assert workers_of(server) == slow

    assert "died" not in server.text()


@pytest.mark.long
def test_a_process_that_is_killed_is_replaced(tmp_path):
    """At once, or a minute later if it was asked how it is just then."""
    with two_processes(tmp_path) as server:
        servers.wait_until(lambda: answers_from(server, 2))
        os.kill(workers_of(server)[0], signal.SIGKILL)
        # uvicorn has both ends of the pipe open on which it asks, so that it
        # does not notice that nobody will answer. That is rare, but for a
        # machine on which each answer is late.
        servers.wait_until(lambda: answers_from(server, 3), 90)
        assert servers.healthy(server.port)


@pytest.mark.long
def test_each_of_several_processes_reads_http_as_one_does(tmp_path):
    """Offers and limits are the same in the processes that are started."""
    with two_processes(tmp_path) as server:
        servers.wait_until(lambda: answers_from(server, 2))
        for _ in range(8):
            with connected(server) as connection:
                connection.sendall(refused("a", *H2C))
                (answer,) = read_answers(connection, 1)
                assert wrong_members(answer) == READ
            head = GET + b"X: " + b"a" * (72 * KIBIBYTE) + b"\r\n\r\n"
            with connected(server) as connection:
                assert is_cut_off(connection, head)


# --- Below a path of a proxy's ----------------------------------------------


@pytest.fixture(params=["/shop", "/shop/v1", "/orders", "/docs"])
def proxied(request, tmp_path, embedded):
    """Run an API below a path; return (client, path).

    A proxy takes the path away before a call gets here, as FastAPI's page
    "Behind a Proxy" has it. The client is that proxy.
    """
    env = environment(replace(embedded, rate_limit="30/minute"))
    api = servers.api(tmp_path, env)
    api.command += ["--root-path", request.param]

    def take_path_away(call):
        """Do what the proxy does."""
        path = call.url.raw_path.removeprefix(request.param.encode())
        assert path != call.url.raw_path, "outside of the path"
        call.url = call.url.copy_with(raw_path=path)

    url = f"http://127.0.0.1:{api.port}"
    hooks = {"request": [take_path_away]}
    with (
        servers.running(api),
        httpx2.Client(
            base_url=url + request.param, event_hooks=hooks
        ) as client,
    ):
        yield client, request.param


def follow(client, reference, **options):
    """Read what a reference leads to, from the root of the API."""
    return client.get(urljoin(str(client.base_url), reference), **options)


def test_a_proxy_may_serve_the_api_below_a_path(proxied):
    """A journey: every address that is answered leads on below the path."""
    client, path = proxied
    ada = User(client, "ada@example.com")

    created = [ada.create() for _ in range(2)]
    location = created[0].headers["location"]
    read = follow(client, location, headers=ada.headers)
    page = ada.call("GET", f"/orders/user/{ada.id}?limit=1")
    link = re.match("<(.*)>", page.headers["link"])[1]
    next_page = follow(client, link, headers=ada.headers)

    assert location.startswith(f"{path}/orders/")
    assert read.json() == created[0].json()
    assert link.startswith(f"{path}/orders/user/{ada.id}?")
    assert next_page.json() == [created[0].json()]


def test_below_a_path_the_same_calls_are_counted(proxied):
    """What is free stays free, and a slash at the end makes no difference."""
    client, path = proxied

    free = [
        client.get(address)
        for address in ("/health", "/health/", "/ready", "/docs", "/redoc")
    ]
    docs, image = (
        follow(client, client.get(address).headers["location"])
        for address in ("/", "/favicon.ico")
    )
    counted = [
        client.post(address).status_code
        for address in ("/orders", "/orders/", "/token", "/token/", "/nowhere")
    ]
    login = client.post("/token")

    assert {answer.status_code for answer in free} == {200}
    assert (docs.status_code, image.status_code) == (200, 200)
    assert image.headers["content-type"] == "image/png"
    assert f"{path}/openapi.json" in docs.text
    schema = client.get("/openapi.json").json()
    assert schema["servers"] == [{"url": path}]
    assert counted == [401, 401, 422, 422, 404]
    assert login.headers["x-ratelimit-remaining"] == "24"
    assert login.headers["cache-control"] == "no-store"
    assert client.head("/health").status_code == 200
    wrong = client.delete("/orders")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def test_a_server_that_keeps_the_path_to_itself_is_understood(embedded):
    """Starlette takes both: a path with the root path, and one without."""
    app = create_app(replace(embedded, rate_limit="1/minute"))
    with TestClient(app, root_path="/shop", follow_redirects=False) as client:
        codes = [
            client.get(address).status_code
            for address in ("/health", "/shop/health", "/shop", "/shop/", "/")
        ]
        counted = client.post("/shop/orders").status_code
        refused_call = client.post("/orders").status_code

    assert codes == [200, 200, 307, 307, 307]
    assert (counted, refused_call) == (401, 429)


# --- Small print ------------------------------------------------------------


@pytest.mark.parametrize("path", ["/token", "/token/"])
def test_no_answer_about_a_token_is_kept(embedded, path, monkeypatch):
    """RFC 6749, section 5.1: whatever the status."""
    form = {"username": "ada@example.com", "password": PASSWORD}
    settings = replace(embedded, rate_limit="8/minute")
    with TestClient(create_app(settings)) as client:
        User(client, "ada@example.com")
        answers = [
            client.post(path, data=form),
            client.post(path, data={**form, "password": "wrong"}),
            client.post(path),
            client.post(path, json=form),
            client.get(path),
            client.post(path, content=b"x" * 70_000),
            client.post(path, data=form),
        ]
        monkeypatch.setattr(orders.auth.Accounts, "log_in", None)
        other = TestClient(create_app(embedded))
        with other:
            answers.append(other.post(path, data=form))
    codes = [answer.status_code for answer in answers]
    assert codes == [200, 401, 422, 422, 405, 413, 429, 500]
    for answer in answers:
        assert answer.headers.get_list("cache-control") == ["no-store"]


def test_a_500_says_what_is_left_of_the_budget(embedded, monkeypatch):
    """A failure of ours is counted, too."""
    with TestClient(create_app(replace(embedded, rate_limit="9/hour"))) as api:
        user = User(api, "ada@example.com")
        monkeypatch.delattr(OrderService, "get")
        answer = user.get("96d7d433-c31f-458f-80e0-2ca062dff923")

    assert answer.status_code == 500
    assert answer.headers["x-ratelimit-remaining"] == "6"


COMPOSED = "Pässwört-한글-é"
DECOMPOSED = (
    "Pa\u0308sswo\u0308rt-\u1112\u1161\u11ab\u1100\u1173\u11af-e\u0301"
)


@pytest.mark.parametrize(
    ("registered", "sent", "code"),
    [
        (COMPOSED, DECOMPOSED, 200),
        (DECOMPOSED, COMPOSED, 200),
        (DECOMPOSED, DECOMPOSED, 200),
        ("long \u212bngstr\u00f6m", "long \u00c5ngstro\u0308m", 200),
        ("ﬁrst password", "first password", 401),  # NFKC alone joins these
        ("Password-1", "password-1", 401),
        (COMPOSED, COMPOSED.upper(), 401),
    ],
    ids=range(7),
)
def test_a_password_is_the_same_on_every_keyboard(
    client, registered, sent, code
):
    """A Mac and Linux compose characters in different ways."""
    account = {"email": "ada@example.com", "password": registered}
    form = {"username": "ada@example.com", "password": sent}
    assert client.post("/register", json=account).status_code == 201

    assert client.post("/token", data=form).status_code == code


TRUE, ONE = '{"express": true}', '{"express": 1}'


@pytest.mark.parametrize(
    ("first", "again", "code"),
    [
        (TRUE, TRUE, 201),
        (TRUE, ONE, 422),
        (ONE, TRUE, 422),
        ('{"express": false}', '{"express": 0}', 422),
        ('{"a": [[true], {"b": 0}]}', '{"a": [[1], {"b": 0}]}', 422),
        ('{"a": [[true], {"b": 0}]}', '{"a": [[true], {"b": false}]}', 422),
        ('{"a": 1, "b": 2}', '{"b": 2, "a": 1}', 201),
        ('{"a": "é"}', '{"a": "\\u00e9"}', 201),
        ('{"a": "1"}', '{"a": 1}', 422),
        ('{"a": null}', "{}", 422),
    ],
    ids=range(10),
)
def test_a_replay_says_the_same_as_before(ada, first, again, code):
    """In Python 1 and true are equal, in JSON they are not."""

    def create(note):
        """Create an order with further members of its item."""
        item = json.dumps(ITEMS[0])[:-1] + ', "note": ' + note + "}"
        headers = {"Content-Type": "application/json", "Idempotency-Key": "k"}
        body = f'{{"items": [{item}]}}'
        return ada.call("POST", "/orders/", content=body, headers=headers)

    created = create(first)
    replayed = create(again)

    assert created.status_code == 201
    assert replayed.status_code == code
    if code == 201:
        assert replayed.headers["idempotency-replayed"] == "true"
        assert replayed.json() == created.json()
    else:
        assert replayed.json()["type"] == "/docs#key-reused"


def test_an_unknown_cursor_is_no_end_of_the_list(ada, bob):
    """A client that reads an empty page thinks that it has seen all."""
    mine, other = [ada.order() for _ in range(3)], bob.order()
    unknown = "96d7d433-c31f-458f-80e0-2ca062dff923"
    nil = "00000000-0000-0000-0000-000000000000"

    def page(user, cursor, more=""):
        """Read the page after an order."""
        path = f"/orders/user/{user.id}?cursor={cursor}{more}"
        return user.call("GET", path)

    for cursor in (unknown, nil, other):
        answer = page(ada, cursor)
        assert answer.status_code == 422
        assert answer.json()["type"] == "/docs#unknown-cursor"
    assert page(ada, "x").json()["type"] == "/docs#invalid"
    assert [order["id"] for order in page(ada, mine[1]).json()] == mine[:1]
    assert page(ada, mine[0]).json() == []
    # An order that has left a status is still a place in its list.
    ada.change(mine[1], "PAID")
    pending = page(ada, mine[1], "&status=PENDING").json()
    assert [order["id"] for order in pending] == mine[:1]
