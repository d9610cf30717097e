"""The embedded database keeps what was acknowledged, whoever opens its file.

SQLite's locks belong to a process and a file. A process that opens the file
by itself and closes it again drops its own locks, and then another process
may remove the write-ahead log with all that it holds.
"""

import contextlib
import shutil
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import servers
from conftest import User

READ = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
print(connection.execute("SELECT count(*) FROM orders").fetchone())
connection.close()
"""
BACK_UP = """
import sqlite3, sys
source, target = map(sqlite3.connect, sys.argv[1:])
source.backup(target)
source.close()
target.close()
"""


def in_another_process(program, *arguments):
    """Run a program to its end, as a person does who looks at the file."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    subprocess.run(command, check=True, env=servers.without_coverage())


def kept(file):
    """Return the ids of the orders in a database's file."""
    with contextlib.closing(sqlite3.connect(file)) as connection:
        rows = connection.execute("SELECT id FROM orders").fetchall()
    return {row[0] for row in rows}


def plain(order_ids):
    """Return ids as SQLite keeps them."""
    return {order_id.replace("-", "") for order_id in order_ids}


@pytest.mark.parametrize("visit", ["reader", "backup"])
def test_a_visitor_of_the_file_loses_no_order(tmp_path, http, visit):
    """Another process reads or copies the file; then the service is killed."""
    file, copy = tmp_path / "orders.db", tmp_path / "copy.db"
    with servers.running(servers.orders(tmp_path)) as server:
        ada = User(http(server), "ada@example.com")
        before = [ada.order() for _ in range(60)]
        if visit == "reader":
            in_another_process(READ, file)
        else:
            in_another_process(BACK_UP, file, copy)
        after = [ada.order() for _ in range(60)]
        server.kill()

    assert kept(file) == plain(before + after)
    if visit == "backup":
        assert kept(copy) >= plain(before)


def test_a_copy_by_the_operating_system_loses_no_order(tmp_path, http):
    """It may be torn, but harms nothing: the log stays with the service."""
    file = tmp_path / "orders.db"
    with servers.running(servers.orders(tmp_path)) as server:
        ada = User(http(server), "ada@example.com")
        before = [ada.order() for _ in range(30)]
        in_another_process(READ, file)
        shutil.copy(file, tmp_path / "torn.db")
        in_another_process(READ, file)
        after = [ada.order() for _ in range(30)]
        server.kill()

    assert kept(file) == plain(before + after)


def test_two_processes_on_one_file_lose_no_order(tmp_path, http):
    """Two services share the file; each is killed, and nothing is lost."""
    first = servers.orders(tmp_path)
    with servers.running(first):
        second = servers.orders(tmp_path)
        with servers.running(second):
            users = [
                User(http(server), f"{server.port}@example.com")
                for server in (first, second)
            ]

            def create(user):
                return [user.create() for _ in range(75)]

            with ThreadPoolExecutor(4) as pool:
                made = pool.map(create, users * 2)
                answers = [answer for each in made for answer in each]
            first.kill()
            time.sleep(0.5)
            answers += create(users[1])
            second.kill()

    assert {answer.status_code for answer in answers} == {201}
    created = [answer.json()["id"] for answer in answers]
    assert kept(tmp_path / "orders.db") == plain(created)
