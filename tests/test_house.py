"""The rules that the code keeps about itself."""

import ast
import os
from pathlib import Path

import pytest
import servers
from alembic import command
from alembic.config import Config
from conftest import User
from fastapi.testclient import TestClient

import orders
from orders.__main__ import ALEMBIC_INI
from orders.api import create_app

PACKAGE = Path(orders.__file__).parent
# The reading order that the package's docstring gives.
LADDER = [
    line.split()[0]
    for line in (orders.__doc__ or "").splitlines()
    if line.split()[1:] and (PACKAGE / f"{line.split()[0]}.py").exists()
]
LONGEST_FUNCTION = 40  # lines


def trees():
    """Return every module of the package, parsed."""
    return {
        path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py")
    }


def test_every_file_is_in_the_reading_order():
    """Nobody has to guess where to go on."""
    assert sorted(LADDER) == sorted(trees().keys() - {"__init__"})


@pytest.mark.parametrize("name", LADDER)
def test_imports_run_downward_only(name):
    """A module imports only from those above it in the reading order."""
    for node in ast.walk(trees()[name]):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, module = node.module.partition(".")
            if package == "orders":
                imported = (
                    [module]
                    if module
                    else [alias.name for alias in node.names]
                )
                for each in imported:
                    assert LADDER.index(each) < LADDER.index(name)


@pytest.mark.parametrize("name", LADDER)
def test_functions_are_short_and_import_nothing(name):
    """A function fits on a screen."""
    for node in ast.walk(trees()[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{name}.{node.name}"
            inner = [n for b in node.body for n in ast.walk(b)]
            assert not any(
                isinstance(n, ast.Import | ast.ImportFrom) for n in inner
            ), f"{name}.{node.name}"


@pytest.mark.parametrize("mode", ["embedded", "production"])
def test_the_migrations_build_what_the_models_say(mode, request, monkeypatch):
    """No drift, and the way back works."""
    settings = request.getfixturevalue(mode)
    monkeypatch.setenv("DATABASE_URL", settings.database_url)
    config = Config(ALEMBIC_INI)

    command.check(config)
    command.downgrade(config, "base")
    command.upgrade(config, "head")
    command.check(config)


NEXT_MIGRATION = """
from alembic import op

revision, down_revision = "next", "0001"


def upgrade():
    with op.batch_alter_table("orders") as orders:
        orders.drop_constraint("orders_status_check", type_="check")
        orders.create_check_constraint("orders_status_check", "status <> ''")
"""


@pytest.mark.parametrize("mode", ["embedded", "production"])
def test_a_migration_may_replace_a_constraint(
    mode, request, monkeypatch, tmp_path
):
    """SQLite makes the table anew: what refers to it stays, and its rows."""
    settings = request.getfixturevalue(mode)
    monkeypatch.setenv("DATABASE_URL", settings.database_url)
    with TestClient(create_app(settings)) as client:
        ada = User(client, "ada@example.com")
        order_id = ada.order()
    (tmp_path / "next.py").write_text(NEXT_MIGRATION)
    config = Config(ALEMBIC_INI)
    versions = f"{ALEMBIC_INI.parent}/migrations/versions\n{tmp_path}"
    config.set_main_option("version_locations", versions)
    config.set_main_option("path_separator", "newline")

    command.upgrade(config, "next")

    with TestClient(create_app(settings)) as client:
        path = f"/orders/{order_id}/events"
        assert len(client.get(path, headers=ada.headers).json()) == 1


def test_in_ci_nothing_is_skipped():
    """A skip says what to install, and in CI it is a failure."""
    if os.environ.get("CI"):
        assert servers.missing() == []
