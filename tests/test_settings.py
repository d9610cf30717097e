"""The configuration: what is read, and what ends the start with one line."""

import os
import re
import signal
import stat
import subprocess
import tempfile
from pathlib import Path

import httpx2
import psycopg
import pytest
import servers
from conftest import ROOT
from fastapi.testclient import TestClient
from preloaded import Program

from orders.__main__ import banner, write_env_file
from orders.api import create_app
from orders.settings import Settings, load_settings

SECRET = "0123456789abcdef" * 4
TOLD = "s3cr3t"  # a part of a password, which no line may hold
NOBODY = 65534  # a user who may read no file of another


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return what reads these variables, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def read(**environ):
        monkeypatch.setattr(os, "environ", {"JWT_SECRET_KEY": SECRET})
        os.environ.update(environ)
        return load_settings()

    return read


@pytest.fixture
def refusal(load, capsys):
    """Return what reads variables, and returns the one line that it says."""

    def read(**environ):
        with pytest.raises(SystemExit) as end:
            load(**environ)
        said = capsys.readouterr()
        assert end.value.code == 3
        assert said.out == ""
        assert re.fullmatch("orders cannot start: [^\n]*\n", said.err)
        return said.err.removeprefix("orders cannot start: ")

    return read


def test_nothing_but_a_secret_is_needed(load):
    """The defaults are the embedded mode, on this machine only."""
    settings = load()

    assert settings.database_url == "sqlite:///orders.db"
    assert settings.redis_url is settings.rabbitmq_url is None
    assert settings.app_host == "127.0.0.1"
    assert settings.rate_limit == "5/minute"
    assert settings.cors_origins == "*"


def test_what_is_empty_counts_as_unset(load):
    """As compose passes on each variable that its `.env` lacks."""
    names = {name.upper() for name in Settings.model_fields}
    empty = dict.fromkeys(names - {"JWT_SECRET_KEY", "RATE_LIMIT"}, "")

    assert load(**empty) == load()


def test_an_empty_rate_limit_turns_it_off(load):
    """Empty is not unset here, wherever it is said."""
    assert load(RATE_LIMIT="").rate_limit == ""
    Path(".env").write_text("RATE_LIMIT=9/minute\n")
    assert load(RATE_LIMIT="").rate_limit == ""
    Path(".env").write_text("RATE_LIMIT=\n")
    assert load().rate_limit == ""
    assert load(RATE_LIMIT="9/minute").rate_limit == "9/minute"


def test_the_env_file_fills_what_the_environment_leaves(load):
    """For libraries, too, which read variables of their own."""
    Path(".env").write_text(
        "APP_PORT=8001\nAPP_HOST=0.0.0.0\nJWT_EXPIRE_MINUTES=7\n"
        "OTEL_SERVICE_NAME=shop\nCORS_ORIGINS=https://a.example, *\n"
    )

    settings = load(APP_HOST="127.0.0.2", JWT_EXPIRE_MINUTES="")

    assert settings.app_port == 8001
    assert settings.app_host == "127.0.0.2"
    assert settings.jwt_expire_minutes == 7
    assert settings.cors_origins == "https://a.example, *"
    assert os.environ["OTEL_SERVICE_NAME"] == "shop"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"# nothing but a comment\n",
        b"\xef\xbb\xbfAPP_PORT=8001\n",  # as editors on Windows save UTF-8
        b"APP_PORT=8001\r\nOTEL_SERVICE_NAME=caf\xc3\xa9\r\n",
        b"export APP_PORT='8001' # a comment\nNAME_ALONE\n",
    ],
)
def test_an_env_file_is_read_as_editors_write_it(load, content):
    """A mark at its start, or the line ends of Windows, change nothing."""
    Path(".env").write_bytes(content)

    assert load().app_port == (8001 if b"8001" in content else 8000)


@pytest.mark.parametrize(
    "content",
    [
        f"APP_PORT=8001\nX={TOLD}\n".encode("utf-16"),  # as Notepad saves it
        f"APP_PORT=8001\nX={TOLD}\n".encode("utf-16-le"),
        f"APP_PORT=8001\nX={TOLD}\n".encode("utf-32"),
        f"X={TOLD}\xe9\n".encode("latin-1"),
        f"APP_PORT: {TOLD}\n".encode(),
        f'X="{TOLD}\n'.encode(),
    ],
)
def test_an_env_file_that_cannot_be_read_is_refused(refusal, content):
    """The start ends with a line that names the file, and no content."""
    Path(".env").write_bytes(content)

    said = refusal()

    assert said.startswith(".env is not usable: write a file in UTF-8 ")
    assert TOLD not in said


def make_a_folder(path):
    """Let the name be that of a folder, as Docker does for a lost file."""
    path.mkdir()


def make_a_loop(path):
    """Let the name lead to itself."""
    path.symlink_to(path)


@pytest.mark.parametrize("make", [make_a_folder, make_a_loop])
def test_an_env_file_that_is_no_file_is_refused(refusal, make):
    """A user finds out, rather than that all settings have their defaults."""
    make(Path(".env"))

    assert refusal().startswith(".env is not usable: write a file ")


def test_an_env_file_of_another_user_is_refused(refusal):
    """Such as the file of root, in a container that runs as somebody else."""
    Path(".env").write_text("APP_PORT=8001\n")
    Path(".env").chmod(0)
    user = os.geteuid()

    try:
        if user == 0:
            os.seteuid(NOBODY)
        said = refusal()
    finally:
        os.seteuid(user)

    assert said.startswith(".env is not usable: write a file ")
    assert "this user may read" in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("JWT_SECRET_KEY", "short"),
        ("JWT_SECRET_KEY", "change-me-to-something-long-enough-please"),
        ("JWT_SECRET_KEY", f"\udcff{TOLD}" * 9),
        ("JWT_ALGORITHM", "none"),
        ("JWT_ALGORITHM", "RS256"),
        ("JWT_EXPIRE_MINUTES", "-5"),
        ("JWT_EXPIRE_MINUTES", "0"),
        ("JWT_EXPIRE_MINUTES", "soon"),
        ("JWT_EXPIRE_MINUTES", "1e9"),
        ("DATABASE_URL", "mysql://x/y"),
        ("DATABASE_URL", "postgresql+asyncpg://u@h/x"),
        ("DATABASE_URL", "POSTGRESQL://u@h/x"),
        ("DATABASE_URL", "postgresql"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h:port/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h:/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h:0/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h:65536/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?port=70000"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@a..b/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@256.0.0.1/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@[::g]/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@%2Frun%2Fpostgresql/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@${{HOST}}/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@a:5432,b:5433/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@/x?host=a:5432,b:5433"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@/x?host=a,b&port=1,2,3"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@/x?host=a:1&port=1"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@/x"),
        ("DATABASE_URL", "postgresql://"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}%zz@h/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}%@h/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}%00@h/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}%FF@h/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}\n@h/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}\udcff@h/x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?ssl=true"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?ssl"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?pgbouncer=true"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?schema=shop"),
        ("DATABASE_URL", f"postgresql://h/x?user=u&password=a&{TOLD}"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?sslmode=required"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?sslmode="),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?options="),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?sslmode=a&sslmode=b"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?channel_binding=yes"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?connect_timeout=5s"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?keepalives_idle=x"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?client_encoding=latin1"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?replication=database"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h/x?service=nowhere"),
        ("DATABASE_URL", "orders.db"),
        ("DATABASE_URL", "sqlite:orders.db"),
        ("DATABASE_URL", "sqlite://"),
        ("DATABASE_URL", "sqlite://orders.db"),
        ("DATABASE_URL", "sqlite:///"),
        ("DATABASE_URL", "sqlite:///:memory:"),
        ("DATABASE_URL", "sqlite:///%3Amemory%3A"),
        ("DATABASE_URL", "sqlite:///orders%00.db"),
        ("DATABASE_URL", "sqlite:///file::memory:?uri=true"),
        ("DATABASE_URL", "sqlite:///file:orders?mode=memory&uri=true"),
        ("DATABASE_URL", "sqlite:///orders.db?timeout=long"),
        ("DATABASE_URL", "sqlite:///orders.db?sslmode=require"),
        ("REDIS_URL", "http://x"),
        ("REDIS_URL", "unix:///run/redis.sock"),
        ("REDIS_URL", "redis://"),
        ("REDIS_URL", f"redis://:{TOLD}@/0"),
        ("REDIS_URL", "redis://h:99999"),
        ("REDIS_URL", "redis://h:69999"),
        ("REDIS_URL", "redis://h:0"),
        ("REDIS_URL", "redis://a,b"),
        ("REDIS_URL", "redis://6379"),
        ("REDIS_URL", f"redis://{TOLD}@h"),
        ("REDIS_URL", f"redis://:{TOLD}%@h"),
        ("REDIS_URL", f"redis://:{TOLD}[@h"),
        ("REDIS_URL", f"redis://:{TOLD}#@h"),
        ("REDIS_URL", "redis://h/orders"),
        ("REDIS_URL", "redis://h/0/1"),
        ("REDIS_URL", "redis://h/-1"),
        ("REDIS_URL", "redis://h/0#1"),
        ("REDIS_URL", f"redis://h?password={TOLD}"),
        ("REDIS_URL", "redis://h?db=1"),
        ("REDIS_URL", "redis://h?decode_responses=true"),
        ("REDIS_URL", "redis://h?max_connections=9"),
        ("REDIS_URL", "redis://h?ssl_cert_reqs=none"),
        ("REDIS_URL", "rediss://h?ssl_cert_reqs=CERT_NONE"),
        ("REDIS_URL", "rediss://h?ssl_ca_certs="),
        ("REDIS_URL", "rediss://h?ssl_certs=/x"),
        ("REDIS_URL", "rediss://h?client_name=a&client_name=b"),
        ("RABBITMQ_URL", "redis://x"),
        ("RABBITMQ_URL", "pyamqp://h/"),
        ("RABBITMQ_URL", "amqp://"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}@:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}/{TOLD}@h:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:7/{TOLD}@h:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}@{TOLD}@h:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}#{TOLD}@h:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}?{TOLD}@h:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:7?{TOLD}@h:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}%@h:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}%f@h:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}%e4@h:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}@a;amqp://b"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}@a,b"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}@h:0/"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}@h:65536/"),
        ("RABBITMQ_URL", f"amqp://{TOLD}@h/"),
        ("RABBITMQ_URL", f"amqp://{TOLD}:@h/"),
        ("RABBITMQ_URL", "amqp://h/name/"),
        ("RABBITMQ_URL", "amqp://h/a/b"),
        ("RABBITMQ_URL", "amqp://h//name"),
        ("RABBITMQ_URL", "amqp://h///"),
        ("RABBITMQ_URL", "amqp://h/#name"),
        ("RABBITMQ_URL", "amqp://h/?connection_attempts=3"),
        ("RABBITMQ_URL", "amqp://h/?heartbeat=0"),
        ("RABBITMQ_URL", "amqp://h/?"),
        ("RABBITMQ_URL", "amqps://h/?ssl_cert_reqs=none"),
        ("APP_HOST", "http://localhost"),
        ("APP_HOST", "localhost:8000"),
        ("APP_HOST", "*"),
        ("APP_HOST", "8000"),
        ("APP_HOST", "127.1"),
        ("APP_HOST", "256.0.0.1"),
        ("APP_HOST", "127.0.0.1,127.0.0.2"),
        ("APP_HOST", "::1]:8000"),
        ("APP_HOST", ":::"),
        ("APP_HOST", "a..b"),
        ("APP_HOST", "/run/orders.sock"),
        ("APP_PORT", "0"),
        ("APP_PORT", "99999"),
        ("APP_PORT", "http"),
        ("WEB_CONCURRENCY", "0"),
        ("WEB_CONCURRENCY", "auto"),
        ("WEB_CONCURRENCY", "65"),
        ("LOG_FORMAT", "JSON"),
        ("RATE_LIMIT", "banana"),
        ("RATE_LIMIT", "5"),
        ("RATE_LIMIT", "5/min"),
        ("RATE_LIMIT", "0/minute"),
        ("RATE_LIMIT", "5/minute,0/hour"),
        ("RATE_LIMIT", "5/0 minute"),
        ("RATE_LIMIT", "5 per 00 minutes"),
        ("RATE_LIMIT", "5/minute;5/minute"),
        ("RATE_LIMIT", "5/minute,5 per 1 minute"),
        ("RATE_LIMIT", "5/99999999999999999 years"),
        ("RATE_LIMIT", "5/2 years"),
        ("RATE_LIMIT", f"{'9' * 5000}/minute"),
        ("CORS_ORIGINS", "shop"),
        ("CORS_ORIGINS", "null"),
        ("CORS_ORIGINS", "https://shop.example/"),
        ("CORS_ORIGINS", "https://shop.example/path"),
        ("CORS_ORIGINS", "https://shop.example?x"),
        ("CORS_ORIGINS", "https://shop.example, shop"),
        ("CORS_ORIGINS", "https://shop.example,"),
        ("CORS_ORIGINS", "https://*.shop.example"),
        ("CORS_ORIGINS", "https://*"),
        ("CORS_ORIGINS", "https://Shop.example"),
        ("CORS_ORIGINS", "HTTPS://shop.example"),
        ("CORS_ORIGINS", "https://shop.example:443"),
        ("CORS_ORIGINS", "http://shop.example:80"),
        ("CORS_ORIGINS", "https://shop.example:0443"),
        ("CORS_ORIGINS", "https://shop.example:65536"),
        ("CORS_ORIGINS", "https://shop.example:0"),
        ("CORS_ORIGINS", "https://shop.example:"),
        ("CORS_ORIGINS", "https://caf\xe9.example"),
        ("CORS_ORIGINS", "https://shop..example"),
        ("CORS_ORIGINS", "https://127.1"),
        ("CORS_ORIGINS", "https://1.2.3.400"),
        ("CORS_ORIGINS", "https://0x7f.1"),
        ("CORS_ORIGINS", "https://[0:0:0:0:0:0:0:1]"),
        ("CORS_ORIGINS", "https://[::G]"),
        ("CORS_ORIGINS", f"https://u:{TOLD}@shop.example"),
        ("FORWARDED_ALLOW_IPS", "127.0.0.5/8"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.0/33"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.0/255.0.0.255"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.256"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.1, proxy"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.1 10.0.0.2"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.*"),
        ("FORWARDED_ALLOW_IPS", "*, 10.0.0.1"),
        ("FORWARDED_ALLOW_IPS", "[::1]"),
        ("FORWARDED_ALLOW_IPS", "fd00::1/64"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.1:8080"),
        ("FORWARDED_ALLOW_IPS", "unix:"),
    ],
)
def test_an_invalid_value_is_refused_by_name(refusal, name, value):
    """The line says what to write, and never repeats the value."""
    said = refusal(**{name: value})

    assert said.startswith(f"{name} is not usable: write ")
    assert TOLD not in said
    assert "{" not in said


def test_a_missing_secret_is_refused_by_name(refusal):
    """A person who has no `.env` learns how to get a secret."""
    said = refusal(JWT_SECRET_KEY="")

    assert said.startswith("JWT_SECRET_KEY is not set: write the output of `")


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("DATABASE_URL", "postgresql://u@h/x?ssl=true", "sslmode=require"),
        ("DATABASE_URL", "postgresql://u@/x", "host=/run/postgresql"),
        ("DATABASE_URL", "postgresql://a:1,b:2/x", "host=a:5432&host=b:5432"),
        ("DATABASE_URL", "postgresql://u:%@h/x", "percent-encoded"),
        ("REDIS_URL", "unix:///x", "redis://user:password@host:6379/0"),
        ("RABBITMQ_URL", "amqp://h/name/", "/name"),
        ("RABBITMQ_URL", "amqp://h/?heartbeat=0", "without parameters"),
        ("CORS_ORIGINS", "https://*.shop.example", "https://shop.example "),
        ("CORS_ORIGINS", "https://shop.example:443", ":443"),
        ("CORS_ORIGINS", "https://Shop.example", "lower case"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.1/8", "zeros after its prefix"),
        ("APP_HOST", "localhost:8000", "APP_PORT"),
        ("RATE_LIMIT", "0/minute", "leave it empty"),
        ("WEB_CONCURRENCY", "auto", "1 to 64"),
    ],
)
def test_the_line_says_what_to_write(refusal, name, value, word):
    """A person mends the setting without a look at the code."""
    assert word in refusal(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "sqlite:////srv/my orders#1.db"),
        ("DATABASE_URL", "sqlite:///orders.db?timeout=0.5"),
        ("DATABASE_URL", "postgresql://h"),
        ("DATABASE_URL", "postgresql://u:p@h:5432/orders"),
        ("DATABASE_URL", "postgresql://u:p@10.0.0.1/orders"),
        ("DATABASE_URL", "postgresql://u:p@[::1]:5432/orders"),
        ("DATABASE_URL", "postgresql://u:p@caf\xe9.example/orders"),
        ("DATABASE_URL", "postgresql://u:p%40%2F%C3%A9 [+@h_1.x/orders"),
        ("DATABASE_URL", "postgresql://u@/x?host=/run/postgresql"),
        ("DATABASE_URL", "postgresql://u@/x?host=%2Frun%2Fpg&port=5433"),
        ("DATABASE_URL", f"postgresql://u@/x?host=/{'long' * 20}/1.5"),
        ("DATABASE_URL", "postgresql://u@a,b/x"),
        ("DATABASE_URL", "postgresql://u@/x?host=a:5432&host=b:5433"),
        ("DATABASE_URL", "postgresql://u@/x?host=a,b&port=5432,5433"),
        ("DATABASE_URL", "postgresql:///x?hostaddr=10.0.0.1&user=u"),
        ("DATABASE_URL", "postgresql://u@h/x?options=-csearch_path%3Dshop"),
        ("DATABASE_URL", "postgresql://u@h/x?connect_timeout=5"),
        ("DATABASE_URL", "postgresql://u@h/x?client_encoding=UTF8"),
        ("DATABASE_URL", "postgresql://u@h/x?gssencmode=require"),
        (
            "DATABASE_URL",
            "postgresql://u@h/x?sslmode=verify-full&sslrootcert=/a%20b"
            "&application_name=shop&target_session_attrs=read-write",
        ),
        (
            "DATABASE_URL",
            "postgresql://u@h/x?sslnegotiation=direct&sslmode=require",
        ),
        ("REDIS_URL", "redis://h"),
        ("REDIS_URL", "redis://h/"),
        ("REDIS_URL", "redis://:p%40@h:6379/15"),
        ("REDIS_URL", "redis://u:p@[::1]:6379/0?client_name=shop"),
        ("REDIS_URL", "rediss://u:p@h?ssl_cert_reqs=none"),
        ("REDIS_URL", "rediss://u:p@h/1?ssl_ca_certs=/a&ssl_certfile=/b"),
        ("APP_HOST", "0.0.0.0"),
        ("APP_HOST", "::"),
        ("APP_HOST", "fe80::1%eth0"),
        ("APP_HOST", "localhost"),
        ("APP_HOST", "shop-1.example"),
        ("RATE_LIMIT", "100 per 2 hours"),
        ("RATE_LIMIT", "5/minute, 60/hour; 10 PER 2 days | 9/year"),
        ("CORS_ORIGINS", "https://shop.example,http://localhost:3000 *"),
        ("CORS_ORIGINS", "http://127.0.0.1:8080"),
        ("CORS_ORIGINS", "https://xn--caf-dma.example"),
        ("CORS_ORIGINS", "http://[::1]:3000"),
        ("CORS_ORIGINS", "http://shop_1.example:443"),
        ("CORS_ORIGINS", "https://shop.example:80"),
        ("CORS_ORIGINS", "https://shop.example:8443"),
        ("FORWARDED_ALLOW_IPS", "*"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.5, 10.1.0.0/16,fd00::/64"),
        ("FORWARDED_ALLOW_IPS", "::ffff:10.0.0.5"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.5,"),
        ("WEB_CONCURRENCY", "64"),
    ],
)
def test_a_valid_value_is_kept_as_it_is(load, name, value):
    """The checks refuse what cannot work, and nothing besides."""
    assert str(getattr(load(**{name: value}), name.lower())) == value


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("DATABASE_URL", "postgres://u:p@h/x", "postgresql://u:p@h/x"),
        ("DATABASE_URL", " sqlite:///orders.db\n", "sqlite:///orders.db"),
        ("APP_HOST", "[::1]", "::1"),
        ("APP_HOST", "0:0:0:0:0:0:0:0", "::"),
        ("APP_PORT", " 8001 ", "8001"),
    ],
)
def test_another_spelling_means_the_same(load, name, value, kept):
    """What is clear is no reason to refuse."""
    assert str(getattr(load(**{name: value}), name.lower())) == kept


@pytest.mark.parametrize(
    ("algorithm", "least"), [("HS256", 32), ("HS384", 48), ("HS512", 64)]
)
def test_a_secret_is_as_long_as_its_hash(load, refusal, algorithm, least):
    """RFC 7518, section 3.2: bytes, not characters."""
    secret = "ß" + "x" * (least - 2)

    said = refusal(JWT_ALGORITHM=algorithm, JWT_SECRET_KEY=secret[:-1])
    settings = load(JWT_ALGORITHM=algorithm, JWT_SECRET_KEY=secret)

    assert said.startswith("JWT_SECRET_KEY ")
    assert f"{least} bytes of {algorithm}" in said
    assert f"openssl rand -hex {least}" in said
    assert settings.jwt_secret_key == secret


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("0.0.0.0", "127.0.0.1"),
        ("::", "[::1]"),
        ("[::1]", "[::1]"),
        ("fd00::5", "[fd00::5]"),
        ("localhost", "localhost"),
    ],
)
def test_the_banner_shows_an_address_that_a_browser_opens(load, host, address):
    """An IPv6 address stands in brackets, and no address for them all."""
    assert f" http://{address}:8001\n" in banner(
        load(APP_HOST=host, APP_PORT="8001")
    )


@pytest.mark.parametrize(
    ("processes", "cache"), [("1", "in process"), ("2", "none")]
)
def test_the_banner_says_who_has_a_cache(load, processes, cache):
    """Several processes have none without Redis."""
    lines = banner(load(WEB_CONCURRENCY=processes)).splitlines()

    assert [line.split(maxsplit=1) for line in lines if "cache" in line] == [
        ["cache", cache]
    ]


def test_the_socket_of_postgresql_is_reached_by_its_folder(
    production, stack, load
):
    """A database on the same machine needs no port that is open."""
    name = production.database_url.rpartition("/")[2]
    parameters = f"host={stack.postgres.data}&port={stack.postgres.port}"
    url = f"postgresql://postgres@/{name}?{parameters}"

    database_url = load(DATABASE_URL=url).database_url
    settings = production.model_copy(update={"database_url": database_url})
    with TestClient(create_app(settings)) as client:
        ready = client.get("/ready").json()

    assert ready["database"] == "ok"


def test_parameters_of_the_url_reach_the_migration(production, tmp_path):
    """As hosting platforms write it: the older scheme, and options."""
    with psycopg.connect(production.database_url, autocommit=True) as shop:
        shop.execute("CREATE SCHEMA shop")
    url = production.database_url.replace("postgresql:", "postgres:")
    url += "?options=-csearch_path%3Dshop&connect_timeout=3"

    ended = run_to_its_end(tmp_path, MIGRATION, DATABASE_URL=url)

    assert ended.returncode == 0, ended.stderr
    with psycopg.connect(production.database_url) as shop:
        found = shop.execute("SELECT to_regclass('shop.orders')").fetchone()
    assert found != (None,)


MIGRATION = ["alembic", "-c", ROOT / "alembic.ini", "upgrade", "head"]
API = ["uvicorn", "orders.api:app", "--port", "0"]
WORKER = ["celery", "-A", "orders.tasks", "worker"]


def run_to_its_end(folder, command, **env):
    """Return what a program did that ends by itself."""
    program, *arguments = command
    port = str(servers.free_port())  # 8000 may be taken by `uv run orders`
    ports = {"APP_PORT": port, "UVICORN_PORT": port}
    with tempfile.TemporaryDirectory() as made:
        outputs = Path(made) / "stdout", Path(made) / "stderr"
        started = Program(
            [servers.PYTHON / program, *arguments],
            folder,
            {**os.environ, **ports, "JWT_SECRET_KEY": SECRET, **env},
            *outputs,
        )
        try:
            status = started.wait(60)
        finally:
            started.send_signal(signal.SIGKILL)
        texts = [output.read_text() for output in outputs]
        return subprocess.CompletedProcess(command, status, *texts)


@pytest.mark.parametrize(
    ("command", "name", "value"),
    [
        (API, "JWT_SECRET_KEY", ""),
        pytest.param(
            *([*API, "--workers", "2"], "JWT_SECRET_KEY", ""),
            marks=pytest.mark.long,
        ),
        (API, "CORS_ORIGINS", "https://*.shop.example"),
        (API, "FORWARDED_ALLOW_IPS", "127.0.0.5/8"),
        (API, "REDIS_URL", "redis://127.0.0.1/orders"),
        (WORKER, "RABBITMQ_URL", ""),
        (WORKER, "RABBITMQ_URL", "amqp://127.0.0.1/name/"),
        (WORKER, "DATABASE_URL", "postgresql://127.0.0.1/x?ssl=true"),
        (MIGRATION, "DATABASE_URL", "postgresql://127.0.0.1/x?ssl=true"),
        (MIGRATION, "DATABASE_URL", "postgresql://127.0.0.1:70000/x"),
        (["orders"], "DATABASE_URL", "postgresql://127.0.0.1:1/x"),
        (["orders"], "RATE_LIMIT", "banana"),
        (["orders"], "WEB_CONCURRENCY", "auto"),
        (["orders"], "APP_HOST", "http://localhost"),
    ],
)
def test_an_invalid_setting_stops_the_start_with_one_line(
    tmp_path, command, name, value
):
    """Whatever starts says what to write, without a traceback."""
    ended = run_to_its_end(tmp_path, command, **{name: value})

    # The parent of several workers ends without an error of its own, and says
    # when it starts and stops.
    several = "--workers" in command
    assert several or ended.returncode == 3
    assert f"orders cannot start: {name}" in ended.stderr
    assert several or ended.stderr.count("\n") == 1
    assert "Traceback" not in ended.stdout + ended.stderr


@pytest.mark.parametrize("command", [["orders"], API, WORKER, MIGRATION])
def test_an_env_file_in_utf_16_stops_every_start(tmp_path, command):
    """As Notepad, or the redirection of PowerShell, saves it."""
    (tmp_path / ".env").write_text("APP_PORT=8001\n", encoding="utf-16")

    ended = run_to_its_end(tmp_path, command, RABBITMQ_URL="amqp://127.0.0.1")

    assert ended.returncode == 3
    assert ended.stdout == ""
    assert re.fullmatch(
        "orders cannot start: .env is not usable: write [^\n]*\n", ended.stderr
    )


def test_variables_of_the_rate_limiters_library_change_nothing(tmp_path):
    """The library slowapi reads them, in the environment and in `.env`."""
    (tmp_path / ".env").write_text("RATELIMIT_ENABLED=perhaps\n")
    env = {
        "JWT_SECRET_KEY": SECRET,
        "RATE_LIMIT": "2/minute",
        "RATELIMIT_STORAGE_URL": "redis://127.0.0.1:1",
        "RATELIMIT_STORAGE_OPTIONS": "none",
        "RATELIMIT_STRATEGY": "moving-window",
        "RATELIMIT_DEFAULT": "9/minute",
        "RATELIMIT_KEY_PREFIX": "other",
    }
    with servers.running(servers.api(tmp_path, env)) as api:
        url = f"http://127.0.0.1:{api.port}/orders/x"
        statuses = [httpx2.get(url).status_code for _ in range(3)]

    assert statuses == [401, 401, 429]


@pytest.mark.long
def test_several_processes_without_redis_say_what_they_lack(tmp_path):
    """Each has no cache, and counts calls by itself: a person must know."""
    port = servers.free_port()
    api = servers.Server(
        [
            *(servers.PYTHON / "uvicorn", "orders.api:app", "--port", port),
            *("--workers", 3),
        ],
        port=port,
        folder=tmp_path,
        env={"JWT_SECRET_KEY": SECRET},
        ours=True,
    )
    started = "Application startup complete"
    with servers.running(api):
        servers.wait_until(lambda: api.text().count(started) == 3)

    assert api.text().count("Without REDIS_URL") == 3


def test_one_process_without_redis_warns_nobody(tmp_path):
    """It counts and caches for all."""
    env = {"JWT_SECRET_KEY": SECRET}
    with servers.running(servers.api(tmp_path, env)) as api:
        pass

    assert "Without REDIS_URL" not in api.text()


def test_a_migration_that_cannot_enter_says_so_in_one_line(tmp_path):
    """No traceback of Alembic's: a person, or compose, tries again."""
    url = "postgresql://orders:never-told@127.0.0.1:1/x"

    ended = run_to_its_end(tmp_path, MIGRATION, DATABASE_URL=url)

    assert ended.returncode == 3
    assert ended.stdout == ""
    assert re.fullmatch(
        "orders cannot start: DATABASE_URL: .*refused.*\n", ended.stderr
    )
    assert "never-told" not in ended.stderr


def test_the_first_run_writes_a_private_env_file(tmp_path, monkeypatch, load):
    """Later runs keep it."""
    monkeypatch.chdir(tmp_path)
    write_env_file()
    first = Path(".env").read_text()
    write_env_file()

    assert stat.S_IMODE(Path(".env").stat().st_mode) == 0o600
    assert Path(".env").read_text() == first
    secret = first.rsplit("=", 1)[1].strip()
    assert load(JWT_SECRET_KEY=secret).jwt_secret_key == secret
    assert load(JWT_SECRET_KEY="").jwt_secret_key == secret


def test_the_example_names_every_variable_and_no_other():
    """.env.example is what the service reads, and what compose alone does."""
    lines = ROOT.joinpath(".env.example").read_text().splitlines()
    names = {
        line.split("=")[0]
        for line in lines
        if line and not line.startswith("#")
    }

    read = {name.upper() for name in Settings.model_fields}
    of_compose = {"POSTGRES_PASSWORD", "RABBITMQ_PASSWORD", "WORKERS"}
    assert names - read == of_compose
    assert read - names == set()
