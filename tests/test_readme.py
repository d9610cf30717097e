"""The README tells the truth: what it shows is run, its names looked up.

Each command in it has a case here, or the first test fails. They run in a
copy of the tree, as a reader runs them, except for what would change the
machine or take minutes: its case adds an option that keeps it from that.
Docker cannot be counted on. Its commands are compared with `compose.yaml`,
and the commands in that file run without it; the images are not tried.
"""

import re
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import sysconfig
from pathlib import Path
from urllib.parse import urlsplit

import pika
import pytest
import servers
import yaml
from conftest import User, environment, replace
from dotenv import dotenv_values
from fastapi.testclient import TestClient
from test_journey import orders_command, processed_lines
from test_settings import said_at_start

from orders import auth
from orders.api import create_app
from orders.broker import QUEUE

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
BYTECODE = {"__pycache__", "*.py[cod]"}
VOLATILE = {
    r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}": "<uuid>",
    r"\d{4}-\d\d-\d\dT[0-9:.]+Z": "<time>",
    r"in \d+ seconds": "in <n> seconds",
}


# --- Commands ---------------------------------------------------------------

ONE_TEST = "tests/test_settings.py -k nothing_but_a_secret"
# Commands that end, and how each is run: `{}` is the command.
ENDING = {
    ".ci/run": "bash -n {}",
    "apt-get install postgresql redis-server rabbitmq-server chromium"
    " chromium-driver": "{} --simulate",
    # Debian's own pip refuses to install, even when it only would.
    "pip install uv": "PIP_BREAK_SYSTEM_PACKAGES=1 {} --dry-run",
    "uv add NAME": "{} --frozen",
    "uv run alembic revision --autogenerate -m TEXT": (
        "uv run alembic upgrade head && {}"
    ),
    "uv run alembic revision -m returned": "uv run alembic upgrade head && {}",
    'uv run alembic revision --autogenerate -m "order note"': (
        "uv run alembic upgrade head && {}"
    ),
    "uv run python tests/benchmark.py": "{} --rounds 1 --only start",
    "uv run pytest": f"{{}} {ONE_TEST}",
    "uv run pytest --all --cov=orders": f"{{}} {ONE_TEST}",
    "uv run pytest --all -k NAME": f"{{}} {ONE_TEST}",
    "uv run mypy": "{}",
    "uv sync --extra opentelemetry": "{} --dry-run",
    "uv run ruff check .": "{}",
    "uv run ruff format .": "{} --exit-non-zero-on-format",
}
SERVING = {
    "uv run orders",
    "APP_PORT=8001 uv run orders",
    "RATE_LIMIT= uv run orders",
    "uv run fastapi dev",
}
# The production stack without containers: migration, API, worker.
STACK = (
    "uv run alembic upgrade head",
    "WEB_CONCURRENCY=2 uv run orders",
    "uv run celery -A orders.tasks worker --loglevel=info",
)
SET_UP = "cp .env.example .env"
PRIVATE = "chmod 600 .env"
DELETE_QUEUE = "rabbitmqctl delete_queue orders"
SERVICES = "|".join(COMPOSE["services"])
# The subcommands that name services, and those that may stand alone.
DOCKER = re.compile(
    rf"docker compose (build|down|logs ({SERVICES})"
    rf"|up( -d)?( --wait| --no-deps)?( --scale)?( ({SERVICES})(=\d)?)?"
    rf"|(stop|start|pause|unpause|kill|restart)( ({SERVICES}))+"
    rf"|(run --rm|exec( -T)?) ({SERVICES})( .*)?)"
    r"|docker (run|inspect) .*"
)


def shown_commands():
    """Return every command in the README, but for those in a console."""
    prose = re.sub("```.*?```", "", README, flags=re.DOTALL)
    spans = (" ".join(s.split()) for s in re.findall("`([^`]+)`", prose))
    typed = [
        span
        for span in spans
        # Words after a program's name, or a program in the tree.
        if re.match(r"([A-Z_]+=\S* )*[a-z.][\w./-]* \S", span)
        or ((ROOT / span).is_file() and (ROOT / span).stat().st_mode & 0o100)
    ]
    for block in re.findall("```sh\n(.*?)```", README, re.DOTALL):
        typed += [line.partition("#")[0] for line in block.splitlines()]
    quoted = {message for _, message in troubles()}
    parts = {part.strip() for line in typed for part in line.split("&&")}
    return parts - quoted


@pytest.fixture
def tree(tmp_path):
    """Return a copy of the tree, without what git ignores but bytecode."""
    ignored = (ROOT / ".gitignore").read_text().split()
    patterns = {pattern.rstrip("/") for pattern in ignored}
    return shutil.copytree(
        ROOT,
        tmp_path / "orders",
        ignore=shutil.ignore_patterns(".git", *(patterns - BYTECODE)),
    )


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Return the environment of a reader: no setting, and nothing of ours."""
    env = servers.without_coverage()
    for name in ("JWT_SECRET_KEY", "VIRTUAL_ENV"):
        env.pop(name, None)
    venv = tmp_path_factory.mktemp("venv")
    env["UV_PROJECT_ENVIRONMENT"] = str(venv)
    subprocess.run(["uv", "sync", "--quiet"], cwd=ROOT, env=env, check=True)
    # And what is compiled already: to do it again takes ten seconds.
    packages = Path(sysconfig.get_path("purelib"))
    for cache in packages.rglob("__pycache__"):
        theirs = venv / cache.relative_to(sys.prefix)
        shutil.copytree(cache, theirs, dirs_exist_ok=True)
    cache = ROOT / ".mypy_cache"  # or it would read all libraries again
    return env | {"MYPY_CACHE_DIR": str(cache)}


def shell(command, folder, env, **options):
    """Return a command that serves as a process, run by a shell."""
    return servers.Server(
        ["bash", "-c", command], folder=folder, env=env, **options
    )


def serves(port):
    """Return what asks whether the API is there."""
    return lambda: servers.healthy(port)


def test_every_command_has_a_case():
    """Who adds a command to the README says here how it is tried."""
    known = {*ENDING, *SERVING, *STACK, SET_UP, PRIVATE, DELETE_QUEUE}
    shown = shown_commands()

    assert known - shown == set()
    assert [c for c in shown - known if not DOCKER.fullmatch(c)] == []
    languages = re.findall(r"```(\w*)\n.*?```", README, re.DOTALL)
    assert set(languages) == {"mermaid", "sh", "console", "ini", "caddyfile"}


@pytest.mark.long
@pytest.mark.parametrize("command", ENDING)
def test_a_command_of_the_readme_succeeds(tree, reader, command):
    """It runs in a new copy of the tree."""
    program = command.split()[0]
    if not (shutil.which(program) or (ROOT / program).exists()):
        pytest.skip(f"{program} is not on this machine")
    if "benchmark" in command and (lacking := servers.missing()):
        pytest.skip(f"apt-get install {' '.join(lacking)} to run this")

    ended = subprocess.run(
        ["bash", "-c", ENDING[command].format(command)],
        cwd=tree,
        env=reader,
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("command", sorted(SERVING))
def test_a_command_of_the_readme_serves(tree, reader, command):
    """It answers on the port that it is given."""
    port = servers.free_port()
    env = reader | {"APP_PORT": str(port)}
    command = command.replace("8001", str(port))
    if "fastapi" in command:
        command += f" --port {port}"
        env |= {"JWT_SECRET_KEY": "0123456789abcdef" * 4}
    server = shell(command, tree, env, port=port, ready=serves(port))

    with servers.running(server):
        assert f"http://127.0.0.1:{port}/docs" in server.text()


def test_the_example_is_usable_once_its_secrets_are_filled_in(tree, reader):
    """As it is copied nothing starts, and the first reason is named."""
    subprocess.run(shlex.split(SET_UP), cwd=tree, check=True)
    subprocess.run(shlex.split(PRIVATE), cwd=tree, check=True)
    copied = (tree / ".env").read_text()
    shown = set(re.findall("`(openssl [^`]+)`", copied))
    secrets = [subprocess.check_output(shlex.split(it)) for it in shown]
    show = "from orders.settings import *; s = load_settings()"
    show += "; print(s.database_url, s.rabbitmq_url)"
    load = [sys.executable, "-c", show]
    env = {"PATH": reader["PATH"], "PYTHONPATH": str(tree)}
    options = {"cwd": tree, "env": env, "capture_output": True, "text": True}

    refused = subprocess.run(load, **options)
    filled, places = re.subn(r"(?m)^(\w+)=$", rf"\1={'5ec2e7' * 8}", copied)
    (tree / ".env").write_text(filled)
    accepted = subprocess.run(load, **options)

    assert all(secrets)
    assert refused.returncode == 3
    assert "JWT_SECRET_KEY is not set" in refused.stderr
    assert places == 4  # three secrets, and nobody's proxy
    assert "5ec2e7@postgres:5432" in accepted.stdout
    assert "5ec2e7@rabbitmq:5672" in accepted.stdout
    needed = set(re.findall(r"\$\{(\w+)", str(COMPOSE)))
    assert needed <= dotenv_values(tree / ".env").keys()
    for name in re.findall(r"(?m)^(\w+(?:KEY|PASSWORD))=$", copied):
        assert f"${{{name}:?" in str(COMPOSE)


def test_compose_and_the_example_name_what_exists():
    """Hosts, users and databases agree; so do the files of the image."""
    services = COMPOSE["services"]
    example = dotenv_values(ROOT / ".env.example")
    names = ("DATABASE_URL", "REDIS_URL", "RABBITMQ_URL")
    database, cache, broker = (urlsplit(example[name]) for name in names)
    hosts = [url.hostname for url in (database, cache, broker)]
    made = {
        key: value
        for name in hosts
        for key, value in services[name].get("environment", {}).items()
    }

    assert hosts == ["postgres", "redis", "rabbitmq"]
    assert database.username == made["POSTGRES_USER"]
    assert database.path == f"/{made['POSTGRES_DB']}"
    assert broker.username == made["RABBITMQ_DEFAULT_USER"]
    for service in services.values():
        for name, need in service.get("depends_on", {}).items():
            healthy = need["condition"] == "service_healthy"
            assert healthy == ("test" in services[name].get("healthcheck", {}))
        for volume in service.get("volumes", []):
            assert volume.split(":")[0] in COMPOSE["volumes"]
    let_in = (ROOT / ".dockerignore").read_text().split()
    for sources in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert f"!{source}" in let_in


COMPOSED = tuple(
    shlex.join(COMPOSE["services"][name]["command"])
    for name in ("migrate", "api", "worker")
)


@pytest.mark.parametrize(
    "commands", [STACK, COMPOSED], ids=["README", "compose"]
)
def test_the_production_commands_process_an_order(
    production, stack, databases, tree, reader, http, commands
):
    """They start on an empty database; the image's health check agrees."""
    migrate, api, worker = commands
    name = f"readme{next(databases)}"
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

    assert processed_lines(reading.text(), order_id) == 1
    assert subprocess.run(health, env=env, capture_output=True).returncode != 0


# --- Troubleshooting --------------------------------------------------------


def troubles():
    """Return the status, if any, and the message of each row."""
    section = README.split("## Troubleshooting")[1].split("\n## ")[0]
    return re.findall(r"^\| (\d{3} |)`([^`]+)`", section, re.MULTILINE)


def at_start(*command, **env):
    """Return what tells the output of a program that cannot start."""
    return lambda request: said_at_start(
        request.getfixturevalue("tmp_path"), command, **env
    )


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
    """Who adds a row to the table says here how it is provoked."""
    section = README.split("## Troubleshooting")[1].split("\n## ")[0]

    assert len(troubles()) == section.count("\n|") - 2
    assert {message for _, message in troubles()} == (
        PROVOKED.keys() | BY_DOCKER
    )


@pytest.mark.parametrize(
    ("status", "message"),
    [row for row in troubles() if row[1] not in BY_DOCKER],
)
def test_a_trouble_is_printed_as_quoted(request, status, message):
    """Who searches the README for what they see finds it."""
    printed = PROVOKED[message](request)

    pattern = re.escape(status + message).replace("…", ".*")
    assert re.search(pattern, printed), printed


# --- The tutorial -----------------------------------------------------------


def settled(text):
    """Return the text without what differs from run to run."""
    for pattern, name in VOLATILE.items():
        text = re.sub(pattern, name, text)
    return text.strip()


@pytest.mark.parametrize(("number", "limit"), [(0, "5/minute"), (1, "")])
def test_the_first_order_goes_as_the_readme_shows(tmp_path, number, limit):
    """Every call is made in a shell, and its output compared."""
    blocks = re.findall("```console\n(.*?)```", README, re.DOTALL)[
        : number + 1
    ]
    scripts = [
        "\necho\n".join(re.findall(r"^\$ (.*)$", block, re.MULTILINE))
        for block in blocks
    ]
    expected = re.sub(r"^\$ .*\n", "", blocks[-1], flags=re.MULTILINE)

    server = orders_command(tmp_path, {"RATE_LIMIT": limit})
    with servers.running(server):
        script = "\necho ---\n".join(scripts)
        script = script.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")
        shell = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, timeout=60
        )

    printed = shell.stdout.rpartition("---\n")[2]
    lines = [line.rstrip() for line in printed.splitlines() if line]
    assert settled("\n".join(lines)) == settled(expected)


# --- What it says -----------------------------------------------------------


def test_every_file_and_name_of_the_readme_exists():
    """Who follows a name finds it."""
    for file, names in re.findall(r"`(\w+\.py)`: ([^|;\n)]+)", README):
        code = (ROOT / "orders" / file).read_text()
        for name in re.findall(r"`([\w.]+)`", names):
            if not name.endswith(".py"):
                assert name.rsplit(".")[-1] in code, name


def test_every_name_in_the_exercises_exists():
    """Who does one finds each thing where it is, but for what is to be new."""
    exercises = README.split("## Three exercises")[1].split("\n## ")[0]
    names = set(re.findall(r"`([A-Za-z_.]+)`", exercises))
    code = "".join(
        path.read_text()
        for folder in ("orders", "tests", "migrations")
        for path in (ROOT / folder).glob("**/*.py")
        if path != Path(__file__)
    )
    words = set(re.findall(r"\w+", code))
    absent = {n for n in names if n.rpartition(".")[2] not in words}

    assert absent == {"RETURNED", "server_default"}


def test_every_guarantee_names_a_test():
    """A promise without a test is none."""
    tests = [
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    ]
    guarantees = README.split("## Guarantees")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [A-Z].*\| (.*) \|$", guarantees, re.MULTILINE)

    assert rows
    for row in rows:
        named = re.findall(r"`(\w+)`", row)
        assert named
        assert [n for n in named if not any(n in t for t in tests)] == []


def test_the_readme_states_the_size_of_the_package():
    """Who plans an afternoon can rely on it, to a tenth."""
    files = list((ROOT / "orders").glob("*.py"))
    lines = sum(len(file.read_text().splitlines()) for file in files)
    stated = re.search(r"(\d+) files with about ([\d,]+) lines", README)

    assert stated
    assert int(stated[1]) == len(files)
    assert abs(int(stated[2].replace(",", "")) - lines) <= lines / 10
