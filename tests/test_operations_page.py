"""OPERATIONS.md tells the truth: its commands run, its numbers are the code's.

Each command on the page has a case here, or the first test fails. Docker
cannot be counted on: its commands are compared with `compose.yaml`, and a
stand-in runs here what they would run in a container. The images themselves
are not tried.
"""

import fnmatch
import json
import os
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import get_args
from urllib.parse import urlsplit

import pika
import psycopg
import pytest
import redis
import servers
import yaml
from conftest import ROOT, User, environment, replace
from dotenv import dotenv_values
from fastapi.testclient import TestClient
from faults import proxying, through
from test_journey import processed_lines
from test_readme import definitions, section, serves, shell, spans_of, values
from test_settings import run_to_its_end

from orders import auth
from orders.__main__ import KEEP_ALIVE, MAX_CONNECTIONS
from orders.api import create_app
from orders.broker import DEAD_LETTERS, QUEUE, QUEUE_ARGUMENTS
from orders.events import (
    AHEAD,
    FIRST_LEASE,
    LAST_LEASE,
    POLL_INTERVAL,
    SWEEP_INTERVAL,
)
from orders.service import Readiness
from orders.settings import Settings

PAGE = (ROOT / "OPERATIONS.md").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES = COMPOSE["services"]


def blocks(language, title):
    """Return the blocks of code in a language below a heading."""
    text = section(title, PAGE)
    return re.findall(f"```{language}\n(.*?)```", text, re.DOTALL)


# --- Commands ---------------------------------------------------------------

# The production stack without containers: migration, API, worker.
STACK = (
    "uv run alembic upgrade head",
    "WEB_CONCURRENCY=2 uv run orders",
    "uv run celery -A orders.tasks worker --loglevel=info",
)
COMPOSED = tuple(
    shlex.join(SERVICES[name]["command"])
    for name in ("migrate", "api", "worker")
)
SET_UP = "cp .env.example .env"
PRIVATE = "chmod 600 .env"
LOOK = "curl -s http://127.0.0.1:8000/ready"
ANOTHER_PORT = "APP_PORT=8001 uv run orders"
SERVING = "uv run orders"
DELETE_QUEUE = "rabbitmqctl delete_queue orders"
# Commands that end, and how each is run: `{}` is the command.
ENDING = {
    "openssl rand -hex 32": "{}",
    "uv sync --extra opentelemetry": "{} --dry-run",
}
MASK = "umask 077"
BELOW_A_PATH = (
    "uv run uvicorn orders.api:app --root-path /shop"
    " --http orders.__main__:PlainHttpProtocol --ws none"
    f" --timeout-keep-alive {KEEP_ALIVE}"
    f" --limit-concurrency {MAX_CONNECTIONS}"
)
# `test_operations` runs it.
TRACED_WORKER = (
    "uv run --env-file .env opentelemetry-instrument"
    " celery -A orders.tasks worker --loglevel=info"
)
# Sections whose blocks of commands a test runs as they are.
RUN = ("Rights", "What to watch", "Dead letters", "Prune")
INSPECT = "uv run celery -A orders.tasks inspect ping"
SECRET = "5ec2e7" * 8
# The subcommands that name services, and those that may stand alone.
NAMED = "|".join(SERVICES)
DOCKER = re.compile(
    rf"docker compose (build|down|logs ({NAMED})"
    rf"|up( -d)?( --build)?( --no-deps)?( --wait)?( ({NAMED}))?"
    rf"|(stop|restart)( ({NAMED}))+"
    rf"|(run --rm|exec( -T)?) ({NAMED})( .*)?)"
    r"|docker (build|run|exec|inspect) .*"
    r"|docker (stop|start) orders"
)


def commands_in(block):
    """Return the commands of a block, without its comments."""
    lines = [line.partition(" #")[0].strip() for line in block.splitlines()]
    # A line in brackets keeps what it sets for itself.
    lines = [re.sub(r"^\((.*)\)$", r"\1", line) for line in lines]
    outside_quotes = r' && (?=(?:[^"]*"[^"]*")*[^"]*$)'
    return {
        part.strip()
        for line in lines
        for part in re.split(outside_quotes, line)
    }


def shown_commands():
    """Return every command on the page."""
    # Words after the name of a program.
    typed = [
        span
        for span in spans_of(PAGE)
        if re.match(r"([A-Z_]+=\S* )*[a-z][\w.-]* \S", span)
    ]
    shown = {
        command
        for block in re.findall("```sh\n(.*?)```", PAGE, re.DOTALL)
        for command in commands_in(block)
    }
    return (shown | set(typed)) - {message for _, message in troubles()}


def test_every_command_has_a_case():
    """A new command on the page is tried here, or fits the stack."""
    known = {*ENDING, *STACK, SET_UP, PRIVATE, LOOK, ANOTHER_PORT, SERVING}
    known |= {DELETE_QUEUE, MASK, BELOW_A_PATH, TRACED_WORKER}
    shown = shown_commands()
    run = {
        command
        for title in RUN
        for block in blocks("sh", title)
        for command in commands_in(block)
    }
    rest = shown - known - run

    assert known - shown == set()
    assert [c for c in rest if not DOCKER.fullmatch(c)] == []
    languages = set(re.findall(r"```(\w*)\n.*?```", PAGE, re.DOTALL))
    assert languages == {"sh", "sql", "ini", "caddyfile"}


@pytest.mark.parametrize("command", ENDING)
def test_a_command_of_the_page_succeeds(tree, reader, command):
    """It runs in a new copy of the tree."""
    ended = subprocess.run(
        ["bash", "-c", ENDING[command].format(command)],
        cwd=tree,
        env=reader,
        capture_output=True,
        text=True,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_another_port_serves(tree, reader):
    """The API answers on the port that the page tells it to use."""
    port = servers.free_port()
    command = ANOTHER_PORT.replace("8001", str(port))
    server = shell(command, tree, reader, port=port, ready=serves(port))

    with servers.running(server):
        assert f"http://127.0.0.1:{port}/docs" in server.text()


def test_the_api_is_served_below_a_path(tree, reader, embedded, http):
    """A proxy strips the path from calls; the answers have it."""
    port = servers.free_port()
    env = reader | environment(embedded) | {"UVICORN_PORT": str(port)}
    server = shell(BELOW_A_PATH, tree, env, port=port, ready=serves(port))

    with servers.running(server):
        created = User(http(server), "ada@example.com").create()
        page = http(server).get("/docs").text

    assert created.headers["location"].startswith("/shop/orders/")
    assert "'/shop/openapi.json'" in page


@pytest.mark.parametrize(
    "commands", [STACK, COMPOSED], ids=["page", "compose"]
)
def test_the_production_commands_process_an_order(
    production, stack, databases, tree, reader, http, commands
):
    """They start on an empty database; the image's health check agrees."""
    migrate, api, worker = commands
    name = f"page{next(databases)}"
    empty = stack.copy_database(name, "template1")
    settings = replace(production, database_url=empty)
    port = servers.free_port()
    env = reader | environment(settings)
    env |= dict.fromkeys(("APP_PORT", "UVICORN_PORT"), str(port))
    subprocess.run(["bash", "-c", migrate], cwd=tree, env=env, check=True)
    check = re.search(r"^HEALTHCHECK .*\\\n +CMD (.*)$", DOCKERFILE, re.M)[1]
    assert "kill -9 -1;" in check  # everything in its container: not here
    health = ["sh", "-c", check.replace("kill -9 -1;", "true;")]

    with (
        servers.running(
            shell(api, tree, env, port=port, ready=serves(port))
        ) as server,
        servers.running(
            shell(worker, tree, env, port=0, ready=lambda: True)
        ) as reading,
    ):
        ada = User(http(server), "ada@example.com")
        order_id = ada.order()
        servers.wait_until(lambda: ada.processed(order_id), 20)
        subprocess.run(health, env=env, check=True)
        look = shlex.split(LOOK.replace(":8000/", f":{port}/"))
        ready = json.loads(subprocess.check_output(look))

    assert ready["status"] == "ok"
    assert processed_lines(reading.text(), order_id) == 1
    assert subprocess.run(health, env=env, capture_output=True).returncode != 0


# --- The stack --------------------------------------------------------------


def test_the_example_is_usable_once_its_secrets_are_filled_in(tree, reader):
    """As it is copied nothing starts, and the first reason is named."""
    subprocess.run(shlex.split(SET_UP), cwd=tree, check=True)
    subprocess.run(shlex.split(PRIVATE), cwd=tree, check=True)
    copied = (tree / ".env").read_text()
    shown = set(re.findall("`(openssl [^`]+)`", copied))
    secrets = [subprocess.check_output(shlex.split(each)) for each in shown]
    show = "from orders.settings import *; s = load_settings()"
    show += "; print(s.database_url, s.rabbitmq_url)"
    load = [sys.executable, "-c", show]
    env = {"PATH": reader["PATH"], "PYTHONPATH": str(tree)}
    options = {"cwd": tree, "env": env, "capture_output": True, "text": True}

    refused = subprocess.run(load, **options)
    filled, places = re.subn(r"(?m)^(\w+)=$", rf"\1={SECRET}", copied)
    for optional in ("FORWARDED_ALLOW_IPS", "STAFF_USER_IDS"):
        filled = filled.replace(f"{optional}={SECRET}", "")
    (tree / ".env").write_text(filled)
    accepted = subprocess.run(load, **options)

    assert all(secrets)
    assert refused.returncode == 3
    assert re.match(r"orders cannot start: \w+ is not ", refused.stderr)
    assert places == 5  # three secrets, nobody's proxy, and no staff
    assert accepted.returncode == 0, accepted.stderr
    assert "5ec2e7@postgres:5432" in accepted.stdout
    assert "5ec2e7@rabbitmq:5672" in accepted.stdout
    needed = set(re.findall(r"\$\{(\w+)", str(COMPOSE)))
    assert needed <= dotenv_values(tree / ".env").keys()
    for name in re.findall(r"(?m)^(\w+(?:KEY|PASSWORD))=$", copied):
        assert f"${{{name}:?" in str(COMPOSE)


def test_compose_and_the_example_name_what_exists():
    """Hosts, users and databases agree; so do the files of the image."""
    example = dotenv_values(ROOT / ".env.example")
    names = ("DATABASE_URL", "REDIS_URL", "RABBITMQ_URL")
    database, cache, broker = (urlsplit(example[name]) for name in names)
    hosts = [url.hostname for url in (database, cache, broker)]
    made = {
        key: value
        for name in hosts
        for key, value in SERVICES[name].get("environment", {}).items()
    }

    assert hosts == ["postgres", "redis", "rabbitmq"]
    assert database.username == made["POSTGRES_USER"]
    assert database.path == f"/{made['POSTGRES_DB']}"
    assert broker.username == made["RABBITMQ_DEFAULT_USER"]
    for service in SERVICES.values():
        for name, need in service.get("depends_on", {}).items():
            healthy = need["condition"] == "service_healthy"
            assert healthy == ("test" in SERVICES[name].get("healthcheck", {}))
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"]
    let_in = (ROOT / ".dockerignore").read_text().split()
    for sources in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert f"!{source}" in let_in


def test_the_commands_of_docker_fit_the_stack():
    """Users, databases, the image, its folder and its port are the stack's."""
    shown = "\n".join(shown_commands())
    postgres = SERVICES["postgres"]["environment"]
    rabbitmq = SERVICES["rabbitmq"]["environment"]
    image = COMPOSE["x-orders"]["image"]
    folder = re.findall("(?m)^WORKDIR (.*)$", DOCKERFILE)[-1]
    (start,) = re.findall("docker run -d .*", shown)

    assert set(re.findall(r"-U (\S+)", shown)) == {postgres["POSTGRES_USER"]}
    assert set(re.findall(r"(?:-d|-Fc) (\w+)", shown)) >= {
        postgres["POSTGRES_DB"]
    }
    assert set(re.findall(r"change_password (\w+)", shown)) == {
        rabbitmq["RABBITMQ_DEFAULT_USER"]
    }
    assert f"docker build -t {image} ." in shown
    assert start.endswith(f" -v orders:{folder} {image}")
    for option in ("--init", "--name orders", "--restart unless-stopped"):
        assert f" {option} " in start
    (exposed,) = re.findall("(?m)^EXPOSE (.*)$", DOCKERFILE)
    assert f" -p 127.0.0.1:{exposed}:{exposed} " in start
    assert SERVICES["api"]["ports"][0]["target"] == int(exposed)


def test_the_number_of_workers_outlives_an_update():
    """It stands in .env: an option would have to be given each time."""
    replicas = SERVICES["worker"]["deploy"]["replicas"]
    default = dotenv_values(ROOT / ".env.example")["WORKERS"]

    assert replicas == f"${{WORKERS:-{default}}}"
    assert "container_name" not in SERVICES["worker"]
    assert "`WORKERS=2`" in PAGE


def test_only_a_worker_that_hangs_is_killed(tmp_path):
    """Its check waits for the file of the worker, and looks at it twice."""
    shown = SERVICES["worker"]["healthcheck"]["test"][1]
    alive = tmp_path / "worker-alive"
    check = shown.replace("/tmp/worker-alive", str(alive))
    check = check.replace("sleep 30", "touch slept")
    assert "kill -9 -1" in check  # everything in its container: not here
    check = check.replace("kill -9 -1", "touch killed")

    def look():
        """Return the exit status of a check, and what it did."""
        done = subprocess.run(["sh", "-c", check], cwd=tmp_path)
        did = {path.name for path in tmp_path.iterdir()} - {alive.name}
        return done.returncode, did

    assert look() == (1, set())  # it has not begun
    alive.touch()
    assert look() == (0, set())
    os.utime(alive, (1, 1))
    assert look() == (1, {"slept", "killed"})


def seconds(text):
    """Return a time of compose.yaml or of the Dockerfile in seconds."""
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


def test_the_page_says_when_what_hangs_is_killed():
    """The times follow from the two health checks."""
    image = re.search(r"(?m)^HEALTHCHECK (.*)\\\n +CMD (.*)$", DOCKERFILE)
    interval = seconds(re.search(r"--interval=(\w+)", image[1])[1])
    wait = int(re.search(r"timeout (\d+) ", image[2])[1])
    api = f"{wait} to {wait + interval} s"
    check = SERVICES["worker"]["healthcheck"]
    minutes = int(re.search(r"-mmin -(\d+)", check["test"][1])[1])
    pause = int(re.search(r"sleep (\d+)", check["test"][1])[1])
    soonest = 60 * minutes + pause
    latest = soonest + seconds(check["interval"])
    worker = f"{soonest} to {latest} s"

    assert pause < seconds(check["timeout"])
    assert wait < seconds(re.search(r"--timeout=(\w+)", image[1])[1])
    start = " ".join(section("With Docker Compose", PAGE).split())
    outages = section("Outages", PAGE)
    assert f"API is killed after {api} and a hung worker after {worker}" in (
        start
    )
    assert api in outages
    assert worker in outages


# --- Back up, restore -------------------------------------------------------

STAND_IN = """\
#!/bin/bash
# Run here what Docker would run in a container, and do nothing more.
if [ "$1 $2" = "compose exec" ]; then
    shift 2
    [ "$1" != -T ] || shift
    shift # the service
    exec "$@"
elif [ "$1" = exec ] || [ "$1" = run ]; then
    until [ "$1" = orders ]; do shift; done
    shift # the container, or the image
    cd container
    exec "$@"
fi
"""


@pytest.fixture
def typed(tmp_path):
    """Return what types a block of commands where Docker is a stand-in."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    docker = binaries / "docker"
    docker.write_text(STAND_IN)
    docker.chmod(0o755)
    (tmp_path / "container").mkdir()

    def run(block, **env):
        """Run the commands; fail when one of them does."""
        ours = servers.without_coverage() | {
            "UV_PROJECT": str(ROOT),
            "UV_PROJECT_ENVIRONMENT": sys.prefix,
            "UV_NO_SYNC": "1",
        }
        path = [binaries, servers.postgres_binaries(), servers.RABBITMQ.parent]
        env["PATH"] = ":".join([*map(str, path), ours["PATH"]])
        return subprocess.run(
            ["bash", "-euc", block],
            cwd=tmp_path,
            env={**ours, **env},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    return run


def test_a_dump_is_private_and_brings_the_orders_back(
    private_postgres, typed, tmp_path
):
    """What was made after the dump is gone, and all else is there."""
    postgres, settings = private_postgres
    dump, restore = blocks("sh", "Back up and restore")[:2]
    env = {"PGHOST": "127.0.0.1", "PGPORT": str(postgres.port)}
    with psycopg.connect(settings.database_url, autocommit=True) as admin:
        admin.execute("CREATE ROLE orders SUPERUSER LOGIN")

    with TestClient(create_app(settings)) as client:
        ada = User(client, "ada@example.com")
        kept = ada.order()
        typed(dump, **env)
        lost = ada.order()
    typed(restore, **env)
    with TestClient(create_app(settings)) as client:
        ada.client = client
        found = [ada.get(order).status_code for order in (kept, lost)]

    assert found == [200, 404]
    assert (tmp_path / "orders.dump").stat().st_mode & 0o077 == 0


def test_a_copy_of_the_embedded_database_brings_the_orders_back(
    typed, tmp_path, http
):
    """It is taken while the service runs."""
    back_up, restore = blocks("sh", "Back up and restore")[2:]
    server = servers.orders(tmp_path / "container")

    with servers.running(server):
        ada = User(http(server), "ada@example.com")
        kept = ada.order()
        typed(back_up)
        lost = ada.order()
        server.stop()
        typed(restore)
        server.start()
        found = [ada.get(order).status_code for order in (kept, lost)]

    assert found == [200, 404]
    assert (tmp_path / "backup.db").stat().st_mode & 0o077 == 0


def test_git_ignores_what_holds_passwords():
    """Dumps, copies, databases and secrets that the page tells to make."""
    ignored = (ROOT / ".gitignore").read_text().split()
    made = re.findall(r"> (\S+\.(?:dump|db))\b", PAGE)

    assert len(made) >= 2
    for name in {*made, ".env", "orders.db", "orders.db-wal"}:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in ignored), name


# --- Rights, queues, statements ---------------------------------------------


@pytest.fixture
def least(production, stack, typed):
    """Return settings whose users have the rights on the page, no more."""
    (grants,) = blocks("sql", "Rights")
    broker, _, cache = blocks("sh", "Rights")
    with psycopg.connect(production.database_url, autocommit=True) as owner:
        owner.execute(grants)
    typed(broker, **stack.rabbitmq.env)
    typed(cache.replace("redis-cli", f"redis-cli -p {stack.redis.port}"))
    login = "orders_app:made-up@127.0.0.1"
    name = production.database_url.rpartition("/")[2]
    yield replace(
        production,
        database_url=f"postgresql://{login}:{stack.postgres.port}/{name}",
        redis_url=f"redis://{login}:{stack.redis.port}/1",
        rabbitmq_url=f"amqp://{login}:{stack.rabbitmq.port}/%2F",
    )
    servers.rabbitmqctl(stack.rabbitmq, "delete_user", "orders_app")
    with redis.Redis(port=stack.redis.port) as client:
        client.acl_deluser("orders_app")
    with psycopg.connect(production.database_url, autocommit=True) as owner:
        owner.execute("DROP OWNED BY orders_app; DROP ROLE orders_app")


@pytest.mark.long
def test_the_rights_on_the_page_are_enough(
    least, stack, typed, tmp_path, http
):
    """An order is made, cached, counted, changed and processed with them.

    With those for a look into the workers a worker answers.
    """
    env = environment(least) | {"RATE_LIMIT": "100/minute"}
    with (
        servers.running(servers.orders(tmp_path, env)) as api,
        servers.running(servers.worker(tmp_path, env)) as worker,
    ):
        client = http(api)
        ada = User(client, "ada@example.com")
        servers.wait_until(
            lambda: client.get("/ready").json()["status"] == "ok", 10
        )
        order_id = ada.order()
        ada.get(order_id)
        cached = ada.get(order_id)
        changed = ada.change(order_id, "PAID")
        servers.wait_until(lambda: ada.processed(order_id), 15)
        said = api.text() + worker.text()
        with redis.Redis(port=stack.redis.port, db=1) as owner:
            refused = owner.acl_log()
            counted = owner.keys("LIMITER*")
        typed(blocks("sh", "Rights")[1], **stack.rabbitmq.env)
        answered = typed(INSPECT, **env)

    assert cached.headers["x-cache"] == "hit"
    assert changed.status_code == 200
    assert refused == []
    assert len(counted) == 1
    assert "pong" in answered
    # Of a worker that runs as root, which it should not, Celery warns.
    lines = re.findall(".* (?:WARNING|ERROR) .*", said)
    assert [line for line in lines if "superuser" not in line] == []


@pytest.mark.long
def test_the_queues_and_the_dead_letters_are_listed(production, stack, typed):
    """The two commands do what the page says of them."""
    look = blocks("sh", "What to watch")[0]
    (dead,) = blocks("sh", "Dead letters")
    parameters = pika.URLParameters(production.rabbitmq_url)
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        for queue in QUEUE_ARGUMENTS:
            channel.queue_declare(
                queue, durable=True, arguments=QUEUE_ARGUMENTS[queue]
            )
            channel.queue_purge(queue)
        channel.confirm_delivery()
        channel.basic_publish("", QUEUE, b"{}")
        found, *_ = channel.basic_get(QUEUE)
        channel.basic_reject(found.delivery_tag, requeue=False)

        # RabbitMQ counts a queue only now and then.
        expected = ["orders.dead", "1", "0", "0"]
        servers.wait_until(
            lambda: (
                expected
                in [
                    line.split()
                    for line in typed(look, **stack.rabbitmq.env).splitlines()
                ]
            ),
            20,
        )
    listed = typed(dead, **environment(production))

    assert "1 dead letters" in listed


def test_the_page_says_how_many_dead_letters_are_kept():
    """RabbitMQ drops the oldest of more."""
    kept = QUEUE_ARGUMENTS[DEAD_LETTERS]["x-max-length"]

    assert f"the last {kept:,} of them" in section("Dead letters", PAGE)


@pytest.mark.long
def test_the_page_prunes_what_it_says(production, typed):
    """The one command counts what is old; the other deletes it, no more."""
    (commands,) = blocks("sh", "Prune")
    with TestClient(create_app(production)) as client:
        ada = User(client, "ada@example.com")
        old, waiting, young = (ada.order() for _ in range(3))
        with psycopg.connect(
            production.database_url, autocommit=True
        ) as database:
            for order, days in (old, 400), (waiting, 400), (young, 300):
                database.execute(
                    "UPDATE orders SET created_at = now() - %s WHERE id = %s",
                    (timedelta(days), order),
                )
                database.execute(
                    "UPDATE events SET processed_at = now() - %s"
                    " WHERE order_id = %s AND order_id <> %s",
                    (timedelta(days), order, waiting),
                )
            said = typed(commands, **environment(production))
            rows = database.execute("SELECT id FROM orders").fetchall()

    assert "1 orders would be pruned." in said
    assert "1 orders pruned." in said
    assert {str(row[0]) for row in rows} == {waiting, young}


# --- What the page says -----------------------------------------------------


def test_the_settings_table_names_every_variable_and_no_other():
    """With the default that it has in the code."""
    rows = re.findall(
        r"^\| `([A-Z_]+)` \| (?:`([^`]*)` )?\| \S",
        section("Settings", PAGE),
        re.M,
    )
    defaults = {
        name.upper(): "" if field.default is None else str(field.default)
        for name, field in Settings.model_fields.items()
    }

    assert dict(rows) == defaults
    assert len(rows) == len(defaults)


def test_the_variables_of_compose_alone_are_named():
    """They are in .env.example, and no setting of the service."""
    example = dotenv_values(ROOT / ".env.example").keys()
    ours = {name.upper() for name in Settings.model_fields}
    last = section("Settings", PAGE).strip().rpartition("\n\n")[2]

    assert set(re.findall("`([A-Z_]+)`", last)) == example - ours


def test_the_page_explains_every_state_of_readiness():
    """Each member of /ready with each of its values."""
    member, said = "", set()
    for name, states in re.findall(
        r"^\| (?:`(\w+)` )?\| ((?:`\w+`(?: or )?)+) \|",
        section("What to watch", PAGE),
        re.MULTILINE,
    ):
        member = name or member
        said |= {(member, value) for value in re.findall(r"`(\w+)`", states)}

    assert said == {
        (name, value)
        for name, field in Readiness.model_fields.items()
        for value in get_args(field.annotation)
    }


UNITS = {"s": 1, "h": 3600, "connections": 1, "orders": 1, "events": 1}
CONSTANT = r"`(\w+)\.py`: `([A-Z_]+)`"


def test_each_number_with_a_name_has_its_value():
    """Such as 30 s with the name FIRST_LEASE of `events.py`."""
    text = " ".join(PAGE.split())
    numbers = re.findall(rf"([\d.,]+) (\w+) \({CONSTANT}", text)
    wrong = [
        (number, unit, name)
        for number, unit, module, name in numbers
        if not any(
            float(number.replace(",", "")) * UNITS[unit] in values(node)
            for node in definitions(f"{module}.py")[name]
        )
    ]

    assert wrong == []
    named = re.findall(CONSTANT, text)
    assert [name for *_, name in numbers] == [name for _, name in named]


def test_the_page_says_when_a_lost_message_comes_again():
    """The time follows from the lease and from the pauses of the relay."""
    lease = (FIRST_LEASE + AHEAD).total_seconds()
    latest = lease + SWEEP_INTERVAL + 2 * POLL_INTERVAL
    text = " ".join(PAGE.split())
    stated = {int(number) for number in re.findall(r"up to (3\d) s", text)}

    assert stated == {38}
    assert latest <= 38
    assert "about 35 s" in text
    assert lease < 35 < latest
    assert timedelta(hours=1) == LAST_LEASE


def test_the_proxy_closes_idle_connections_first():
    """Otherwise it may send a call just when the API closes the connection."""
    (proxy,) = blocks("caddyfile", "A proxy in front")
    keeps = int(re.search(r"keepalive (\d+)s", proxy)[1])

    assert keeps < KEEP_ALIVE
    assert f"less than the {KEEP_ALIVE} s of the API" in proxy


@pytest.mark.fault
def test_cached_orders_are_read_while_the_database_hangs(
    private_postgres, run, http
):
    """After the first seconds, in which the fault is not yet known."""
    postgres, settings = private_postgres
    ada = User(http(run(servers.api, settings)), "ada@example.com")
    order_id = ada.order()
    servers.wait_until(lambda: ada.get(order_id).headers["x-cache"] == "hit")
    try:
        postgres.signal(signal.SIGSTOP)
        time.sleep(4)
        read = []
        for _ in range(30):
            read.append(ada.get(order_id).status_code)
            time.sleep(0.1)
    finally:
        postgres.signal(signal.SIGCONT)

    assert read == [200] * 30


def test_every_outage_names_a_test():
    """Each row was tried, and is tried again."""
    tests = [
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    ]
    rows = re.findall(
        r"^\| [A-Z].*\| (.*) \|$", section("Outages", PAGE), re.M
    )

    assert len(rows) == section("Outages", PAGE).count("\n|") - 2
    for row in rows:
        named = re.findall(r"`(\w+)`", row)
        assert named
        assert [n for n in named if not any(n in t for t in tests)] == []


def test_the_page_on_security_is_short():
    """Whoever found a hole knows in ten lines how to report it."""
    text = (ROOT / ".github" / "SECURITY.md").read_text()

    assert len(text.splitlines()) <= 10
    assert "Report a vulnerability" in text


def test_the_workflow_runs_no_action_that_can_change():
    """A tag can be moved to other code, a commit cannot."""
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    used = re.findall(r"uses: (.*)", text)

    assert used
    for action in used:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action)
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}


# --- Troubleshooting --------------------------------------------------------


def troubles():
    """Return the status, if any, and the message of each row."""
    rows = section("Troubleshooting", PAGE)
    return re.findall(r"^\| (\d{3} |)`([^`]+)`", rows, re.MULTILINE)


def at_start(*command, **env):
    """Return what tells the output of a program that cannot start."""

    def start(request):
        """Start it in an empty folder."""
        folder = request.getfixturevalue("tmp_path")
        ended = run_to_its_end(folder, command, **env)
        assert ended.returncode != 0
        return ended.stdout + ended.stderr

    return start


def on_a_taken_port(request):
    """Start where another program listens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        return at_start("orders", APP_PORT=str(port))(request)


def answer(settings, calls=1, minutes=30):
    """Return the answer to a user's last call, with a token for minutes."""
    with TestClient(create_app(settings)) as client:
        issuer = replace(settings, jwt_expire_minutes=minutes)
        token = auth.Accounts(None, issuer).issue_token(1).access_token
        headers = {"Authorization": f"Bearer {token}"}
        for _ in range(calls):
            last = client.get("/orders/user/1", headers=headers)
    return f"{last.status_code} {last.json()['detail']}"


def limited(request):
    """Call once too often."""
    settings = request.getfixturevalue("embedded")
    return answer(replace(settings, rate_limit="5/minute"), calls=6)


def expired(request):
    """Call with an old token."""
    return answer(request.getfixturevalue("embedded"), minutes=-1)


def without_a_database(request):
    """Call while nobody listens there."""
    settings = request.getfixturevalue("embedded")
    return answer(replace(settings, database_url=NOBODY["postgresql"]))


def log_until(request, settings, wanted):
    """Return the log of the app, up to what is wanted."""
    caplog = request.getfixturevalue("caplog")
    with TestClient(create_app(settings)):
        servers.wait_until(lambda: wanted in caplog.text, 20)
    return caplog.text


def without_a_broker(request):
    """Start while nobody listens there."""
    settings = request.getfixturevalue("embedded")
    url = NOBODY["amqp"]
    return log_until(request, replace(settings, rabbitmq_url=url), "away")


def without_tables(request):
    """Start on a database that nobody migrated."""
    settings = request.getfixturevalue("production")
    url = request.getfixturevalue("stack").database_url("postgres")
    return log_until(request, replace(settings, database_url=url), "failed")


def with_another_queue(request):
    """Start when the queue is of another kind; the mend is tried, too."""
    rabbitmq, settings = request.getfixturevalue("private_rabbitmq")
    parameters = pika.URLParameters(settings.rabbitmq_url)
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        channel.queue_delete(QUEUE)  # of another test's
        channel.queue_declare(QUEUE, durable=True)
    printed = log_until(request, settings, "away")
    control, *arguments = shlex.split(DELETE_QUEUE)
    control = servers.RABBITMQ.with_name(control)
    subprocess.run([control, *arguments], env=rabbitmq.env, check=True)
    with TestClient(create_app(settings)) as client:
        servers.wait_until(
            lambda: client.get("/ready").json()["broker"] == "ok"
        )
    return printed


def with_a_worker_cut_off(request):
    """Cut the connection between a worker and RabbitMQ."""
    settings, stack, run = map(
        request.getfixturevalue, ("production", "stack", "run")
    )
    with proxying(stack.rabbitmq) as proxy:
        behind = through(proxy, settings, stack.rabbitmq)
        worker = run(servers.worker, behind)
        proxy.end_present()
        servers.wait_until(lambda: "lost" in worker.text(), 20)
    return worker.text()


def without_redis(request):
    """Start while nobody listens there."""
    settings = request.getfixturevalue("embedded")
    url = NOBODY["redis"]
    return log_until(request, replace(settings, redis_url=url), "away")


def with_another_password(request):
    """Start with a password that RabbitMQ does not know."""
    settings = request.getfixturevalue("production")
    url = settings.rabbitmq_url.replace(servers.BROKER_PASSWORD, "another")
    return log_until(request, replace(settings, rabbitmq_url=url), "away")


def with_a_lost_message(request):
    """Start when an event was delivered long ago, and not processed."""
    settings = request.getfixturevalue("embedded")
    with TestClient(create_app(settings)) as client:
        User(client, "ada@example.com").order()
    path = settings.database_url.removeprefix("sqlite:///")
    with sqlite3.connect(path) as connection:
        connection.execute(
            "UPDATE events SET attempts = 1, processed_at = NULL,"
            " due_at = '2020-01-01 00:00:00.000000'"
        )
    connection.close()
    return log_until(request, settings, "in time")


NOBODY = {
    scheme: f"{scheme}://127.0.0.1:1/0"
    for scheme in ("postgresql", "amqp", "redis")
}
PROVOKED = {
    "orders cannot start: JWT_SECRET_KEY is not set": at_start(
        "uvicorn", "orders.api:app", JWT_SECRET_KEY=""
    ),
    "orders cannot start: DATABASE_URL: …Connection refused": at_start(
        "orders", DATABASE_URL=NOBODY["postgresql"]
    ),
    "orders cannot start: RABBITMQ_URL is not set": at_start(
        "celery", "-A", "orders.tasks", "worker"
    ),
    "address already in use": on_a_taken_port,
    "More than 5 per 1 minute": limited,
    "Send a valid token": expired,
    "The database is away": without_a_database,
    'relation "events" does not exist': without_tables,
    "RabbitMQ is away": without_a_broker,
    "Connection to broker lost": with_a_worker_cut_off,
    "Redis is away": without_redis,
    "PRECONDITION_FAILED … inequivalent arg": with_another_queue,
    "ACCESS_REFUSED": with_another_password,
    "were not processed in time": with_a_lost_message,
}
# What Docker prints, or a container that keeps another password.
BY_DOCKER = {
    "required variable … is missing a value: fill it in .env",
    'password authentication failed for user "orders"',
    'service "migrate" didn\'t complete successfully',
    "start_interval requires Docker Engine v25",
}


def test_every_trouble_has_a_case():
    """A new row of the table is provoked here."""
    rows = section("Troubleshooting", PAGE)

    assert len(troubles()) == rows.count("\n|") - 2
    assert {message for _, message in troubles()} == (
        PROVOKED.keys() | BY_DOCKER
    )


@pytest.mark.parametrize(
    ("status", "message"),
    [
        pytest.param(
            *row,
            marks=pytest.mark.fault  # the broker is another one
            if PROVOKED[row[1]] is with_another_queue
            else (),
        )
        for row in troubles()
        if row[1] not in BY_DOCKER
    ],
)
def test_a_trouble_is_printed_as_quoted(request, status, message):
    """A search of the page for what is seen finds the row."""
    printed = PROVOKED[message](request)

    pattern = re.escape(status + message).replace("…", ".*")
    assert re.search(pattern, printed), printed
