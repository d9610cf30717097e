"""PostgreSQL as people have it: poolers, parameters, and odd settings.

Behind a pooler, after an idle time, while a table is altered, and whatever a
database is set to, calls are answered, and what is read is what was written.
"""

import asyncio
import contextlib
import logging
import re
import signal
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pytest
import servers
from conftest import PASSWORD, User, migrate, replace
from fastapi.testclient import TestClient
from faults import Journal, user_of
from sqlalchemy import text

from orders.api import create_app
from orders.db import (
    API_DEADLINE,
    CONNECT_TIMEOUT,
    POOL_SIZE,
    WORKER_DEADLINE,
    Database,
    create_sync_engine,
)

MODES = "session", "transaction"
ITEMS = [
    {"name": "日本 \\ ' %s", "quantity": 9_999, "price": 999_999.97},
    {"name": "tea", "quantity": 3, "price": 0.1, "weights": [1e-7, 0.3]},
]
TOTAL = 9_998_999_700.33
# Celery warns a worker that runs as root.
WARNING = re.compile(
    r"^.{23} (?:WARNING|ERROR|CRITICAL) (?!py\.warnings).*", re.MULTILINE
)
PIDS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
WAITING = f"SELECT count(*) FROM ({PIDS} AND wait_event_type = 'Lock') AS x"
TERMINATE = f"""
SELECT pid, pg_terminate_backend(pid)
FROM ({PIDS} AND state = 'idle') AS x
"""


def tell(database_url, *statements):
    """Run statements by a session of its own; return the last one's rows."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        for statement in statements:
            found = connection.execute(statement)
        return found.fetchall() if found.description else []


def end_idle_sessions(database_url):
    """End what is idle at this moment; return how many sessions were.

    All are told at once, and waited for afterwards: a session that is told
    late may be at work again, and a call in the middle may fail.
    """
    ended = {pid for pid, _ in tell(database_url, TERMINATE)}
    processes = [Path(f"/proc/{pid}") for pid in ended]
    servers.wait_until(
        lambda: not any(process.exists() for process in processes), 5
    )
    return len(ended)


@pytest.fixture
def plain(stack, embedded, databases):
    """Return settings of PostgreSQL alone, on a database of its own."""
    name = f"test{next(databases)}"
    return replace(embedded, database_url=stack.copy_database(name))


@pytest.fixture
def pool(tmp_path):
    """Return what puts a pooler before a server, and settings through it."""
    if servers.PGBOUNCER is None:
        pytest.skip("apt-get install pgbouncer to run this")
    with contextlib.ExitStack() as stack:

        def start(server, settings, *lines):
            pooler = servers.pgbouncer(tmp_path, server, *lines)
            stack.enter_context(servers.running(pooler))
            places = f":{server.port}/", f":{pooler.port}/"
            url = settings.database_url.replace(*places)
            return pooler, replace(settings, database_url=url)

        yield start


def travel(user, direct):
    """Take an order through each call; check that what is read is exact.

    `direct` is where the database is: there the order is made due at once.
    """
    began = datetime.now(UTC)
    created = user.create(ITEMS, headers={"Idempotency-Key": "a-key"})
    assert created.status_code == 201, created.text
    order = created.json()
    path, own = f"/orders/{order['id']}", f"/orders/user/{user.id}"
    reads = [user.create(ITEMS, headers={"Idempotency-Key": "a-key"}).json()]
    reads += [user.get(order["id"]).json() for _ in range(2)]
    user.order()
    page = user.call("GET", f"{own}?limit=1")
    (newest,) = page.json()
    reads += user.call("GET", page.links["next"]["url"]).json()
    changed = user.change(order["id"], "PAID").json()
    again = user.get(order["id"]).json()
    hurry(direct, order["id"])
    servers.wait_until(lambda: user.processed(order["id"]), 5)
    history = user.call("GET", f"{path}/events").json()
    assert user.call("GET", "/ready").status_code == 200

    assert order["items"] == ITEMS
    assert order["total_price"] == TOTAL
    assert newest["total_price"] == 0.3
    assert reads == [order] * len(reads)
    assert changed == again == {**order, "status": "PAID"}
    assert [each["kind"] for each in history] == [
        *("new_order", "status_changed")
    ]
    moments = began.isoformat(), order["created_at"]
    moments += history[0]["created_at"], history[1]["created_at"]
    moments += history[0]["processed_at"], datetime.now(UTC).isoformat()
    parsed = [datetime.fromisoformat(moment) for moment in moments]
    assert parsed == sorted(parsed)
    assert all(moment.endswith("Z") for moment in moments[1:-1])


SLOW_TABLES = (
    "CREATE FUNCTION doze() RETURNS event_trigger LANGUAGE plpgsql AS"
    " $$ BEGIN PERFORM pg_sleep(0.5); END $$",
    "CREATE EVENT TRIGGER doze ON ddl_command_start"
    " WHEN TAG IN ('CREATE TABLE') EXECUTE FUNCTION doze()",
)


def hurry(database_url, order):
    """Make an order due at once, whatever isolation others have."""
    tell(
        database_url,
        "SET default_transaction_isolation TO 'read committed'",
        "UPDATE events SET due_at = now()"
        f" WHERE order_id = '{order}' AND kind = 'new_order' AND attempts = 0",
    )


def log_in(user, email):
    """Log a user in again, and return the answer's status."""
    form = {"username": email, "password": PASSWORD}
    return user.client.post("/token/", data=form).status_code


def warnings(caplog):
    """Return what the service logged as more than information."""
    # Telemetry that another test has shut down in this process complains.
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno >= logging.WARNING
        and not record.name.startswith("opentelemetry")
    ]


# --- A pooler in front ------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_an_order_travels_through_a_pooler(
    stack, embedded, databases, pool, caplog, mode
):
    """The tables are made through it, too; users share its sessions."""
    name = f"test{next(databases)}"
    direct = stack.copy_database(name, of="template1")
    settings = replace(embedded, database_url=direct)
    pooler, settings = pool(stack.postgres, settings, f"pool_mode = {mode}")
    migrate(settings.database_url)
    with TestClient(create_app(settings)) as client:
        users = [user_of(client) for _ in range(8)]
        with ThreadPoolExecutor(len(users)) as threads:
            list(threads.map(lambda user: travel(user, direct), users))

    assert warnings(caplog) == []
    assert " WARNING " not in pooler.text()


@pytest.mark.fault
@pytest.mark.parametrize("mode", MODES)
def test_a_pooler_is_no_fault_under_load(
    stack, production, pool, run, http, mode
):
    """With the real processes: nobody is refused, and nothing is logged."""
    _, settings = pool(stack.postgres, production, f"pool_mode = {mode}")
    journal = Journal(production)
    processes = [run(each, settings) for each in (servers.api, servers.worker)]
    users = [user_of(http(processes[0])) for _ in range(8)]

    def journeys(user):
        """Make a user's calls; return the statuses of the answers."""
        answers = []
        for key in range(8):
            answers += (
                user.create(headers={"Idempotency-Key": f"{key}"}),
                user.create(headers={"Idempotency-Key": f"{key}"}),
            )
            order = answers[-1].json()["id"]
            journal.acknowledged.append(order)
            answers += (
                user.get(order),
                user.call("GET", f"/orders/user/{user.id}"),
                user.change(order, "PAID"),
                user.get(order),
                user.call("GET", f"/orders/{order}/events"),
                user.call("GET", "/ready"),
            )
        return {answer.status_code for answer in answers}

    with ThreadPoolExecutor(len(users)) as threads:
        statuses = set().union(*threads.map(journeys, users))
    journal.settle(*processes)

    assert statuses == {200, 201}
    for process in processes:
        assert WARNING.findall(process.text()) == []


@pytest.mark.fault
def test_a_full_pooler_is_a_503_in_time(stack, plain, pool):
    """It takes a connection at once, and lets the first query wait."""
    small = "default_pool_size = 1", "pool_mode = session"
    _, settings = pool(stack.postgres, plain, *small)
    database = Database(settings.database_url)

    async def ping():
        """Return whether the database answered, and the seconds it took."""
        began = time.monotonic()
        try:
            await asyncio.wait_for(database.ping(), 20)
        except Exception as error:
            return error, time.monotonic() - began
        return None, time.monotonic() - began

    async def run():
        with psycopg.connect(settings.database_url) as hog:
            hog.execute("SELECT 1")
            refused = await ping()
        answered = await ping()
        await database.close()
        return refused, answered

    (error, seconds), (none, _) = asyncio.run(run())

    assert error is not None
    assert seconds < API_DEADLINE + 1
    assert none is None


@pytest.mark.fault
def test_a_migration_outlasts_the_limits_of_calls(
    stack, embedded, databases, pool
):
    """It waits, and works, in a session that a call has used before."""
    name = f"test{next(databases)}"
    direct = stack.copy_database(name, of="template1")
    tell(direct, *SLOW_TABLES)
    tell(direct, f"ALTER DATABASE {name} SET lock_timeout = '400ms'")
    settings = replace(embedded, database_url=direct)
    small = "default_pool_size = 1", "pool_mode = transaction"
    _, settings = pool(stack.postgres, settings, *small)
    engine = create_sync_engine(settings.database_url, 0.5)
    with engine.connect() as connection:
        limit = connection.scalar(text("SHOW statement_timeout"))
    engine.dispose()
    with ThreadPoolExecutor() as threads, psycopg.connect(direct) as other:
        other.execute("SELECT pg_advisory_xact_lock(7262001)")
        waiting = threads.submit(migrate, settings.database_url)
        time.sleep(1.5)
        waits = not waiting.done()
        other.rollback()
        assert waiting.result() is None

    assert waits
    assert limit == "400ms"


# --- The URL's own parameters -----------------------------------------------

URL_PARAMETERS = (
    "?options=-csearch_path%3Dshop%20-c%20statement_timeout%3D5432ms"
    "&application_name=shop&connect_timeout=7&keepalives_idle=77"
    "&tcp_user_timeout=7777&sslmode=disable"
)


@pytest.fixture
def shop(stack, embedded, databases):
    """Return settings whose URL has parameters, with a schema of its own."""
    name = f"test{next(databases)}"
    url = stack.copy_database(name, of="template1")
    tell(url, "CREATE SCHEMA shop")
    migrate(url + URL_PARAMETERS)
    return replace(embedded, database_url=url + URL_PARAMETERS)


def each_engine(database_url):
    """Return what a connection of each engine says of itself."""
    read = text(
        "SELECT current_setting('search_path'),"
        " current_setting('statement_timeout'),"
        " current_setting('application_name')"
    )

    def describe(connection):
        """Return the parameters of a connection, and some settings."""
        driver = connection.connection.driver_connection
        settings = connection.execute(read).one()
        return driver.info.get_parameters(), tuple(settings)

    async def run():
        database = Database(database_url)
        found = []
        for engine in (database.engine, database.keeper_engine):
            async with engine.connect() as connection:
                found.append(await connection.run_sync(describe))
        await database.close()
        return found

    found = asyncio.run(run())
    for deadline in (WORKER_DEADLINE, None):  # None: a migration's
        engine = create_sync_engine(database_url, deadline)
        with engine.connect() as connection:
            found.append(describe(connection))
        engine.dispose()
    return found


def test_the_urls_own_parameters_win(shop):
    """In each engine: the API's two, the worker's, and the migration's."""
    found = each_engine(shop.database_url)

    assert len(found) == 4
    for parameters, settings in found:
        assert settings == ("shop", "5432ms", "shop")
        assert parameters["connect_timeout"] == "7"
        assert parameters["keepalives_idle"] == "77"
        assert parameters["tcp_user_timeout"] == "7777"
        assert parameters["sslmode"] == "disable"


def test_an_order_travels_in_the_schema_that_the_url_names(shop, caplog):
    """The tables are there, and nowhere else."""
    direct = shop.database_url
    with TestClient(create_app(shop)) as client:
        travel(user_of(client), direct)

    tables = tell(direct, "SELECT schemaname, tablename FROM pg_tables")
    ours = {"users", "orders", "events", "alembic_version"}
    schemas = {schema for schema, table in tables if table in ours}
    assert schemas == {"shop"}
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    "options",
    [
        "-cstatement_timeout%3D5432ms",
        "-c%20STATEMENT_TIMEOUT%3D5432ms",
        "--statement-timeout%3D5432ms",
        "-cwork_mem%3D9MB%20--Statement_Timeout%3D5432ms",
    ],
)
def test_a_time_limit_wins_however_it_is_spelled(plain, options):
    """PostgreSQL knows two ways of it, and ignores case."""
    url = f"{plain.database_url}?options={options}"

    assert {limit for _, (_, limit, _) in each_engine(url)} == {"5432ms"}


def test_what_the_url_does_not_name_is_still_set(plain):
    """One parameter of it turns off no other of ours."""
    url = f"{plain.database_url}?options=-cwork_mem%3D9MB&keepalives_count=9"
    calls, keeper, worker, migration = each_engine(url)

    for (parameters, settings), limit in (
        (calls, "2s"),
        (keeper, "2s"),
        (worker, "12s"),
        (migration, "0"),
    ):
        assert settings[1] == limit
        assert parameters["connect_timeout"] == str(CONNECT_TIMEOUT)
    for parameters, _ in (calls, keeper, worker):
        assert parameters["keepalives_count"] == "9"
        assert parameters["keepalives_idle"] == "5"


def test_a_time_limit_wins_in_the_migration(stack, databases, capsys):
    """And an operator who sets one reads why the start ended."""
    url = stack.copy_database(f"test{next(databases)}", of="template1")
    tell(url, *SLOW_TABLES)
    with pytest.raises(SystemExit):
        migrate(f"{url}?options=-cstatement_timeout%3D200ms")

    (line,) = capsys.readouterr().err.splitlines()
    assert "statement timeout" in line


@pytest.mark.fault
def test_the_processes_take_the_urls_parameters(shop, production, run, http):
    """The API's sessions and the worker's have the name, and the schema."""
    settings = replace(production, database_url=shop.database_url)
    named = (
        "SELECT DISTINCT application_name FROM pg_stat_activity"
        f" WHERE pid IN ({PIDS}) AND pid <> pg_backend_pid()"
    )
    api, worker = run(servers.api, settings), run(servers.worker, settings)
    ada = user_of(http(api))
    order = ada.order()
    servers.wait_until(lambda: ada.processed(order), 15)

    direct = shop.database_url.partition("?")[0]
    assert tell(direct, named) == [("shop",)]
    assert f"Order {order} processed" in worker.text()
    for process in (api, worker):
        assert WARNING.findall(process.text()) == []


# --- A connection that died while it was idle -------------------------------


def fill_pool(client, user):
    """Use all connections of the API at once; return the statuses."""
    path = f"/orders/user/{user.id}"
    with ThreadPoolExecutor(POOL_SIZE) as threads:
        calls = [lambda: user.call("GET", path)] * POOL_SIZE
        answers = list(threads.map(lambda call: call(), calls))
    return {answer.status_code for answer in answers}


@pytest.mark.parametrize("death", ["terminated", "timed out"])
def test_the_first_call_after_a_death_is_answered(plain, caplog, death):
    """Each connection of the pool is dead, and the relay's and keeper's.

    A session may be sent a statement while it is told to end. It was not idle
    then, and a line says so; hence the next death counts.
    """
    name = plain.database_url.rpartition("/")[2]
    alter = f"ALTER DATABASE {name}"
    if death == "timed out":
        limit = "SET idle_session_timeout = '700ms'"
        tell(plain.database_url, f"{alter} {limit}")
    with TestClient(create_app(plain)) as client:
        ada = user_of(client)
        assert fill_pool(client, ada) == {200}
        for _ in range(5):
            caplog.clear()
            if death == "timed out":
                time.sleep(1.2)
            else:
                assert end_idle_sessions(plain.database_url)
            statuses = fill_pool(client, ada)
            if not warnings(caplog):
                break
        assert statuses == {200}
        if death == "timed out":  # the last time: new sessions may be idle
            tell(plain.database_url, f"{alter} RESET idle_session_timeout")
            time.sleep(1.2)
        travel(ada, plain.database_url)

    assert warnings(caplog) == []


def test_every_engine_replaces_a_dead_connection(plain):
    """The API's two, the worker's, which is the relay's, and a plain one."""
    ended = []

    def end():
        """End all sessions of the database."""
        ended.append(end_idle_sessions(plain.database_url))

    async def run():
        database = Database(plain.database_url)
        engines = database.engine, database.transactions
        for engine in (*engines, database.keeper_engine):
            for _ in range(2):
                async with engine.connect() as connection:
                    assert await connection.scalar(text("SELECT 1")) == 1
                end()
        await database.close()

    asyncio.run(run())
    for deadline in (WORKER_DEADLINE, None):
        engine = create_sync_engine(plain.database_url, deadline)
        for _ in range(2):
            with engine.connect() as connection:
                assert connection.scalar(text("SELECT 1")) == 1
            end()
        engine.dispose()

    assert all(ended)


def test_a_restart_of_the_pooler_is_no_503(stack, plain, pool):
    """A sibling of a restart of PostgreSQL, which takes longer."""
    pooler, settings = pool(stack.postgres, plain)
    database = Database(settings.database_url)

    async def run():
        await asyncio.gather(*(database.ping() for _ in range(POOL_SIZE)))
        pooler.stop()
        pooler.start()
        await asyncio.gather(*(database.ping() for _ in range(POOL_SIZE)))
        await database.close()

    asyncio.run(run())


@pytest.mark.fault
def test_a_restart_of_postgresql_is_no_503_afterwards(
    private_postgres, run, http
):
    """The worker was idle, and does not even notice."""
    postgres, settings = private_postgres
    api, worker = run(servers.api, settings), run(servers.worker, settings)
    ada = user_of(http(api))
    assert fill_pool(http(api), ada) == {200}
    first = ada.order()
    servers.wait_until(lambda: ada.processed(first), 15)
    postgres.process.send_signal(signal.SIGINT)  # a fast shutdown
    postgres.process.wait(20)
    postgres.start()
    assert fill_pool(http(api), ada) == {200}
    second = ada.order()
    servers.wait_until(lambda: ada.processed(second), 15)

    assert WARNING.findall(worker.text()) == []


@pytest.mark.parametrize("tls", [False, True])
def test_a_live_connection_is_used_again(stack, plain, pool, tls):
    """A look at its socket takes none for dead, with TLS neither."""
    settings, pids = plain, []
    with tempfile.TemporaryDirectory() as folder:
        if tls:
            lines = tls_of(Path(folder))
            _, settings = pool(stack.postgres, plain, *lines)
        engine = create_sync_engine(settings.database_url, WORKER_DEADLINE)
        for _ in range(20):
            with engine.connect() as connection:
                wire = connection.connection.driver_connection
                assert wire.pgconn.ssl_in_use == tls
                pids.append(connection.scalar(text("SELECT pg_backend_pid()")))
        engine.dispose()

    assert len({*pids}) == 1


def tls_of(folder):
    """Make a certificate; return the lines of a pooler that uses it."""
    key, certificate = servers.make_certificate(folder)
    folder.chmod(0o755)  # for PostgreSQL's user, if this is root's
    key.chmod(0o644)
    return (
        "client_tls_sslmode = require",
        f"client_tls_key_file = {key}",
        f"client_tls_cert_file = {certificate}",
    )


# --- Tables that change under a live API ------------------------------------


CHANGES = [
    "ALTER TABLE users ALTER email TYPE varchar(320)",
    "ALTER TABLE users ALTER hashed_password TYPE text",
    "ALTER TABLE events ALTER attempts TYPE bigint",
    "ALTER TABLE orders ADD note varchar(200) NOT NULL DEFAULT ''",
    "CREATE INDEX CONCURRENTLY ON orders (status)",
    "DROP INDEX events_due",
]


def test_a_change_of_the_tables_breaks_no_call(plain, caplog):
    """The sessions run each statement often enough to prepare it."""
    with TestClient(create_app(plain)) as client:
        email = f"{uuid.uuid4()}@example.com"
        ada = User(client, email)
        for change in CHANGES:
            for _ in range(7):
                order = ada.order()
                path = f"/orders/{order}"
                for answer in (
                    ada.get(order),
                    ada.change(order, "PAID"),
                    ada.get(order),
                    ada.call("GET", f"{path}/events"),
                    ada.call("GET", f"/orders/user/{ada.id}"),
                ):
                    assert answer.is_success, change
                assert log_in(ada, email) == 200, change
            tell(plain.database_url, change)
        travel(ada, plain.database_url)

    assert warnings(caplog) == []


# --- What a database is set to ----------------------------------------------


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "EUC_JP"])
def test_a_database_without_utf_8_ends_the_start(
    stack, databases, capsys, encoding
):
    """One line names what is wrong, and what to do."""
    name = f"test{next(databases)}"
    tell(
        stack.database_url("postgres"),
        f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0"
        " LC_COLLATE 'C' LC_CTYPE 'C'",
    )
    with pytest.raises(SystemExit) as end:
        migrate(stack.database_url(name))

    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 3
    assert "DATABASE_URL" in line
    assert encoding in line
    assert "ENCODING 'UTF8'" in line


LIMITED = "CREATE ROLE {0} LOGIN"
NO_SCHEMA = "ALTER DATABASE {0} SET search_path = nowhere"
READ_ONLY = "ALTER DATABASE {0} SET default_transaction_read_only = on"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (LIMITED, "permission denied for schema public"),
        (NO_SCHEMA, "no schema has been selected"),
        (READ_ONLY, "read-only"),
    ],
)
def test_a_database_that_takes_no_tables_ends_the_start(
    stack, databases, capsys, fault, told
):
    """Since PostgreSQL 15 not everybody may make a table in `public`."""
    name = f"test{next(databases)}"
    url = stack.copy_database(name, of="template1")
    tell(url, fault.format(name))
    if fault == LIMITED:
        url = url.replace("postgres@", f"{name}@")
        tell(
            stack.database_url(name),
            "REVOKE CREATE ON SCHEMA public FROM public",
        )
    with pytest.raises(SystemExit) as end:
        migrate(url)

    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 3
    assert "DATABASE_URL" in line
    assert told in line


ODD = """
bytea_output = escape
client_encoding = LATIN1
datestyle = German
default_transaction_isolation = serializable
extra_float_digits = -15
idle_in_transaction_session_timeout = '2s'
intervalstyle = sql_standard
lock_timeout = '1s'
search_path = shop, public
standard_conforming_strings = off
statement_timeout = '1s'
timezone = 'Asia/Kathmandu'
transform_null_equals = on
"""
ODDER = """
client_encoding = SQL_ASCII
datestyle = SQL, DMY
default_transaction_deferrable = on
default_transaction_isolation = 'repeatable read'
extra_float_digits = 0
timezone = '<+0330>-3:30'
"""


@pytest.mark.parametrize("settings", [ODD, ODDER])
@pytest.mark.parametrize("place", ["DATABASE {0}", "ROLE ALL IN DATABASE {0}"])
def test_orders_are_exact_whatever_a_database_is_set_to(
    plain, caplog, settings, place
):
    """These settings change how values are read and written."""
    name = plain.database_url.rpartition("/")[2]
    tell(
        plain.database_url,
        *(
            f"ALTER {place.format(name)} SET {setting}"
            for setting in settings.strip().splitlines()
        ),
    )
    migrate(plain.database_url)
    with TestClient(create_app(plain)) as client:
        email = "日本@example.com"
        ada = User(client, email)
        travel(ada, plain.database_url)
        assert log_in(ada, email) == 200

    assert warnings(caplog) == []


@pytest.mark.long
@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_a_stricter_isolation_refuses_nobody(plain, caplog, level):
    """Two services meet in the same rows, all the time."""
    name = plain.database_url.rpartition("/")[2]
    tell(
        plain.database_url,
        f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'",
    )
    with (
        TestClient(create_app(plain)) as one,
        TestClient(create_app(plain)) as two,
        ThreadPoolExecutor(8) as threads,
    ):
        users = [user_of(client) for client in (one, two) * 4]

        def calls(user):
            """Create and change orders, due at once; return the statuses."""
            statuses = set()
            for _ in range(15):
                answers = [user.create()]
                order = answers[0].json()["id"]
                hurry(plain.database_url, order)
                answers += user.change(order, "PAID"), user.get(order)
                statuses |= {answer.status_code for answer in answers}
            return statuses

        statuses = set().union(*threads.map(calls, users))

    assert statuses == {200, 201}
    assert warnings(caplog) == []
