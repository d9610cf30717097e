"""The configuration: what is read, and what is refused with a mend."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import servers

from orders.__main__ import write_env_file
from orders.settings import Settings, load_settings

SECRET = "0123456789abcdef" * 4
ROOT = Path(__file__).parent.parent
TOLD = "s3cr3t"  # a part of a password, which no message may hold


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
    ("name", "value"),
    [
        ("JWT_SECRET_KEY", ""),
        ("JWT_SECRET_KEY", "short"),
        ("JWT_SECRET_KEY", "change-me-to-something-long-enough-please"),
        ("JWT_ALGORITHM", "none"),
        ("JWT_ALGORITHM", "RS256"),
        ("JWT_EXPIRE_MINUTES", "-5"),
        ("JWT_EXPIRE_MINUTES", "soon"),
        ("DATABASE_URL", "mysql://x/y"),
        ("DATABASE_URL", f"postgresql://u:{TOLD}@h:port/x"),
        ("DATABASE_URL", "orders.db"),
        ("DATABASE_URL", "sqlite://"),
        ("DATABASE_URL", "sqlite:///"),
        ("DATABASE_URL", "sqlite:///:memory:"),
        ("DATABASE_URL", "sqlite:///file::memory:?uri=true"),
        ("REDIS_URL", "http://x"),
        ("REDIS_URL", "redis://"),
        ("REDIS_URL", "redis://h:99999"),
        ("RABBITMQ_URL", "redis://x"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}/{TOLD}@h:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:7/{TOLD}@h:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}@{TOLD}@h:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}#{TOLD}@h:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:{TOLD}?{TOLD}@h:5672/"),
        ("RABBITMQ_URL", f"amqp://orders:7?{TOLD}@h:5672/"),
        ("APP_PORT", "0"),
        ("APP_PORT", "99999"),
        ("RATE_LIMIT", "banana"),
        ("RATE_LIMIT", "0/minute"),
        ("CORS_ORIGINS", "shop"),
        ("CORS_ORIGINS", "https://shop.example/"),
        ("CORS_ORIGINS", "https://shop.example, shop"),
        ("CORS_ORIGINS", "https://shop.example,"),
    ],
)
def test_a_senseless_value_is_refused_by_name(refusal, name, value):
    """The one line names the variable, and keeps passwords to itself."""
    said = refusal(**{name: value})

    assert re.match(rf"{name}\b", said)
    assert TOLD not in said


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


def said_at_start(folder, command, **env):
    """Return what a program prints that cannot start."""
    program, *arguments = command
    port = str(servers.free_port())  # 8000 may be taken by `uv run orders`
    ports = {"APP_PORT": port, "UVICORN_PORT": port}
    ended = subprocess.run(
        [Path(sys.executable).parent / program, *arguments],
        cwd=folder,
        env={**os.environ, **ports, "JWT_SECRET_KEY": SECRET, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    # The parent of several workers ends without an error of its own.
    assert ended.returncode != 0 or "--workers" in command
    return ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("command", "variable"),
    [
        (["uvicorn", "orders.api:app", "--port", "0"], "JWT_SECRET_KEY"),
        (
            ["uvicorn", "orders.api:app", "--port", "0", "--workers", "2"],
            "JWT_SECRET_KEY",
        ),
        (["celery", "-A", "orders.tasks", "worker"], "RABBITMQ_URL"),
        (["orders"], "RATE_LIMIT"),
        (["orders"], "DATABASE_URL"),
    ],
)
def test_a_bad_setting_stops_the_start_with_one_line(
    tmp_path, command, variable
):
    """Whatever starts says what to mend, without a traceback."""
    bad = {
        "JWT_SECRET_KEY": {"JWT_SECRET_KEY": ""},
        "RABBITMQ_URL": {},
        "RATE_LIMIT": {"RATE_LIMIT": "banana"},
        "DATABASE_URL": {"DATABASE_URL": "postgresql://127.0.0.1:1/x"},
    }[variable]

    output = said_at_start(tmp_path, command, **bad)

    assert f"orders cannot start: {variable}" in output
    assert "Traceback" not in output


def test_several_processes_without_redis_warn_once(tmp_path):
    """Each counts calls and caches by itself: a person must know."""
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

    assert api.text().count("Without REDIS_URL each process") == 1


def test_one_process_without_redis_warns_nobody(tmp_path):
    """It counts and caches for all."""
    env = {"JWT_SECRET_KEY": SECRET}
    with servers.running(servers.api(tmp_path, env)) as api:
        pass

    assert "Without REDIS_URL" not in api.text()


def test_a_migration_that_cannot_enter_says_so_in_one_line(tmp_path):
    """No traceback of Alembic's: a person, or compose, tries again."""
    url = "postgresql://orders:never-told@127.0.0.1:1/x"

    ended = subprocess.run(
        [servers.PYTHON / "alembic", "upgrade", "head"],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url},
        capture_output=True,
        text=True,
        timeout=30,
    )

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
    """.env.example is what the service reads, and compose's passwords."""
    lines = ROOT.joinpath(".env.example").read_text().splitlines()
    names = {
        line.split("=")[0]
        for line in lines
        if line and not line.startswith("#")
    }

    read = {name.upper() for name in Settings.model_fields}
    assert names - read == {"POSTGRES_PASSWORD", "RABBITMQ_PASSWORD"}
    assert read - names == set()
