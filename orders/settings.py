"""Read the configuration once, and refuse an invalid one at the start.

No other module reads a setting. A value comes from the environment, then from
`.env`, then from its default; an empty value counts as unset. The three URLs
choose the mode: a part of the service whose URL is unset runs inside the
process.

An invalid setting ends the start with one line, which names the setting and
says what to write. The line never repeats the value: it may be a password.
"""

import io
import os
import re
import sys
from ipaddress import IPv4Address, IPv6Address, ip_network
from pathlib import Path
from typing import Annotated, Literal, NoReturn
from urllib.parse import parse_qs, quote, unquote, urlsplit

import limits
import sqlalchemy as sa
from dotenv import dotenv_values
from dotenv.parser import parse_stream
from psycopg import pq
from psycopg.conninfo import make_conninfo
from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_FILE = Path(".env")
MAX_WINDOW = 366 * 24 * 60 * 60  # seconds that a rate limit may count
ENCODED = "special characters of the user and the password percent-encoded"
# What to write for each setting, whichever check refuses its value.
HINTS = {
    "database_url": "write sqlite:/// and the path of a file, or"
    f" postgresql://user:password@host:5432/database, {ENCODED}; after a ?"
    " may stand parameters of libpq: sslmode=require (it has no ssl=true),"
    " host=/run/postgresql for a socket, host=a:5432&host=b:5432 for several",
    "redis_url": f"write redis://user:password@host:6379/0, {ENCODED}, or"
    " rediss://… for TLS; after a ? may stand client_name=… and, for TLS,"
    " parameters such as ssl_ca_certs=/path or ssl_cert_reqs=required",
    "rabbitmq_url": f"write amqp://user:password@host:5672/name, {ENCODED}, or"
    " amqps://… for TLS, without parameters; the name is the virtual host's,"
    " with %2F for each slash in it, and may be left out",
    "jwt_algorithm": "write HS256, HS384 or HS512",
    "jwt_secret_key": "write the output of `openssl rand -hex 32` there,"
    " or remove .env: `uv run orders` writes one",
    "jwt_expire_minutes": "write a whole number of minutes, 1 to 525600",
    "app_host": "write a name, or an address such as 127.0.0.1, 0.0.0.0 or"
    " ::1; the port belongs in APP_PORT",
    "app_port": "write a whole number from 1 to 65535",
    "web_concurrency": "write a whole number from 1 to 64",
    "rate_limit": "write such as 5/minute or 100 per 2 hours, with commas"
    " between several limits, or leave it empty to turn the limit off",
    "cors_origins": "write * for all, or origins such as https://shop.example"
    " with commas between them, as a browser sends them: in lower case, an"
    " international name as xn--…, without a final slash, path, * or :443",
    "forwarded_allow_ips": "write * for all, or addresses and networks such"
    " as 10.0.0.5,10.1.0.0/16; a network has zeros after its prefix",
    "staff_user_ids": "write ids of users with commas between them, as in 1,7",
    "log_format": "write text or json",
}

# Another @ or : belongs to a password whose special characters are not
# percent-encoded. A library would take a part of the password for the host.
SERVER_URL = re.compile(
    r"(?P<scheme>[a-z]+)://"
    r"((?P<user>[^:@/?#]*)(:(?P<password>[^@/?#]*))?@)?"
    r"(?P<host>[\w.,-]*|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?"
    r"(?P<path>/[^@?#]*)?(\?(?P<query>[^@#]+))?"
)
LIBPQ_PARAMETERS = {
    option.keyword.decode() for option in pq.Conninfo.get_defaults()
} - {"replication"}  # a session for replication runs no SQL
REDIS_TLS_PARAMETERS = {
    *("ssl_ca_certs", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile"),
    *("ssl_check_hostname", "ssl_keyfile", "ssl_password"),
}
ORIGIN = re.compile(
    r"(http(?!.*:80$)|https(?!.*:443$))://"
    r"(?P<host>[a-z0-9_.-]+|\[[0-9a-f:]+\])(:(?P<port>[1-9][0-9]{0,4}))?"
)


def split_url(text: str, *schemes: str) -> re.Match[str]:
    """Return the parts of a server's URL, still percent-encoded."""
    url = SERVER_URL.fullmatch(text)
    # libpq ends a value at a NUL, and urllib drops raw tabs and line feeds.
    mistake = re.search(r"%(?![0-9A-Fa-f]{2})|%00|[\x00-\x1f]", text)
    if url is None or url["scheme"] not in schemes or mistake:
        raise ValueError
    unquote(text, errors="strict")  # only UTF-8 can be encoded
    if "postgresql" not in schemes:
        half_login = url["user"] and not url["password"]
        if half_login or not url["host"] or "," in url["host"]:
            raise ValueError
    check_addresses(url["host"], url["port"] or "")
    return url


def check_addresses(hosts: str, ports: str = "") -> None:
    """Refuse hosts and ports that cannot exist; commas separate several."""
    for host in hosts.split(","):
        if host.startswith("/"):
            continue  # the folder of a socket
        if ":" in host or "[" in host:
            IPv6Address(host.strip("[]"))
        # A resolver reads a number such as 8000 as the address 0.0.31.64.
        elif re.search(r"(^|\.)(0x[0-9a-f]*|[0-9]+)\.?$", host):
            IPv4Address(host)
        else:
            host.encode("idna")
    for port in ports.split(","):
        if port and not 1 <= int(port) <= 65_535:
            raise ValueError


def parameters_of(url: re.Match[str], known: set[str]) -> dict[str, str]:
    """Return the parameters of a URL, all of them known and with a value."""
    # A library drops an empty value, and takes one of several.
    parameters = parse_qs(url["query"] or "", keep_blank_values=True)
    for name, values in parameters.items():
        once = len(values) == 1 or name == "host"
        if name not in known or not once or not all(values):
            raise ValueError
    return {name: values[0] for name, values in parameters.items()}


def check_database_url(text: str) -> str:
    """Return the URL of a database, as SQLAlchemy reads it."""
    # Hosting platforms write the older scheme, which SQLAlchemy refuses.
    text = re.sub("^postgres://", "postgresql://", text)
    if not text.startswith("sqlite:"):
        check_postgresql_url(text)
        return text
    # Each connection would have a database of its own in memory. The driver's
    # parameter `uri` would leave the file readable for everybody.
    sqlite = re.fullmatch(r"sqlite:///([^?]+)(\?timeout=\d*\.?\d+)?", text)
    if sqlite is None or re.search(":memory:|\0", unquote(sqlite[1])):
        raise ValueError
    return text


def check_postgresql_url(text: str) -> None:
    """Refuse a URL that SQLAlchemy or libpq would refuse or misread."""
    url = split_url(text, "postgresql")
    parameters = parameters_of(url, LIBPQ_PARAMETERS)
    parsed = sa.make_url(text)
    try:
        arguments = parsed.get_dialect()().create_connect_args(parsed)[1]
    except sa.exc.ArgumentError as error:  # such as two hosts, three ports
        raise ValueError from error
    # Without a host, libpq would look for a server on this machine.
    if not arguments.keys() & {"host", "hostaddr", "service"}:
        raise ValueError
    hosts, ports = arguments.get("host", ""), arguments.get("port", "")
    check_addresses(str(hosts), str(ports))
    # Another encoding lacks characters: an order with one of them would fail.
    encoding = parameters.get("client_encoding", "utf8").lower()
    if encoding not in {"utf8", "utf-8"}:
        raise ValueError
    # libpq reads these numbers only after it has found a server.
    for name in parameters:
        if name.startswith(("connect_", "keepalives", "tcp_")):
            int(parameters[name])
    # libpq checks the other values before it looks for a socket below
    # os.devnull, which its error then names. A socket cannot have GSSAPI.
    parameters |= {"host": os.devnull, "hostaddr": "", "port": "1"}
    attempt = make_conninfo(**(parameters | {"gssencmode": "disable"}))
    connection = pq.PGconn.connect_start(attempt.encode())
    if os.devnull not in connection.get_error_message():
        raise ValueError


def check_redis_url(text: str) -> str:
    """Return the URL of a Redis, as redis-py reads it."""
    url = split_url(text, "redis", "rediss")
    urlsplit(text)  # it refuses a bracket in a password
    # redis-py takes a path that is no number for the database 0.
    if not re.fullmatch("(/[0-9]*)?", url["path"] or ""):
        raise ValueError
    # The cache sets its time limits itself, and has a single connection.
    known = {"client_name"}
    if url["scheme"] == "rediss":
        known |= REDIS_TLS_PARAMETERS
    checks = parameters_of(url, known).get("ssl_cert_reqs", "required")
    if checks not in {"none", "optional", "required"}:
        raise ValueError
    return text


def check_rabbitmq_url(text: str) -> str:
    """Return the URL of a RabbitMQ, as both pika and kombu read it.

    The two libraries differ where the virtual host has a raw slash, in the
    parameters that they know, and where one half of the login is missing.
    """
    url = split_url(text, "amqp", "amqps")
    # Celery's documentation writes `//` for the virtual host `/`.
    path = re.fullmatch("(//?|/(?P<name>[^/]+))?", url["path"] or "")
    if path is None or "?" in text:
        raise ValueError
    user = quote(unquote(url["user"] or "guest"), safe="")
    password = quote(unquote(url["password"] or "guest"), safe="")
    port = url["port"] or ("5671" if url["scheme"] == "amqps" else "5672")
    name = quote(unquote(path["name"] or "/"), safe="")
    return f"{url['scheme']}://{user}:{password}@{url['host']}:{port}/{name}"


def check_app_host(host: str) -> str:
    """Return an address to listen on, without brackets, or a name."""
    if not re.fullmatch(r"[\w.-]+|\[?[0-9A-Fa-f:.]+(%\w+)?\]?", host):
        raise ValueError
    check_addresses(host)
    return str(IPv6Address(host.strip("[]"))) if ":" in host else host


def check_origins(text: str) -> str:
    """Return origins as a browser spells them: Starlette compares text."""
    for written in re.split(r"[\s,]+", text):
        if written == "*":
            continue
        origin = ORIGIN.fullmatch(written)
        if origin is None:
            raise ValueError
        check_addresses(origin["host"], origin["port"] or "")
        bare = origin["host"].strip("[]")
        if ":" in bare and str(IPv6Address(bare)) != bare:
            raise ValueError
    return text


def check_proxies(text: str) -> str:
    """Return proxies, all of them addresses; uvicorn takes any text."""
    for proxy in text.split(","):
        if proxy.strip() and text != "*":
            ip_network(proxy.strip())
    return text


def check_rate_limit(text: str) -> str:
    """Return limits that let calls by, and that Redis can count."""
    parsed = limits.parse_many(text) if text else []
    for limit in parsed:
        if limit.amount == 0 or limit.get_expiry() > MAX_WINDOW:
            raise ValueError
    # A limit that is written twice would count each call twice, and a time of
    # `0 minutes` would be read as one minute.
    twice = len({limit.key_for() for limit in parsed}) < len(parsed)
    if twice or re.search(r"(/|per)\s*0+\s*[a-z]", text):
        raise ValueError
    return text


DatabaseUrl = Annotated[str, AfterValidator(check_database_url)]
RedisUrl = Annotated[str, AfterValidator(check_redis_url)]
RabbitmqUrl = Annotated[str, AfterValidator(check_rabbitmq_url)]


class Settings(BaseSettings):
    """The validated configuration of one process."""

    model_config = SettingsConfigDict(
        frozen=True, hide_input_in_errors=True, str_strip_whitespace=True
    )

    database_url: DatabaseUrl = Field("sqlite:///orders.db", repr=False)
    redis_url: RedisUrl | None = Field(None, repr=False)
    rabbitmq_url: RabbitmqUrl | None = Field(None, repr=False)
    jwt_algorithm: Literal["HS256", "HS384", "HS512"] = "HS256"
    jwt_secret_key: str = Field("", repr=False)
    jwt_expire_minutes: int = Field(30, ge=1, le=525_600)
    app_host: Annotated[str, AfterValidator(check_app_host)] = "127.0.0.1"
    app_port: int = Field(8000, ge=1, le=65_535)
    web_concurrency: int = Field(1, ge=1, le=64)  # the name is uvicorn's
    rate_limit: Annotated[str, AfterValidator(check_rate_limit)] = "5/minute"
    cors_origins: Annotated[str, AfterValidator(check_origins)] = "*"
    forwarded_allow_ips: Annotated[str, AfterValidator(check_proxies)] = ""
    staff_user_ids: str = Field("", pattern="^([0-9]+( *, *[0-9]+)*)?$")
    log_format: Literal["text", "json"] = "text"

    @property
    def staff(self) -> frozenset[int]:
        """Return the ids of the users who are staff."""
        return frozenset(map(int, re.findall("[0-9]+", self.staff_user_ids)))

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: dict[str, object]) -> dict[str, object]:
        """Let an empty value count as unset, but not that of RATE_LIMIT."""
        # The option `env_ignore_empty` would drop RATE_LIMIT, too.
        return {
            name: value
            for name, value in values.items()
            if value != "" or name == "rate_limit"
        }


def load_settings(*, secret: bool = True) -> Settings:
    """Return the settings, or end the process with one line that says why.

    A migration passes `secret=False`: it needs none.
    """
    read_env_file()
    try:
        settings = Settings()
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        refuse_to_start(f"{name.upper()} is not usable: {HINTS[name]}")
    key, algorithm = settings.jwt_secret_key, settings.jwt_algorithm
    # RFC 7518, section 3.2: a key is at least as long as the hash.
    least = int(algorithm.removeprefix("HS")) // 8
    placeholder = re.match("(?i)change|replace|your|secret|example|<", key)
    if (key or secret) and (placeholder or len(key.encode()) < least):
        refuse_to_start(
            f"JWT_SECRET_KEY is not {'usable' if key else 'set'}: write the"
            f" output of `openssl rand -hex {least}` there (at least the"
            f" {least} bytes of {algorithm}'s hash), or remove .env: `uv run"
            " orders` writes one"
        )
    return settings


def read_env_file() -> None:
    """Put what only `.env` sets into the environment, for libraries, too."""
    try:
        text = ENV_FILE.read_text(encoding="utf-8")
    except FileNotFoundError:
        return
    except (OSError, UnicodeDecodeError):
        text = "\0"
    # UTF-16 without a mark at its start reads as UTF-8 with NULs.
    broken = any(line.error for line in parse_stream(io.StringIO(text)))
    if broken or "\0" in text:
        refuse_to_start(
            ".env is not usable: write a file in UTF-8 that this user may"
            " read, with lines such as NAME=value"
        )
    for name, value in dotenv_values(stream=io.StringIO(text)).items():
        # An empty RATE_LIMIT is a value: it turns the limit off.
        unset = {None} if name == "RATE_LIMIT" else {None, ""}
        if value is not None and os.environ.get(name) in unset:
            os.environ[name] = value


def refuse_to_start(reason: str) -> NoReturn:
    """End the process with the one line that a person needs."""
    print("orders cannot start:", *reason.splitlines(), file=sys.stderr)
    raise SystemExit(3)  # uvicorn does not restart a process that ends so
