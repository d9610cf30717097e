"""The configuration: what is read, and what is refused with a mend."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from orders.settings import PARSERS, SettingsError, parse_settings

SECRET = "0123456789abcdef" * 4


def parse(**environ):
    """Return the settings for an environment with a good secret."""
    return parse_settings({"JWT_SECRET_KEY": SECRET, **environ})


def test_nothing_but_a_secret_is_needed():
    """The defaults are the embedded mode, on this machine only."""
    settings = parse(DATABASE_URL="", REDIS_URL="", CORS_ORIGINS="")

    assert settings.database_url.startswith("sqlite:")
    assert settings.redis_url is settings.rabbitmq_url is None
    assert settings.app_host == "127.0.0.1"
    assert settings.rate_limit == "5/minute"
    assert settings.cors_origins == ("*",)


def test_an_empty_rate_limit_turns_it_off():
    """Empty is not unset here."""
    assert parse(RATE_LIMIT="").rate_limit == ""


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
        ("DATABASE_URL", "postgresql://u:p@h:port/x"),
        ("DATABASE_URL", "orders.db"),
        ("REDIS_URL", "http://x"),
        ("REDIS_URL", "redis://"),
        ("RABBITMQ_URL", "redis://x"),
        ("APP_PORT", "0"),
        ("APP_PORT", "99999"),
        ("RATE_LIMIT", "banana"),
        ("RATE_LIMIT", "0/minute"),
        ("CORS_ORIGINS", "shop"),
    ],
)
def test_a_senseless_value_is_refused_by_name(name, value):
    """The error names the variable, and keeps passwords to itself."""
    with pytest.raises(SettingsError, match=f"^{name} ") as refused:
        parse(**{name: value})

    assert "u:p@" not in str(refused.value)


def said_at_start(folder, command, **env):
    """Return what a program prints that cannot start."""
    program, *arguments = command
    ended = subprocess.run(
        [Path(sys.executable).parent / program, *arguments],
        cwd=folder,
        env={**os.environ, "JWT_SECRET_KEY": SECRET, **env},
        capture_output=True,
        text=True,
        timeout=30,
    )
    # The parent of several workers ends without an error of its own.
    assert ended.returncode != 0 or "--workers" in command
    return ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("command", "variable"),
    [
        (["uvicorn", "orders.api:app"], "JWT_SECRET_KEY"),
        (["uvicorn", "orders.api:app", "--workers", "2"], "JWT_SECRET_KEY"),
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


def test_the_first_run_writes_a_private_env_file(tmp_path, monkeypatch):
    """Later runs keep it."""
    from orders.__main__ import write_env_file

    monkeypatch.chdir(tmp_path)
    write_env_file()
    first = Path(".env").read_text()
    write_env_file()

    assert stat.S_IMODE(Path(".env").stat().st_mode) == 0o600
    assert Path(".env").read_text() == first
    secret = first.rsplit("=", 1)[1].strip()
    assert parse(JWT_SECRET_KEY=secret).jwt_secret_key == secret


def test_the_example_names_every_variable_and_no_other():
    """.env.example is what the service reads, and compose's passwords."""
    lines = Path(__file__).with_name("..").joinpath(".env.example")
    names = {
        line.split("=")[0]
        for line in lines.read_text().splitlines()
        if line and not line.startswith("#")
    }

    assert names - set(PARSERS) == {"POSTGRES_PASSWORD", "RABBITMQ_PASSWORD"}
    assert set(PARSERS) <= names
