"""The URLs of servers mean the same to every library that reads them."""

import asyncio

import kombu
import pika
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pydantic import AnyUrl
from redis.asyncio import ConnectionPool
from starlette.middleware.cors import CORSMiddleware
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from orders.settings import Settings

# What no environment can hold, and what RabbitMQ has no names with.
TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    min_size=1,
    max_size=20,
)


def percent(text):
    """Return text with each of its bytes percent-encoded."""
    return "".join(f"%{byte:02x}" for byte in text.encode())


def rabbitmq(text):
    """Return the canonical URL of a RabbitMQ."""
    return Settings(rabbitmq_url=text).rabbitmq_url


def read_by_pika(url):
    """Return what pika reads: the way to a broker, and to what there."""
    read = pika.URLParameters(url)
    login = read.credentials
    tls = read.ssl_options is not None
    address = read.host, read.port, read.virtual_host
    return (*address, login.username, login.password, tls)


def read_by_kombu(url):
    """Return what kombu reads, which is the worker's library."""
    read = kombu.Connection(url)
    tls = read.transport.client.ssl
    address = read.hostname, read.port, read.virtual_host
    return (*address, read.userid, read.password, bool(tls))


@pytest.mark.parametrize(
    ("url", "host", "port", "virtual_host", "user", "password"),
    [
        ("amqp://h", "h", 5672, "/", "guest", "guest"),
        ("amqp://h/", "h", 5672, "/", "guest", "guest"),
        ("amqp://h//", "h", 5672, "/", "guest", "guest"),
        ("amqp://@h/", "h", 5672, "/", "guest", "guest"),
        ("amqp://:p@h/", "h", 5672, "/", "guest", "p"),
        ("amqp://u:p@h:5673//", "h", 5673, "/", "u", "p"),
        ("amqp://u:p@h/%2F", "h", 5672, "/", "u", "p"),
        ("amqp://u:p@h/%2f", "h", 5672, "/", "u", "p"),
        ("amqp://u:p@h/name", "h", 5672, "name", "u", "p"),
        ("amqp://u:p@h/a%2Fb%2F", "h", 5672, "a/b/", "u", "p"),
        ("amqp://u:p@h/a;b", "h", 5672, "a;b", "u", "p"),
        ("amqp://u:p@h/a b+%25", "h", 5672, "a b+%", "u", "p"),
        ("amqp://u:p@h/caf\xe9", "h", 5672, "caf\xe9", "u", "p"),
        ("amqp://u:p%3Aq+;[%5D @h/", "h", 5672, "/", "u", "p:q+;[] "),
        ("amqp://u%40x:%C3%A9%2F%25@h/", "h", 5672, "/", "u@x", "\xe9/%"),
        ("amqp://u:p@H.example/", "h.example", 5672, "/", "u", "p"),
        ("amqp://u:p@127.0.0.1/", "127.0.0.1", 5672, "/", "u", "p"),
        ("amqp://u:p@[::1]/", "::1", 5672, "/", "u", "p"),
        ("amqp://u:p@[::1]:5673/v", "::1", 5673, "v", "u", "p"),
        ("amqps://u:p@h/v", "h", 5671, "v", "u", "p"),
        ("amqps://u:p@h:5672/v", "h", 5672, "v", "u", "p"),
    ],
)
def test_the_publisher_and_the_worker_read_one_url_alike(
    url, host, port, virtual_host, user, password
):
    """Otherwise one is ready, and the other never connects."""
    canonical = rabbitmq(url)

    tls = url.startswith("amqps:")
    expected = (host, port, virtual_host, user, password, tls)
    assert read_by_pika(canonical) == expected
    assert read_by_kombu(canonical) == expected


@given(TEXT, TEXT, TEXT)
def test_any_login_and_virtual_host_can_be_written(user, password, name):
    """Whatever the characters are; a canonical URL stays as it is."""
    login = f"{percent(user)}:{percent(password)}"
    canonical = rabbitmq(f"amqp://{login}@h/{percent(name)}")

    expected = ("h", 5672, name, user, password, False)
    assert read_by_pika(canonical) == expected
    assert read_by_kombu(canonical) == expected
    assert rabbitmq(canonical) == canonical


@given(TEXT, TEXT)
def test_any_login_reaches_postgresql(user, password):
    """SQLAlchemy decodes it, and libpq takes it."""
    login = f"{percent(user)}:{percent(password)}"
    url = Settings(database_url=f"postgres://{login}@h/x").database_url

    read = sa.make_url(url)
    arguments = read.get_dialect()().create_connect_args(read)[1]
    taken = conninfo_to_dict(make_conninfo(**arguments))
    assert taken == {
        "user": user,
        "password": password,
        "host": "h",
        "dbname": "x",
    }


@given(TEXT, TEXT)
def test_any_login_reaches_redis(user, password):
    """redis-py decodes it."""
    login = f"{percent(user)}:{percent(password)}"
    url = Settings(redis_url=f"redis://{login}@h").redis_url

    connection = ConnectionPool.from_url(url).make_connection()
    assert (connection.username, connection.password) == (user, password)


@pytest.mark.parametrize(
    ("url", "port", "database"),
    [
        ("redis://h", 6379, 0),
        ("redis://h/", 6379, 0),
        ("redis://:p@h:6380/15?client_name=shop", 6380, 15),
        (
            "rediss://u:p@h/1?ssl_ca_certs=/a&ssl_ca_path=/b&ssl_certfile=/c"
            "&ssl_keyfile=/d&ssl_password=e&ssl_check_hostname=no"
            "&ssl_cert_reqs=optional&client_name=shop",
            6379,
            1,
        ),
    ],
)
def test_redis_py_takes_every_parameter_that_is_accepted(url, port, database):
    """An unknown one would end the start with a traceback."""
    accepted = Settings(redis_url=url).redis_url

    connection = ConnectionPool.from_url(accepted).make_connection()
    assert (connection.host, connection.port) == ("h", port)
    assert connection.db == database


@pytest.mark.parametrize(
    "origin",
    [
        "https://shop.example",
        "http://localhost:3000",
        "http://127.0.0.1:8080",
        "http://[2001:db8::1]:81",
        "https://xn--caf-dma.example:8443",
        "https://a_b.example:80",
    ],
)
def test_a_browser_sends_the_origins_that_are_accepted(origin):
    """Another reader of URLs, which follows the browsers, keeps them."""
    accepted = Settings(cors_origins=origin).cors_origins

    sent = str(AnyUrl(f"{origin}/orders")).removesuffix("/orders")
    assert sent == origin
    assert CORSMiddleware(print, [accepted]).is_allowed_origin(sent)


@pytest.mark.parametrize(
    ("proxies", "address", "believed"),
    [
        ("*", "203.0.113.1", True),
        ("10.0.0.5, 10.1.0.0/16", "10.0.0.5", True),
        ("10.0.0.5, 10.1.0.0/16", "10.1.2.3", True),
        ("10.0.0.5, 10.1.0.0/16", "10.2.0.1", False),
        ("10.0.0.0/255.255.255.0", "10.0.0.9", True),
        ("fd00::/64,", "fd00::9", True),
        ("0:0:0:0:0:0:0:1", "::1", True),
    ],
)
def test_uvicorn_believes_the_proxies_that_are_accepted(
    proxies, address, believed
):
    """It would take what it does not know for a name, and say nothing."""
    accepted = Settings(forwarded_allow_ips=proxies).forwarded_allow_ips
    seen = []

    async def note_the_client(scope, receive, send):
        seen.append(scope["client"][0])

    scope = {
        "type": "http",
        "client": (address, 1),
        "headers": [(b"x-forwarded-for", b"192.0.2.1")],
    }
    asyncio.run(
        ProxyHeadersMiddleware(note_the_client, accepted)(scope, None, None)
    )

    assert seen == ["192.0.2.1" if believed else address]
