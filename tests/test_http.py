"""What is around every call: methods, slashes, budgets, errors, limits."""

import contextlib
import json
import re
import socket
import string
import time
from http import HTTPStatus
from urllib.parse import urljoin

import pytest
from conftest import ITEMS, PASSWORD, User, replace
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from orders import models
from orders.api import create_app
from orders.middleware import client_of
from orders.models import ORDER_FORM
from orders.problems import REFUSALS
from orders.service import OrderService

UNKNOWN = "96d7d433-c31f-458f-80e0-2ca062dff923"  # of the examples
PROBLEM = "application/problem+json"
PENDING = f'"PENDING.{ORDER_FORM}"'  # the ETag of a new order
PAID = f'"PAID.{ORDER_FORM}"'
BUDGET = [f"x-ratelimit-{part}" for part in ("limit", "remaining", "reset")]
VARYING = {"date", "x-request-id", "x-cache", "x-ratelimit-remaining"}
OPEN = ["/health", "/ready", "/docs", "/docs/oauth2-redirect", "/redoc"]
OPEN += ["/openapi.json", "/docs-assets/favicon.png", "/", "/favicon.ico"]


@pytest.fixture
def settings(embedded):
    """Run embedded: no server changes what is around a call."""
    return embedded


def limited(settings, limit="5/minute", **options):
    """Return a client of an app with a limit."""
    app = create_app(replace(settings, rate_limit=limit))
    return TestClient(app, follow_redirects=False, **options)


# --- Methods and addresses --------------------------------------------------


def same_but_for_the_body(get, head):
    """Compare the answers to a GET and a HEAD."""
    assert head.status_code == get.status_code
    assert head.content == b""
    assert {k: v for k, v in head.headers.items() if k not in VARYING} == {
        k: v for k, v in get.headers.items() if k not in VARYING
    }
    assert head.headers["content-length"] == str(len(get.content))


@pytest.mark.parametrize("path", [*OPEN, "/nowhere", "/orders/", "/token/"])
def test_head_is_get_without_the_body(client, path):
    """RFC 9110, 9.1: every GET address takes it, errors included."""
    client.follow_redirects = False

    same_but_for_the_body(client.get(path), client.head(path))


def test_head_of_an_order_is_get_without_the_body(ada, bob):
    """The token, the owner and the validators count as they do for GET."""
    order_id = ada.order()

    for path in (
        f"/orders/{order_id}",
        f"/orders/{order_id}/events",
        f"/orders/user/{ada.id}",
        f"/orders/user/{ada.id}?limit=0",
    ):
        get, head = ada.call("GET", path), ada.call("HEAD", path)
        same_but_for_the_body(get, head)
        get, head = bob.call("GET", path), bob.call("HEAD", path)
        same_but_for_the_body(get, head)
    known = {"If-None-Match": ada.get(order_id).headers["etag"]}
    unchanged = ada.call("HEAD", f"/orders/{order_id}", headers=known)
    assert unchanged.status_code == 304


@pytest.mark.parametrize(
    "form",
    ["{}", "{{{}}}", "urn:uuid:{}", "{}x", "x{}", " {}", "{}%00", "1_{}", ""],
)
def test_the_hot_read_takes_and_refuses_what_other_routes_do(ada, form):
    """It reads its own parameters, and leaves to FastAPI what is no id."""
    order_id = ada.order()
    for text in (order_id, order_id.upper(), order_id.replace("-", "")):
        path = f"/orders/{form.format(text) or 'nothing'}"
        for token in ("", "Basic x", "Bearer", "Bearer x", "bearer", None):
            headers = {"Authorization": token}
            if token is None:
                headers = ada.headers
            read = ada.client.get(path, headers=headers)
            events = ada.client.get(f"{path}/events", headers=headers)

            assert read.status_code == events.status_code
            authenticate = events.headers.get("www-authenticate")
            assert read.headers.get("www-authenticate") == authenticate
            if read.status_code != 200:
                assert read.json() == events.json()


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        *((path, {"GET", "HEAD"}) for path in OPEN),
        (f"/orders/{UNKNOWN}", {"GET", "HEAD", "PATCH"}),
        (f"/orders/{UNKNOWN}/", {"GET", "HEAD", "PATCH"}),
        (f"/orders/{UNKNOWN}/events", {"GET", "HEAD"}),
        ("/orders/user/1", {"GET", "HEAD"}),
        ("/orders", {"POST"}),
        ("/orders/", {"POST"}),
        ("/register", {"POST"}),
        ("/token", {"POST"}),
    ],
)
def test_a_wrong_method_is_told_which_are_right(client, path, allowed):
    """RFC 9110, 15.5.6: `Allow` names all of an address, HEAD included."""
    for method in ("DELETE", "PUT", "TRACE", "BREW"):
        answer = client.request(method, path)
        assert answer.status_code == 405
        assert set(answer.headers["allow"].split(", ")) == allowed
        assert answer.headers["content-type"] == PROBLEM


def test_a_slash_at_the_end_makes_no_difference(settings):
    """No redirect, and one call of the budget."""
    account = {"email": "ada@example.com", "password": PASSWORD}
    form = {"username": "ada@example.com", "password": PASSWORD}
    with limited(settings, "9/minute") as client:
        registered = client.post("/register", json=account)
        token = client.post("/token", data=form)
        headers = {"Authorization": f"Bearer {token.json()['access_token']}"}
        created = client.post(
            "/orders", json={"items": ITEMS}, headers=headers
        )
        location = created.headers["location"]
        read = [
            client.get(f"{path}{slash}", headers=headers)
            for path in (location, f"{location}/events", "/orders/user/1")
            for slash in ("", "/")
        ]

    codes = [a.status_code for a in (registered, token, created, *read)]
    assert codes == [201, 200, 201, *[200] * 6]
    assert read[-1].headers["x-ratelimit-remaining"] == "0"
    assert token.headers["cache-control"] == "no-store"


def test_references_are_relative(ada):
    """The Host header, which anybody writes, is repeated nowhere."""
    ada.order()
    for host in ("evil.example", "evil.example:x", "[::1", "a b", "é"):
        named = {"Host": host.encode()}
        created = ada.create(headers=named)
        page = ada.call(
            "GET",
            f"/orders/user/{ada.id}?limit=1&status=PENDING"
            "&x=%0d%0a%3E%E2%82%AC",
            headers=named,
        )
        path, query = re.fullmatch(
            r'<([^?>]*)\?([^>]*)>; rel="next"', page.headers["link"]
        ).groups()

        assert created.headers["location"].startswith("/orders/")
        assert path == f"/orders/user/{ada.id}"
        assert "limit=1&status=PENDING" in query
        assert ada.call("GET", f"{path}?{query}").status_code == 200


def test_a_browser_is_led_to_the_docs_for_nothing(settings):
    """`/` and the icon cost nothing of the budget."""
    with limited(settings, "1/minute") as client:
        for _ in range(3):
            root, icon = client.get("/"), client.get("/favicon.ico")
            docs = client.get(urljoin("/", root.headers["location"]))
            image = client.get(urljoin("/", icon.headers["location"]))
        counted = client.get("/orders/user/1")
        refused = client.get("/orders/user/1")

    assert urljoin("/", root.headers["location"]) == "/docs"
    assert (docs.status_code, image.status_code) == (200, 200)
    assert image.headers["content-type"].startswith("image/")
    assert counted.status_code == 401
    assert refused.status_code == 429
    assert "`RATE_LIMIT=`" in client.app.description
    assert "1/minute" in client.app.description


# --- The budget -------------------------------------------------------------


def test_every_counted_answer_says_what_is_left(settings):
    """Also those that are refused; what is free says nothing."""
    with limited(settings) as client:
        moment = time.time()
        answers = [
            client.get("/nowhere"),
            client.delete("/orders"),
            client.post("/orders", content=b"x" * 70_000),
            client.head("/orders/user/1"),
            client.post("/register", json={}),
            client.get("/nowhere"),
        ]
        free = client.get("/health")

    codes = [answer.status_code for answer in answers]
    left = [answer.headers["x-ratelimit-remaining"] for answer in answers]
    assert codes == [404, 405, 413, 401, 422, 429]
    assert left == ["4", "3", "2", "1", "0", "0"]
    for answer in answers:
        assert answer.headers["x-ratelimit-limit"] == "5"
        reset = int(answer.headers["x-ratelimit-reset"])
        assert moment <= reset <= moment + 62
    assert not set(BUDGET) & set(free.headers)


@pytest.mark.parametrize("mode", ["embedded", "production"])
def test_the_tightest_limit_speaks(mode, request):
    """Of several limits that which the client meets first."""
    settings = request.getfixturevalue(mode)
    with limited(settings, "4/second;3/minute;100/hour") as client:
        # Until Redis is trusted calls are counted in memory.
        while client.get("/ready").json()["status"] != "ok":
            time.sleep(0.05)
        answers = [client.get("/nowhere") for _ in range(4)]

    assert [a.headers["x-ratelimit-limit"] for a in answers] == ["3"] * 4
    assert [a.headers["x-ratelimit-remaining"] for a in answers] == [*"2100"]
    assert answers[-1].status_code == 429
    assert "3 per 1 minute" in answers[-1].json()["detail"]


def test_without_a_limit_nothing_is_said_of_one(client):
    """Empty turns it off."""
    assert not set(BUDGET) & set(client.get("/nowhere").headers)


@pytest.mark.parametrize(
    ("one", "other", "code"),
    [
        ("2001:db8::1", "2001:db8:0:0:ffff::2", 429),
        ("2001:db8::1", "2001:db8:0:1::1", 404),
        ("192.0.2.1", "::ffff:192.0.2.1", 429),
        ("192.0.2.1", "192.0.2.2", 404),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", 404),
        ("fe80::1%eth0", "fe80::2%eth0", 429),
    ],
)
def test_an_ipv6_network_has_one_budget(settings, one, other, code):
    """A client has a /64 to itself; an IPv4 address is one in any form."""
    app = create_app(replace(settings, rate_limit="1/minute"))

    answers = [
        TestClient(app, client=(address, 5)).get("/nowhere")
        for address in (one, one, other)
    ]

    assert [a.status_code for a in answers] == [404, 429, code]


@given(st.text() | st.ip_addresses().map(str))
@example("::%")
@example("fe80::1%" + "x" * 300)
def test_any_address_has_a_budget(address):
    """A proxy may write anything into X-Forwarded-For."""
    assert len(client_of(address)) <= max(len(address), 43)


# --- Errors -----------------------------------------------------------------


def is_problem(answer, kind):
    """Check the members of RFC 9457; return the whole."""
    problem = answer.json()
    assert answer.headers["content-type"] == PROBLEM
    assert problem["type"] == (f"/docs#{kind}" if kind else "about:blank")
    assert problem["status"] == answer.status_code
    assert problem["title"] == HTTPStatus(answer.status_code).phrase
    assert problem["detail"]
    return problem


def test_every_refusal_is_a_problem_of_its_kind(settings, ada, monkeypatch):
    """RFC 9457; `detail` stays what FastAPI's own clients expect."""
    client, key = ada.client, {"Idempotency-Key": "k"}
    order = f"/orders/{ada.order()}"
    ada.create(headers=key)
    account = {"email": "ada@example.com", "password": PASSWORD}
    wrong = {"username": "ada@example.com", "password": "wrong"}
    large = {"Content-Type": "application/json"}
    answers = {
        "unauthorized": client.get(order),
        "wrong-password": client.post("/token/", data=wrong),
        "forbidden": ada.call("GET", "/orders/user/77"),
        "order-not-found": ada.get(UNKNOWN),
        "email-taken": client.post("/register/", json=account),
        "transition-forbidden": ada.call(
            "PATCH", order, json={"status": "SHIPPED"}
        ),
        "precondition-failed": ada.call(
            "PATCH", order, json={"status": "PAID"}, headers={"If-Match": "x"}
        ),
        "key-reused": ada.create([{**ITEMS[0], "name": "x"}], headers=key),
        "unknown-cursor": ada.call(
            "GET", f"/orders/user/{ada.id}?cursor={UNKNOWN}"
        ),
        "invalid": client.post("/register/", json={}),
    }
    shop = create_app(replace(settings, staff_user_ids="77"))
    with TestClient(shop) as staffed:
        answers["staff-only"] = staffed.patch(
            order, json={"status": "PAID"}, headers=ada.headers
        )
    with limited(settings, "1/hour") as strict:
        strict.get("/nowhere")
        answers["too-many-calls"] = strict.get("/nowhere")
    plain = [
        client.get("/nowhere"),
        client.delete("/orders"),
        ada.call("POST", "/orders", content=b"x" * 70_000, headers=large),
        ada.call("POST", "/orders", content=b"{", headers=large),
    ]
    monkeypatch.delattr(OrderService, "get")
    plain.append(ada.get(UNKNOWN))

    for kind, answer in answers.items():
        is_problem(answer, kind)
        assert f"| {kind} |" in client.app.openapi_tags[-1]["description"]
    kinds = [is_problem(answer, "")["status"] for answer in plain[:3]]
    assert kinds == [404, 405, 413]
    assert is_problem(plain[-1], "")["status"] == 500
    assert plain[3].status_code in (400, 422)
    assert plain[3].headers["content-type"] == PROBLEM
    # See test_loads.py for the rest.
    assert {*REFUSALS} - {*answers} <= {"overloaded", "database-away"}


def test_a_forbidden_change_says_where_the_order_is(ada):
    """Who repeats a PATCH whose answer was lost sees that it worked."""
    order_id = ada.order()
    ada.change(order_id, "PAID")

    again, back = (ada.change(order_id, to) for to in ("PAID", "PENDING"))
    ada.change(order_id, "SHIPPED")
    final = ada.change(order_id, "PAID")

    for answer in (again, back):
        assert answer.status_code == 409
        assert answer.json()["current"] == "PAID"
        assert sorted(answer.json()["allowed"]) == ["CANCELED", "SHIPPED"]
    assert final.json()["current"] == "SHIPPED"
    assert final.json()["allowed"] == []


def test_a_missing_content_type_is_named(client, ada):
    """JSON is sent to forms, and without its header."""
    body = json.dumps({"items": ITEMS})
    login = {"username": "ada@example.com", "password": PASSWORD}

    bare = ada.call("POST", "/orders/", content=body)
    as_form = client.post("/token/", json=login)
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    order_as_form = ada.call("POST", "/orders/", content=body, headers=form)

    for answer, wanted in (
        (bare, "application/json"),
        (order_as_form, "application/json"),
        (as_form, "application/x-www-form-urlencoded"),
    ):
        first = is_problem(answer, "invalid")["detail"][0]
        assert first["loc"] == ["header", "Content-Type"]
        assert wanted in first["msg"]
        assert PASSWORD not in answer.text


@pytest.mark.parametrize(
    "kind", ["Application/JSON", "application/vnd.api+json; charset=utf-8"]
)
def test_a_good_content_type_is_not_blamed(ada, kind):
    """However it is written; what is wrong stands in the body."""
    body = json.dumps({"items": [{**ITEMS[0], "quantity": 0}]})

    answer = ada.call(
        "POST", "/orders/", content=body, headers={"Content-Type": kind}
    )

    [fault] = is_problem(answer, "invalid")["detail"]
    assert fault["loc"][-1] == "quantity"


def test_a_500_can_be_reported_and_read(settings, monkeypatch, caplog):
    """It has the id that is in the log, and a browser may read it."""
    app = create_app(settings)
    with TestClient(app) as client:
        user = User(client, "ada@example.com")
        monkeypatch.delattr(OrderService, "get")
        headers = {"Origin": "https://x.example", "X-Request-ID": "report-1"}
        answer = user.get(UNKNOWN, headers=headers)

    assert answer.status_code == 500
    assert answer.headers["x-request-id"] == "report-1"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["access-control-expose-headers"] == "*"
    assert answer.headers["x-content-type-options"] == "nosniff"
    (logged,) = [r for r in caplog.records if r.exc_info]
    assert "OrderService" in str(logged.exc_info[1])


PREFLIGHT = {
    "Origin": "https://x.example",
    "Access-Control-Request-Method": "PATCH",
    "Access-Control-Request-Headers": "authorization, if-match",
}


def test_every_answer_forbids_to_guess_its_type(settings, monkeypatch):
    """`nosniff`, and a request id, whatever the status."""
    with limited(settings, "12/hour") as client:
        user = User(client, "ada@example.com")
        order_id = user.order()
        tag = {"If-None-Match": PENDING}
        answers = [
            *(client.get(path) for path in OPEN),
            user.get(order_id),
            user.get(order_id, headers=tag),
            client.get(f"/orders/{order_id}"),
            client.get("/nowhere"),
            client.delete("/orders"),
            client.post("/orders", content=b"x" * 70_000),
            client.post("/register", json={}),
            client.options("/orders", headers=PREFLIGHT),
            client.options(
                "/orders",
                headers=PREFLIGHT
                | {"Access-Control-Request-Method": "DELETE"},
            ),
        ]
        monkeypatch.delattr(OrderService, "get")
        answers.append(user.get(order_id))
        answers.append(client.get("/nowhere"))
        answers.append(client.get("/nowhere"))

    codes = {answer.status_code for answer in answers}
    assert codes == {200, 307, 304, 400, 401, 404, 405, 413, 422, 429, 500}
    for answer in answers:
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
        assert len(answer.headers.get_list("x-request-id")) == 1


def test_a_browser_may_read_what_it_needs(client):
    """CORS exposes the headers, and a preflight allows the methods."""
    origin = {"Origin": "https://x.example"}

    answer = client.get("/nowhere", headers=origin)
    preflight = client.options("/orders", headers=PREFLIGHT)

    # All that there are: the token is no credential in the sense of CORS.
    assert answer.headers["access-control-expose-headers"] == "*"
    assert "access-control-allow-credentials" not in answer.headers
    assert preflight.status_code == 200
    methods = preflight.headers["access-control-allow-methods"]
    assert {"GET", "HEAD", "POST", "PATCH"} <= {*methods.split(", ")}


# --- Validators and caching -------------------------------------------------


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (PENDING, 200),
        (f'"x", {PENDING}', 200),
        (f'"x",{PENDING}', 200),
        ("*", 200),
        (f"W/{PENDING}", 412),
        (PENDING.strip('"'), 412),
        ("PENDING", 412),
        ('"PENDING"', 412),
        ('"PENDING.1"', 412),
        (PAID, 412),
        (PENDING.lower(), 412),
        (PENDING.replace('"', "'"), 412),
        (PENDING[:-1], 412),
        # Malformed: the asterisk stands alone.
        ('"x", *', 412),
        (f"*, {PENDING}", 412),
        ('*, "x"', 412),
        ("**", 412),
        ('"*"', 412),
        ("", 412),
        ('"é"', 412),
    ],
)
def test_if_match_compares_strongly(ada, header, code):
    """RFC 9110, 13.1.1: weak or unquoted tags match nothing."""
    order_id = ada.order()
    headers = {"If-Match": header.encode()}

    answer = ada.call(
        "PATCH",
        f"/orders/{order_id}",
        json={"status": "PAID"},
        headers=headers,
    )

    assert answer.status_code == code
    expected = "PAID" if code == 200 else "PENDING"
    assert ada.get(order_id).json()["status"] == expected


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (PENDING, 304),
        (f"W/{PENDING}", 304),
        (f'"x", W/{PENDING}', 304),
        ("*", 304),
        ('"PENDING"', 200),
        (PENDING.strip('"'), 200),
        (PAID, 200),
        ('"x", *', 200),
    ],
)
def test_if_none_match_compares_weakly(ada, header, code):
    """RFC 9110, 13.1.2; the answer may be kept, and is asked for again."""
    order_id = ada.order()

    for _ in range(2):  # a miss, then a hit
        answer = ada.get(order_id, headers={"If-None-Match": header})
        assert answer.status_code == code
        assert answer.headers["cache-control"] == "private, no-cache"
        assert answer.headers["etag"] == PENDING


def test_a_new_form_of_an_order_is_a_new_tag(ada, monkeypatch):
    """Who knows the old form gets the new one, not a 304."""
    order_id = ada.order()
    old = ada.get(order_id).headers["etag"]
    monkeypatch.setattr(models, "ORDER_FORM", "other")

    answer = ada.get(order_id, headers={"If-None-Match": old})

    assert answer.status_code == 200
    assert answer.headers["etag"] != old


def test_an_order_is_kept_by_nobody_else(ada):
    """`private, no-cache` beside the tag, on each of its answers."""
    created = ada.create()
    order_id = created.json()["id"]
    read, changed = ada.get(order_id), ada.change(order_id, "PAID")

    for answer in (created, read, changed):
        assert answer.headers["cache-control"] == "private, no-cache"
        assert answer.headers["etag"]


# --- Whatever is sent -------------------------------------------------------

HEADERS = st.sampled_from(
    [
        *("Authorization", "Content-Type", "Content-Length", "Host"),
        *("If-Match", "If-None-Match", "Idempotency-Key", "Origin"),
        *("X-Request-ID", "X-Forwarded-For", "Access-Control-Request-Method"),
        *("Expect", "Range", "Accept-Encoding", "Transfer-Encoding"),
    ]
)
PATHS = st.sampled_from(
    [
        *("/orders", "/orders/", "/register", "/token/", "/health", "/"),
        *(f"/orders/{UNKNOWN}", f"/orders/{UNKNOWN}/events"),
        *("/orders/user/1", "/orders/user/", "//", "/orders//", "/%00"),
        *("/orders/user/1?limit=%FF", "/orders/user/1?cursor=%00", "/%E2%82"),
        *("/docs-assets/../orders", "/docs-assets/%2e%2e%2fx", "*"),
        *("/docs-assets/%00", "/docs-assets/" + "a" * 300),
    ]
)


@given(
    method=st.sampled_from(["GET", "HEAD", "POST", "PATCH", "OPTIONS", "X"]),
    path=PATHS,
    headers=st.dictionaries(
        HEADERS,
        st.text(max_size=40).map(lambda text: text.encode())
        | st.sampled_from([b"9" * 5000, b"-1", b"application/json", b"*"]),
    ),
    body=st.binary(max_size=200)
    | st.from_regex(
        r'\{"items": \[.*', alphabet=st.characters(codec="ascii")
    ).map(str.encode),
)
@examples(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_call_is_a_500(ada, method, path, headers, body):
    """Any method, address, headers and body: an answer, and a sane one."""
    headers = {"Authorization": ada.headers["Authorization"]} | headers

    answer = ada.client.request(
        method, path, headers=headers, content=body, follow_redirects=False
    )

    assert answer.status_code < 500, answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"
    if answer.status_code >= 400 and answer.headers["content-type"] != (
        "text/plain; charset=utf-8"  # a preflight's
    ):
        assert answer.headers["content-type"] == PROBLEM or method == "HEAD"


KEYS = st.sampled_from(
    [
        *("email", "password", "items", "status", "total_price", "name"),
        *("quantity", "price", "__pydantic_self__", "cls", "self", "\ud800"),
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.floats()
    | st.integers(-(10**400), 10**400)
    | st.text(st.characters(), max_size=20)  # lone surrogates too
    | st.sampled_from(["ada@example.com", "PAID", 1, 0.01, "x" * 300])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=15,
)
ITEM = st.fixed_dictionaries(
    {"name": SCALARS, "quantity": SCALARS, "price": SCALARS},
    optional={"note": VALUES, "cls": VALUES, "\0": SCALARS},
)
ORDER = st.fixed_dictionaries(
    {"items": st.lists(ITEM, max_size=2)}, optional={"total_price": SCALARS}
)


@given(
    path=st.sampled_from(["/orders", "/register", "*"]), body=VALUES | ORDER
)
@examples(
    max_examples=200, deadline=None, suppress_health_check=list(HealthCheck)
)
def test_no_json_is_a_500(ada, path, body):
    """Any tree of any values: taken, or refused where it is wrong."""
    method = "POST" if path != "*" else "PATCH"
    if path == "*":
        path = f"/orders/{ada.order()}"

    answer = ada.call(
        method,
        path,
        content=json.dumps(body),
        headers={"Content-Type": "application/json"},
    )

    assert answer.status_code in (200, 201, 400, 409, 413, 422)


@given(st.text(st.characters(codec="utf-8"), max_size=200))
@examples(
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(string.printable)
@example("\r\nX-Evil: 1")
def test_a_request_id_injects_nothing(client, text):
    """It is repeated when it is printable, or replaced."""
    answer = client.get("/health", headers={"X-Request-ID": text.encode()})

    assert re.fullmatch(r"[!-~]{1,128}", answer.headers["x-request-id"])
    assert "x-evil" not in answer.headers


# --- Whatever comes through a socket ----------------------------------------

END = "\r\n\r\n"
CALL = "POST /orders HTTP/1.1\r\nHost: x\r\n"
RAW = [
    "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # a TLS client
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    f"GET /{END}",
    f"GET / HTTP/9.9{END}",
    f"GET http://evil.example/orders/user/1 HTTP/1.1{END}",
    f"CONNECT evil.example:80 HTTP/1.1{END}",
    f"OPTIONS * HTTP/1.1{END}",
    f"GET /\x80\xff HTTP/1.1{END}",
    f"GET /%00%ff%c0%ae HTTP/1.1{END}",
    f"GET /{'a' * 60_000} HTTP/1.1{END}",
    f"GET /orders/user/1?{'a=1&' * 10_000} HTTP/1.1{END}",
    f"GET / HTTP/1.1\r\nno colon{END}",
    f"GET / HTTP/1.1\r\nX\x00: y{END}",
    "GET / HTTP/1.1\nHost: x\n\n",
    f"GET / HTTP/1.1\r\nX-Request-ID: a\r\nX-Request-ID: b{END}",
    f"GET / HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA=={END}",
    f"GET / HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade{END}",
    f"{CALL}Content-Length: -1{END}",
    f"{CALL}Content-Length: {'9' * 5000}{END}",
    f"{CALL}Content-Length: 1\r\nContent-Length: 2{END}xx",
    f"{CALL}Content-Length: 3\r\nTransfer-Encoding: chunked{END}0{END}",
    f"{CALL}Transfer-Encoding: chunked{END}FFFFFFFFFFFFFFFFFF\r\nx",
    f"{CALL}Transfer-Encoding: chunked{END}-1\r\nx\r\n",
    f"{CALL}Transfer-Encoding: gzip{END}",
    f"{CALL}Content-Encoding: gzip\r\nContent-Length: 2{END}{{}}",
    f"{CALL}Expect: 100-continue\r\nContent-Length: 70000{END}",
    f"{CALL}Authorization: Bearer \xe9\xff{END}",
    f"{CALL}Authorization: {'Bearer ' * 5000}{END}",
    f"{CALL}Content-Type: application/json; charset=\xff"
    f"\r\nContent-Length: 2{END}{{}}",
    f"{CALL}Content-Type: multipart/form-data\r\nContent-Length: 2{END}--",
    f"POST /token HTTP/1.1\r\nContent-Type: multipart/form-data;"
    f" boundary=x\r\nContent-Length: 9{END}--x\r\nbad\r\n",
    f"POST /token HTTP/1.1\r\nContent-Type:"
    f" application/x-www-form-urlencoded\r\nContent-Length: 4000{END}"
    + "&="
    * 2000,
    f"POST /token HTTP/1.1\r\nContent-Type:"
    f" application/x-www-form-urlencoded\r\nContent-Length: 44{END}"
    "username=%ED%A0%80%00&password=%FF%00%ED%A0%80",
]


def exchange(port, data, timeout=0.15):
    """Return what is answered to bytes, until nothing more comes.

    Our side stays open: uvicorn drops the calls of a client that is gone.
    """
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        answer = b""
        with contextlib.suppress(OSError):
            connection.sendall(data)
            while part := connection.recv(65_536):
                answer += part
        return answer


def is_sane(answer):
    """Check that each status in an answer is no fault of the service."""
    codes = re.findall(rb"^HTTP/1\.[01] (\d{3}) ", answer, re.M)
    assert all(code < b"500" for code in codes), answer


@pytest.mark.parametrize("text", RAW, ids=range(len(RAW)))
def test_no_bytes_are_a_500(server, text):
    """Malformed calls are refused, and the next caller is served."""
    is_sane(exchange(server.port, text.encode("latin-1")))

    health = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert b" 200 OK" in exchange(server.port, health, 5)
    assert "Traceback" not in server.text()


@given(
    st.lists(
        st.sampled_from([*RAW, CALL, END, "\r\n", "GET ", "0\r\n", "{"])
        | st.text(st.characters(max_codepoint=255), max_size=20),
        max_size=6,
    ).map("".join)
)
@examples(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_no_mixture_of_bytes_is_a_500(server, text):
    """Half calls, two calls in one, and what is between them."""
    is_sane(exchange(server.port, text.encode("latin-1")))

    assert "Traceback" not in server.text()


def test_a_connection_goes_on_after_a_head(server):
    """The next answer begins where a GET's body would have been."""
    calls = (
        b"HEAD /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
        b"HEAD /docs-assets/favicon.png HTTP/1.1\r\nHost: x\r\n\r\n"
        b"HEAD /nowhere HTTP/1.1\r\nHost: x\r\n\r\n"
        b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )

    *heads, body = exchange(server.port, calls, 5).split(b"\r\n\r\n")

    assert [head.split()[1] for head in heads] == [
        *(b"200", b"200", b"404", b"200")
    ]
    sizes = [
        int(re.search(rb"content-length: (\d+)", head)[1]) for head in heads
    ]
    assert sizes[0] > 10_000
    assert min(sizes[1:3]) > 50
    assert body == b'{"status":"ok"}'
