"""Every row of the endpoint table, in both modes."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import jwt
import pytest
import servers
from conftest import ITEMS, PASSWORD, User, replace
from fastapi.testclient import TestClient
from hypothesis import example, given
from hypothesis import strategies as st

from orders.api import create_app
from orders.auth import EMAIL
from orders.models import ORDER_FORM, TRANSITIONS, OrderStatus
from orders.service import OrderService

UNKNOWN = "96d7d433-c31f-458f-80e0-2ca062dff923"  # of the examples
INVALID = 'Bearer error="invalid_token"'


def register(client, email, password=PASSWORD):
    """Register and return the answer."""
    return client.post(
        "/register/", json={"email": email, "password": password}
    )


def test_register_answers_the_user_without_the_password(client):
    """A registration shows id and e-mail only."""
    answer = register(client, "ada@example.com")

    assert answer.status_code == 201
    assert answer.json() == {"id": 1, "email": "ada@example.com"}


@pytest.mark.parametrize(
    "again", ["ada@example.com", "ADA@Example.COM", "\uff41da@example.com"]
)
def test_an_email_is_taken_in_any_spelling(client, again):
    """Case and Unicode form make no new user."""
    register(client, "ada@example.com")

    answer = register(client, again)

    assert answer.status_code == 409
    assert "log in" in answer.json()["detail"]


def test_a_letterlike_address_is_the_plain_one(client):
    """What NFKC and case folding make of each other is one user."""
    register(client, "\u210bi@example.com")

    answer = register(client, "hi@example.com")
    form = {"username": "\u210bI@example.com", "password": PASSWORD}

    assert answer.status_code == 409
    assert client.post("/token/", data=form).status_code == 200


LOCAL = st.text(min_size=1, max_size=20)
DOMAIN = st.text(min_size=1, max_size=10).map(lambda text: f"{text}.com")


@given(st.builds("{}@{}".format, LOCAL, DOMAIN | st.just("example.com")))
@example("\u0345\u0345a@example.com")
@example("\u1e9e@\u1e9e.com")
@example("\u03b1\u0345\u0301@example.com")
@example("A@xn--fiqs8s.com")
def test_a_second_pass_changes_no_address(address):
    """Or else one user could have two forms."""
    try:
        once = EMAIL.validate_python(address)
    except ValueError:
        return

    assert EMAIL.validate_python(once) == once
    assert len(once) <= 254


# U+FDFA is 18 characters in NFKC.
@pytest.mark.parametrize(
    "email", ["\ufdfa" * 14 + "@example.com", "a@" + "\ufdfa" * 14 + ".com"]
)
def test_an_address_that_grows_too_long_is_refused(client, email):
    """It is measured in the form in which it is kept."""
    form = {"username": email, "password": PASSWORD}

    assert len(email) < 254
    assert register(client, email).status_code == 422
    assert client.post("/token/", data=form).status_code == 401


def test_racing_registrations_make_one_user(client):
    """The unique column decides a race, without a 500."""
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(
            lambda _: register(client, "ada@example.com"), range(8)
        )

    assert sorted(a.status_code for a in answers) == [201] + [409] * 7


@pytest.mark.parametrize(
    "account",
    [
        {"email": "nobody", "password": PASSWORD},
        {"email": "a" * 10_000 + "@example.com", "password": PASSWORD},
        {"email": "nul\0@example.com", "password": PASSWORD},
        {"email": "ada@example.com", "password": "seven77"},
        {"email": "ada@example.com", "password": "x" * 129},
        {"email": "ada@example.com"},
        [],
    ],
)
def test_a_bad_registration_is_refused_without_an_echo(client, account):
    """The answer never repeats a password."""
    answer = client.post("/register/", json=account)

    assert answer.status_code == 422
    for secret in (PASSWORD, "seven77", "x" * 129):
        assert secret not in answer.text


def test_login_answers_a_bearer_token(client, ada):
    """The token response is OAuth2's."""
    form = {"username": "ADA@example.com", "password": PASSWORD}

    answer = client.post("/token/", data=form)

    assert answer.status_code == 200
    assert answer.json()["token_type"] == "bearer"
    assert answer.json()["expires_in"] == 30 * 60
    assert answer.json()["user_id"] == ada.id
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize("field", ["username", "password"])
@pytest.mark.parametrize("charset", ["unicode_escape", "utf-7", "utf-16"])
def test_a_login_in_a_strange_character_set_is_refused(client, field, charset):
    """A client names it; the text may be half of a character then."""
    form = {"username": "ada@example.com", "password": PASSWORD}
    form[field] = "\\ud800"
    parts = [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}'
        for name, text in form.items()
    ]
    kind = f"multipart/form-data; boundary=x; charset={charset}"

    answer = client.post(
        "/token/",
        content="\r\n".join([*parts, "--x--\r\n"]),
        headers={"Content-Type": kind},
    )

    assert answer.status_code in (400, 401, 422)


@pytest.mark.parametrize("username", ["ada@example.com", "x@y.zz", "\0", "no"])
def test_a_failed_login_looks_the_same_for_everybody(client, ada, username):
    """Nobody learns who is registered."""
    form = {"username": username, "password": "wrong password"}

    answer = client.post("/token/", data=form)

    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["detail"] == "Incorrect e-mail or password"
    assert answer.json()["error"] == "invalid_grant"
    assert answer.headers["cache-control"] == "no-store"


def token(settings, **claims):
    """Return a token with these claims, signed with the service's key."""
    return jwt.encode(claims, settings.jwt_secret_key, algorithm="HS256")


@pytest.mark.parametrize(
    "claims",
    [
        {"sub": "1", "exp": 1},
        {"sub": "1"},
        {"exp": 2**40},
        {"sub": "x", "exp": 2**40},
        {"sub": "9" * 30, "exp": 2**40},
        {"sub": "-1", "exp": 2**40},
    ],
)
def test_a_senseless_token_is_refused(client, settings, claims):
    """Expired, endless, nameless and out-of-range tokens are no tokens."""
    header = f"Bearer {token(settings, **claims)}"

    answer = client.get(
        f"/orders/{UNKNOWN}", headers={"Authorization": header}
    )

    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == INVALID


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer x.y.z", "Basic x"])
def test_a_call_without_a_token_is_refused(client, header):
    """Every protected call asks for a token."""
    for method, path in [
        ("POST", "/orders/"),
        ("GET", f"/orders/{UNKNOWN}"),
        ("PATCH", f"/orders/{UNKNOWN}"),
        ("GET", f"/orders/{UNKNOWN}/events"),
        ("GET", "/orders/user/1"),
    ]:
        answer = client.request(
            method,
            path,
            headers={"Authorization": header},
            json={"status": "PAID", "items": ITEMS},
        )
        assert answer.status_code == 401, path
        challenge = INVALID if header == "Bearer x.y.z" else "Bearer"
        assert answer.headers["www-authenticate"] == challenge


def test_a_token_of_a_user_who_is_gone_creates_nothing(client, settings):
    """The foreign key notices."""
    ghost = token(settings, sub="77", exp=2**40)
    headers = {"Authorization": f"Bearer {ghost}"}

    answer = client.post("/orders/", json={"items": ITEMS}, headers=headers)

    assert answer.status_code == 401


def test_create_answers_the_order(client, ada):
    """The total is exact, the location leads to the order."""
    items = [{"name": "tea", "quantity": 3, "price": 0.1, "gift": {"to": "é"}}]

    answer = ada.create(items)

    order = answer.json()
    assert answer.status_code == 201
    assert answer.headers["location"] == f"/orders/{order['id']}"
    assert answer.headers["etag"] == f'"PENDING.{ORDER_FORM}"'
    assert order["total_price"] == 0.3
    assert order["items"] == items
    assert order["status"] == "PENDING"
    assert order["user_id"] == ada.id
    assert order["created_at"].endswith("Z")
    assert ada.get(order["id"]).json() == order


def item(**changes):
    """Return a good item with some changes."""
    return {"name": "tea", "quantity": 1, "price": 1, **changes}


@pytest.mark.parametrize(
    "body",
    [
        {"items": []},
        {"items": [item()] * 101},
        {"items": [item(quantity=0)]},
        {"items": [item(quantity=10_001)]},
        {"items": [item(quantity=1.5)]},
        {"items": [item(quantity="1")]},
        {"items": [item(quantity=True)]},
        {"items": [item(price=-0.01)]},
        {"items": [item(price=1_000_000.01)]},
        {"items": [item(price=0.001)]},
        {"items": [item(price="1")]},
        {"items": [item(name="")]},
        {"items": [item(name="nul\0")]},
        {"items": [item(note="nul\0")]},
        {"items": [item(**{"nul\0": 1})]},
        {"items": [item()], "total_price": 1.01},
        {"items": [item()], "total_price": "1"},
        {},
        None,
    ],
)
def test_a_senseless_order_is_refused(ada, body):
    """Each answer says what is wrong where."""
    answer = ada.call("POST", "/orders/", json=body)

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["msg"]


# Names of parameters and attributes of SQLModel's, pydantic's and Python's.
NAMES = [
    *("__pydantic_self__", "cls", "self", "data", "__class__", "__dict__"),
    *("__init__", "model_config", "model_fields", "model_extra", "metadata"),
    *("__pydantic_extra__", "__pydantic_fields_set__", "registry", "items"),
    *("_sa_instance_state", "__tablename__", "total", "", "a b", "é"),
]


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_key_is_special(ada, name):
    """A body's key is data: ignored, or kept in an item, never a fault."""
    path = f"/orders/{ada.order()}"
    extra = {name: 1} if name != "items" else {}
    account = {"email": "bob@example.com", "password": PASSWORD}
    odd = {**item(), name: {"x": [1]}}

    alone = [
        ada.call("POST", "/register/", json={name: 1}),
        ada.call("POST", "/orders/", json={name: 1}),
        ada.call("POST", "/orders/", json={"items": [{name: 1}]}),
        ada.call("PATCH", path, json={name: 1}),
    ]
    kept = ada.create([odd])
    beside = [
        ada.call("POST", "/register/", json={**account, **extra}),
        ada.call("POST", "/orders/", json={"items": [item()], **extra}),
        ada.call("PATCH", path, json={"status": "PAID", **extra}),
    ]

    assert [answer.status_code for answer in alone] == [422] * 4
    assert [answer.status_code for answer in beside] == [201, 201, 200]
    assert kept.json()["items"] == [odd]
    assert ada.get(kept.json()["id"]).json()["items"] == [odd]


@pytest.mark.parametrize(
    "text",
    [
        '{"items": [{"name": "x", "quantity": 1, "price": NaN}]}',
        '{"items": [{"name": "x", "quantity": 1, "price": 1e400}]}',
        '{"items": [{"name": "x", "quantity": 1, "price": 1, "y": NaN}]}',
        '{"items": [{"name": "\\ud800", "quantity": 1, "price": 1}]}',
        '{"items": [{"name": "x", "quantity": 1, "price": 1, "\\ud800": 1}]}',
        '{"items": [{"name": "x", "quantity": 1, "price": 1, "y": '
        + "[" * 50
        + "]" * 50
        + "}]}",
        '{"items": ' + "[" * 30_000 + "]" * 30_000 + "}",
        '{"items": [{"name": "x", "quantity": ' + "9" * 5000 + "}]}",
        '{"\\ud800": ',
        '"\\ud800"',
    ],
)
def test_malicious_json_is_refused(ada, text):
    """What JSON, UTF-8 or PostgreSQL cannot hold never is a 500."""
    answer = ada.call(
        "POST",
        "/orders/",
        content=text,
        headers={"Content-Type": "application/json"},
    )

    assert answer.status_code in (400, 422)
    assert answer.json()["detail"]


@pytest.mark.parametrize(
    ("price", "total"), [(0.1 + 0.2, 0.3), (19.99, 19.99), (1_000_000, 1e6)]
)
def test_a_price_is_kept_to_the_cent(ada, price, total):
    """What binary floats add by themselves is no finer price."""
    order = ada.create([item(price=price)]).json()

    assert order["total_price"] == total
    assert order["items"][0]["price"] == total


def test_a_total_that_agrees_is_accepted(ada):
    """A client may send what it expects to pay."""
    body = {"items": [item(price=0.1, quantity=3)], "total_price": 0.3}

    assert ada.call("POST", "/orders/", json=body).status_code == 201


def test_the_largest_order_is_exact(ada):
    """The bounds keep every total exact to the cent."""
    order = ada.create([item(quantity=10_000, price=999_999.99)] * 100).json()

    assert order["total_price"] == 999_999_990_000.0


def test_a_body_over_64_kib_is_refused(ada):
    """The size is limited before the body is read."""
    order = json.dumps({"items": [item(note="x" * 65_536)]}).encode()
    headers = {"Content-Type": "application/json"}

    for content in (order, iter([order])):  # of a known size, and not
        answer = ada.call("POST", "/orders/", content=content, headers=headers)
        assert answer.status_code == 413
        assert "65536 bytes" in answer.json()["detail"]


def test_read_is_cache_first(ada):
    """The first read fills, the second hits, a change misses."""
    order_id = ada.order()

    caches = [ada.get(order_id).headers["x-cache"] for _ in range(2)]
    ada.change(order_id, "PAID")
    after = ada.get(order_id)

    assert caches == ["miss", "hit"]
    assert after.headers["x-cache"] == "miss"
    assert after.json()["status"] == "PAID"


def test_another_users_order_is_not_found(ada, bob):
    """Hits and misses check the owner alike."""
    order_id = ada.order()

    for _ in range(2):
        assert bob.get(order_id).status_code == 404
    assert bob.change(order_id, "PAID").status_code == 404
    assert bob.call("GET", f"/orders/{order_id}/events").status_code == 404
    assert ada.get(order_id).json()["status"] == "PENDING"


def test_an_unknown_order_is_not_found(ada):
    """A UUID that is nobody's is a 404, anything else a 422."""
    assert ada.get(UNKNOWN).status_code == 404
    assert ada.change(UNKNOWN, "PAID").status_code == 404
    assert ada.get("no-uuid").status_code == 422
    assert ada.get("1").status_code == 422


def steps_to(status):
    """Return the changes that bring a new order to a status."""
    if status == OrderStatus.PENDING:
        return []
    before = next(old for old in TRANSITIONS if status in TRANSITIONS[old])
    return [*steps_to(before), status]


@pytest.mark.parametrize("old", OrderStatus)
@pytest.mark.parametrize("new", OrderStatus)
def test_the_state_machine_holds(ada, old, new):
    """Every pair of statuses is allowed or refused as the dict says."""
    order_id = ada.order()
    for step in steps_to(old):
        assert ada.change(order_id, step).status_code == 200

    answer = ada.change(order_id, new)

    if new in TRANSITIONS[old]:
        assert answer.status_code == 200
        assert answer.json()["status"] == new
        assert answer.headers["etag"] == f'"{new}.{ORDER_FORM}"'
    else:
        assert answer.status_code == 409
        allowed = sorted(TRANSITIONS[old]) or ["nothing"]
        assert all(name in answer.json()["detail"] for name in allowed)


def test_racing_changes_have_one_winner(ada):
    """Two changes from the same status cannot both happen."""
    order_id = ada.order()

    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(
            lambda i: ada.change(order_id, ["PAID", "CANCELED"][i % 2]),
            range(8),
        )

    won = [a.json()["status"] for a in answers if a.status_code == 200]
    assert won in (["PAID"], ["CANCELED"], ["PAID", "CANCELED"]) or (
        won == ["CANCELED", "PAID"]
    )
    history = ada.call("GET", f"/orders/{order_id}/events").json()
    assert len(history) == 1 + len(won)


@pytest.mark.parametrize("body", [{"status": "GONE"}, {}, {"status": None}])
def test_an_unknown_status_is_refused(ada, body):
    """Only the four statuses are statuses."""
    path = f"/orders/{ada.order()}"

    assert ada.call("PATCH", path, json=body).status_code == 422


def test_the_list_is_newest_first_and_own_only(ada, bob):
    """Somebody else's list is forbidden."""
    ids = [ada.order() for _ in range(3)]
    bob.order()

    answer = ada.call("GET", f"/orders/user/{ada.id}")

    assert [order["id"] for order in answer.json()] == ids[::-1]
    assert bob.call("GET", f"/orders/user/{ada.id}").status_code == 403
    assert bob.call("GET", f"/orders/user/{10**30}").status_code == 403


def test_pages_meet_every_order_once_while_orders_arrive(ada):
    """A keyset page does not shift."""
    ids = [ada.order() for _ in range(7)]
    met, url = [], f"/orders/user/{ada.id}?limit=3"

    while url:
        answer = ada.call("GET", url)
        met += [order["id"] for order in answer.json()]
        url = answer.links.get("next", {}).get("url")
        ada.order()

    assert met == ids[::-1]


def test_the_list_filters_by_status(ada):
    """Only orders in the wanted status are listed."""
    paid, _ = ada.order(), ada.order()
    ada.change(paid, "PAID")

    answer = ada.call("GET", f"/orders/user/{ada.id}?status=PAID")

    assert [order["id"] for order in answer.json()] == [paid]


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=101", "cursor=x", "cursor=%C3%A9", "status=GONE"],
)
def test_a_senseless_page_is_refused(ada, query):
    """A broken cursor is a 422, not a first page."""
    answer = ada.call("GET", f"/orders/user/{ada.id}?{query}")

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"][0] == "query"


def test_replayed_create_returns_the_first_order(ada, bob):
    """The same key and body make one order; keys are private."""
    key = {"Idempotency-Key": "k-1"}

    first, again = ada.create(headers=key), ada.create(headers=key)

    assert again.status_code == 201
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"
    assert "idempotency-replayed" not in first.headers
    assert bob.create(headers=key).json()["id"] != first.json()["id"]


def test_a_reused_key_with_another_body_is_refused(ada):
    """A key stands for one order."""
    key = {"Idempotency-Key": "k-1"}
    ada.create(headers=key)

    answer = ada.create([item(name="coffee")], headers=key)

    assert answer.status_code == 422


@pytest.mark.parametrize("key", ["", "x" * 256, "a b", "é"])
def test_a_bad_idempotency_key_is_refused(ada, key):
    """A key is 1 to 255 visible ASCII characters."""
    headers = {"Idempotency-Key": key.encode()}

    assert ada.create(headers=headers).status_code == 422


def test_concurrent_creates_with_one_key_make_one_order(ada):
    """Fifty tries end in one order with one event."""
    key = {"Idempotency-Key": "k-1"}

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: ada.create(headers=key), range(50)))

    assert {a.status_code for a in answers} == {201}
    (order_id,) = {a.json()["id"] for a in answers}
    events = ada.call("GET", f"/orders/{order_id}/events").json()
    assert [event["kind"] for event in events] == ["new_order"]


def test_validators_save_reads_and_guard_writes(ada):
    """If-None-Match answers 304, a stale If-Match 412."""
    order_id = ada.order()
    pending = f'"PENDING.{ORDER_FORM}"'

    for _ in range(2):  # a miss, then a hit
        answer = ada.get(order_id, headers={"If-None-Match": pending})
        assert answer.status_code == 304
        assert answer.headers["etag"] == pending
        assert answer.content == b""
    guard = {"If-Match": pending}
    assert ada.change(order_id, "PAID", headers=guard).status_code == 200
    assert ada.change(order_id, "SHIPPED", headers=guard).status_code == 412
    anything = {"If-Match": "*"}
    assert ada.change(order_id, "SHIPPED", headers=anything).is_success
    assert ada.get(order_id, headers={"If-None-Match": pending}).is_success


def test_the_history_tells_what_happened(ada):
    """Creation and each change of status are there, oldest first."""
    order_id = ada.order()
    ada.change(order_id, "PAID")

    events = ada.call("GET", f"/orders/{order_id}/events").json()

    assert [event["kind"] for event in events] == [
        "new_order",
        "status_changed",
    ]
    assert events[1]["payload"]["status"] == "PAID"


def test_all_times_have_one_form(ada):
    """A client needs one way to read them."""
    order = ada.create().json()
    ada.change(order["id"], "PAID")
    path = f"/orders/{order['id']}/events"

    def events():
        return ada.call("GET", path).json()

    servers.wait_until(lambda: events()[1]["processed_at"], 10)
    times = [
        order["created_at"],
        ada.get(order["id"]).json()["created_at"],
        events()[0]["created_at"],
        events()[1]["processed_at"],
    ]

    for moment in times:
        assert re.fullmatch(
            r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z", moment
        )


def test_a_request_id_is_taken_or_made(client):
    """A printable one is answered as it came, another one is replaced."""
    given = client.get("/health", headers={"X-Request-ID": "abc-1"})
    made = client.get("/health", headers={"X-Request-ID": "a b"})

    assert given.headers["x-request-id"] == "abc-1"
    assert len(made.headers["x-request-id"]) == 32


def test_health_and_readiness_say_how_it_is(client, settings):
    """Each dependency is named."""
    cache = "trusted" if settings.redis_url else "embedded"
    broker = "ok" if settings.redis_url else "embedded"

    ready = {
        "status": "ok",
        "database": "ok",
        "cache": cache,
        "broker": broker,
        "backlog": 0,
        "oldest_seconds": 0.0,
    }

    servers.wait_until(lambda: client.get("/ready").json() == ready)
    assert client.get("/health").json() == {"status": "ok"}


def test_the_sixth_call_of_a_minute_is_refused(settings):
    """One budget over all calls, refused ones counted, the free ones not."""
    app = create_app(replace(settings, rate_limit="5/minute"))
    with TestClient(app) as client:
        # Until Redis is trusted, the process counts by itself.
        servers.wait_until(
            lambda: client.get("/ready").json()["cache"] != "untrusted"
        )
        for path in ("/health", "/ready", "/docs", "/openapi.json"):
            client.get(path)
        counted = [
            client.get(f"/orders/{UNKNOWN}"),
            client.get("/orders/user/1"),
            client.post("/register/", json={}),
            client.post("/token/", data={}),
            client.get("/nowhere", headers={"X-Forwarded-For": "1.2.3.4"}),
        ]
        sixth = client.get(
            f"/orders/{UNKNOWN}", headers={"X-Forwarded-For": "1.2.3.4"}
        )
        health = client.get("/health")

    assert [a.status_code for a in counted] == [401, 401, 422, 422, 404]
    assert sixth.status_code == 429
    assert 1 <= int(sixth.headers["retry-after"]) <= 60
    assert "try again in" in sixth.json()["detail"]
    assert health.status_code == 200


def test_a_stranger_may_read_answers_but_gets_no_credentials(client):
    """CORS is open, and never mirrors an origin with credentials."""
    answer = client.get("/health", headers={"Origin": "https://x.example"})

    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers


def test_only_a_named_origin_may_read_answers(settings):
    """Several are named with commas, with spaces or without."""
    origins = ["https://a.example", "http://b.example:8080", "https://c.d"]
    app = create_app(replace(settings, cors_origins=", ".join(origins)))
    with TestClient(app) as client:
        allowed = [
            client.get("/health", headers={"Origin": origin}).headers.get(
                "access-control-allow-origin"
            )
            for origin in [*origins, "https://x.example"]
        ]

    assert allowed == [*origins, None]


def test_unknown_addresses_and_methods_get_a_hint(client):
    """Every error is JSON with a detail."""
    assert "/docs" in client.get("/nowhere").json()["detail"]
    assert client.delete("/orders/").status_code == 405


def test_an_unexpected_fault_is_a_500_in_json(settings, monkeypatch):
    """The answer says nothing of the fault itself."""
    app = create_app(settings)
    with TestClient(app, raise_server_exceptions=False) as client:
        user = User(client, "ada@example.com")
        monkeypatch.delattr(OrderService, "get")
        answer = user.get(UNKNOWN)

    assert answer.status_code == 500
    assert "logged" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("meanwhile", "expected"), [("PAID", 200), ("CANCELED", 409)]
)
def test_a_change_that_lost_a_race_looks_again(
    client, ada, monkeypatch, meanwhile, expected
):
    """Another change came between the attempt and the look at its reason."""
    order, read = ada.order(), OrderService._read

    async def read_late(service, user_id, order_id):
        monkeypatch.undo()
        status = OrderStatus(meanwhile)
        await service.change_status(
            user_id, order_id, status, expected=OrderStatus
        )
        return await read(service, user_id, order_id)

    monkeypatch.setattr(OrderService, "_read", read_late)
    changed = ada.change(order, "SHIPPED").json()

    assert changed["status"] == ("SHIPPED" if expected == 200 else 409)
    if expected == 409:
        assert (changed["current"], changed["allowed"]) == (meanwhile, [])
