"""The rules that the code keeps about itself."""

import ast
import contextlib
import os
import re
import stat
from functools import cache
from pathlib import Path

import pytest
import servers
from alembic import command, op
from alembic.config import Config
from alembic.script import ScriptDirectory
from conftest import User, migrate
from fastapi.testclient import TestClient
from sqlalchemy import inspect, text
from sqlalchemy.exc import DBAPIError

import orders
from orders.__main__ import ALEMBIC_INI
from orders.api import create_app
from orders.db import create_sync_engine

PACKAGE = Path(orders.__file__).parent
# The reading order that the package's docstring gives.
LADDER = [
    line.split()[0]
    for line in (orders.__doc__ or "").splitlines()
    if line.split()[1:] and (PACKAGE / f"{line.split()[0]}.py").exists()
]
MAX_MODULES = 15
LONGEST_MODULE = 350  # lines
LONGEST_FUNCTION = 40  # lines, with its docstring
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def trees():
    """Return every module of the package, parsed."""
    return {
        path.stem: ast.parse(path.read_text()) for path in PACKAGE.glob("*.py")
    }


def definitions(kinds):
    """Return the name and node of each definition, the nested ones too."""
    return [
        (f"{module}.{node.name}", node)
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, kinds)
    ]


def imported_by(node):
    """Return the modules of the package that an import names."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif node.module == "orders" or node.level:
        base = node.module or "orders"
        names = [f"{base}.{alias.name}" for alias in node.names]
    else:
        names = [node.module]
    return [
        name.partition(".")[2]
        for name in names
        if name.split(".")[0] == "orders"
    ]


def test_every_file_is_in_the_reading_order():
    """Nobody has to guess where to go on."""
    assert sorted(LADDER) == sorted(trees().keys() - {"__init__"})


@pytest.mark.parametrize("name", LADDER)
def test_imports_run_downward_only(name):
    """A module imports only from those above it in the reading order."""
    imports = [
        each
        for node in ast.walk(trees()[name])
        if isinstance(node, ast.Import | ast.ImportFrom)
        for each in imported_by(node)
    ]
    above = LADDER[: LADDER.index(name)]

    assert set(imports) - set(above) == set()


def test_nothing_is_imported_inside_a_function_or_a_condition():
    """What a module needs stands at its top: no circle can hide."""
    hidden = [
        f"{module}:{node.lineno}"
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        and node not in tree.body
    ]

    assert hidden == []


def test_each_module_is_one_reading():
    """A small team reads the package in an afternoon."""
    lines = {
        path.stem: len(path.read_text().splitlines())
        for path in PACKAGE.glob("*.py")
    }
    too_long = {
        module: count
        for module, count in lines.items()
        if count > LONGEST_MODULE
    }

    assert len(lines.keys() - {"__init__"}) <= MAX_MODULES
    assert too_long == {}


def test_no_private_attribute_of_a_library_is_used():
    """It may change in any release: only `self` and `cls` have some here."""
    private = [
        f"{module}:{node.lineno} {node.attr}"
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not (
            isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls")
        )
        # A name with two underscores on both sides is Python's own.
        and not node.attr.endswith("__")
    ]

    assert private == []


def test_no_private_module_of_a_library_is_imported():
    """Nor a private name of one of its modules."""
    private = [
        f"{module}:{node.lineno}"
        for module, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [
            *(alias.name for alias in node.names),
            getattr(node, "module", None) or "",
        ]
        if any(re.match("_[^_]", part) for part in name.split("."))
    ]

    assert private == []


def test_functions_are_short():
    """A function fits on a screen."""
    too_long = {
        name: node.end_lineno - node.lineno + 1
        for name, node in definitions(FUNCTIONS)
        if node.end_lineno - node.lineno >= LONGEST_FUNCTION
    }

    assert too_long == {}


def test_everything_says_what_it_is_for():
    """Each module, class and function, private and nested ones too."""
    named = [*trees().items(), *definitions(FUNCTIONS | ast.ClassDef)]

    assert [name for name, node in named if not ast.get_docstring(node)] == []


HEAD = ScriptDirectory.from_config(Config(ALEMBIC_INI)).get_current_head()
NEXT_MIGRATION = f"""
from alembic import op

revision, down_revision = "next", "{HEAD}"


def upgrade():
    with op.batch_alter_table("orders") as orders:
        orders.drop_constraint("orders_status_check", type_="check")
        orders.create_check_constraint("orders_status_check", "status <> ''")
"""
ABORTED_MIGRATION = (
    NEXT_MIGRATION
    + """
    op.execute("CREATE TABLE half (id INTEGER)")
    op.execute("INSERT INTO half VALUES (1)")
    raise ArithmeticError("in the middle")
"""
)


@pytest.fixture(params=["embedded", "production"])
def migrated(request, monkeypatch):
    """Return settings of either mode, which migrations find, too."""
    settings = request.getfixturevalue(request.param)
    monkeypatch.setenv("DATABASE_URL", settings.database_url)
    return settings


def test_the_migrations_build_what_the_models_say(migrated):
    """No drift, and the way back works."""
    config = Config(ALEMBIC_INI)

    command.check(config)
    command.downgrade(config, "base")
    command.upgrade(config, "head")
    command.check(config)


def config_with(folder, migration):
    """Return a configuration with one more migration, of this text."""
    (folder / "next.py").write_text(migration)
    config = Config(ALEMBIC_INI)
    versions = f"{ALEMBIC_INI.parent}/migrations/versions\n{folder}"
    config.set_main_option("version_locations", versions)
    config.set_main_option("path_separator", "newline")
    return config


def test_a_migration_may_replace_a_constraint(migrated, tmp_path):
    """SQLite makes the table anew: what refers to it stays, and its rows."""
    with TestClient(create_app(migrated)) as client:
        ada = User(client, "ada@example.com")
        order_id = ada.order()

    command.upgrade(config_with(tmp_path, NEXT_MIGRATION), "next")

    with TestClient(create_app(migrated)) as client:
        path = f"/orders/{order_id}/events"
        assert len(client.get(path, headers=ada.headers).json()) == 1


@contextlib.contextmanager
def connected(url):
    """Open a connection for the time of the block."""
    engine = create_sync_engine(url)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def described(url):
    """Return all that a database says about its tables and revision."""
    with connected(url) as connection:
        inspector = inspect(connection)
        tables = {
            name: (
                [str(column) for column in inspector.get_columns(name)],
                inspector.get_check_constraints(name),
            )
            for name in sorted(inspector.get_table_names())
        }
        version = connection.execute(text("SELECT * FROM alembic_version"))
        return tables, version.all()


def test_an_aborted_migration_leaves_nothing(migrated, tmp_path):
    """And the next start works, with the migration mended."""
    before = described(migrated.database_url)
    with pytest.raises(ArithmeticError):
        command.upgrade(config_with(tmp_path, ABORTED_MIGRATION), "next")
    after = described(migrated.database_url)
    (tmp_path / "next.py").unlink()

    command.upgrade(Config(ALEMBIC_INI), "head")
    command.upgrade(config_with(tmp_path, NEXT_MIGRATION), "next")

    assert after == before
    assert described(migrated.database_url)[1] == [("next",)]


def test_a_wrong_statement_of_a_migration_is_no_outage(migrated, tmp_path):
    """Its author sees the traceback, and is not told to mend a URL."""
    wrong = '    op.execute("UPDATE orders SET nowhere = 1")\n'
    config = config_with(tmp_path, NEXT_MIGRATION + wrong)

    with pytest.raises(DBAPIError, match="nowhere"):
        command.upgrade(config, "next")


def test_an_aborted_first_migration_can_be_tried_again(tmp_path, monkeypatch):
    """It leaves a new file of SQLite's as empty as it was."""
    url = f"sqlite:///{tmp_path}/orders.db"
    monkeypatch.setenv("DATABASE_URL", url)
    with monkeypatch.context() as patch:
        patch.setattr(op, "create_index", lambda *_, **__: 1 / 0)
        with pytest.raises(ArithmeticError):
            command.upgrade(Config(ALEMBIC_INI), "head")

    command.upgrade(Config(ALEMBIC_INI), "head")

    assert described(url)[1] == [(HEAD,)]


def test_the_database_file_is_private(tmp_path, monkeypatch):
    """It holds password hashes; SQLite's own files beside it follow it."""
    umask = os.umask(0o022)
    try:
        path = tmp_path / "orders.db"
        migrate(f"sqlite:///{path}")
        with connected(f"sqlite:///{path}") as connection:
            connection.execute(text("UPDATE users SET email = ''"))
            files = sorted(tmp_path.iterdir())
            modes = {stat.S_IMODE(file.stat().st_mode) for file in files}
    finally:
        os.umask(umask)

    assert len(files) > 1
    assert modes == {0o600}


def test_in_ci_nothing_is_skipped():
    """A skip says what to install, and in CI it is a failure."""
    if os.environ.get("CI"):
        assert servers.missing() == []


@pytest.mark.xdist_group("example")
def test_tests_that_share_a_fixture_share_a_process(request):
    """Otherwise each of several processes would make what is dear to make."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@example")
