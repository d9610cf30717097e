"""The exercises of the README work, with the code that the page shows.

Each is done in a copy of the package, in the order in which the page tells
it: commands are run, and edits are applied. The edits are counted before the
code is put in form, because their number is what a reader pays.
"""

import contextlib
import difflib
import os
import re
import shutil
import subprocess

import pytest
import servers
from conftest import ITEMS, ROOT, User, environment
from fastapi.testclient import TestClient
from test_readme import (
    README,
    run_console,
    section,
    settled,
    typed_and_printed,
)

from orders.api import create_app

EXERCISES = dict(
    re.findall(
        r"(?ms)^\*\*(An? [\w ]+)\*\*(.*?)(?=^\*\*An? |\Z)",
        section("Exercises", README),
    )
)
STEP = re.compile(r"```diff\n(.*?)```|`uv run (alembic [^`]+)`", re.DOTALL)
HUNK = re.compile(r"^@@ (\S+): .*\n((?:[ +-].*\n)+)", re.MULTILINE)


class Copy:
    """A copy of the package, in which a reader does the exercises."""

    def __init__(self, folder, settings):
        """Copy what an exercise changes, or reads."""
        self.folder = folder
        ignored = shutil.ignore_patterns("__pycache__")
        for name in ("orders", "migrations"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        for name in ("alembic.ini", "pyproject.toml"):
            shutil.copy(ROOT / name, folder)
        self.before = self.lines()
        # The reader makes migrations where everything is embedded.
        self.env = environment(settings) | {
            "PATH": f"{servers.PYTHON}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(folder),
            servers.COVERAGE: "",
        }

    def lines(self):
        """Return the lines of each module."""
        return {
            path.name: path.read_text().splitlines()
            for path in sorted((self.folder / "orders").glob("*.py"))
        }

    def run(self, command):
        """Run a command in the copy, and see it succeed."""
        ended = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=os.environ | self.env,
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr

    def do(self, exercise):
        """Take the steps of an exercise, in the order of the page."""
        for edits, command in STEP.findall(EXERCISES[exercise]):
            if command:
                self.run(command)
            for file, hunk in HUNK.findall(edits):
                self.edit(file.replace("…", "*"), hunk.splitlines())

    def edit(self, file, lines):
        """Replace the one place that a hunk names."""
        (path,) = self.folder.glob(file)
        old, new = (
            "".join(f"{line[1:]}\n" for line in lines if line[0] in signs)
            for signs in (" -", " +")
        )
        text = path.read_text()
        assert text.count(old) == 1, old
        path.write_text(text.replace(old, new))

    def edits(self):
        """Return (file, lines removed, lines added) of each edit."""
        found = []
        for name, after in self.lines().items():
            compared = difflib.SequenceMatcher(
                None, self.before[name], after, autojunk=False
            )
            found += [
                (name, i2 - i1, j2 - j1)
                for tag, i1, i2, j1, j2 in compared.get_opcodes()
                if tag != "equal"
            ]
        return found

    @contextlib.contextmanager
    def serve(self, settings):
        """Run `uv run orders`, and a worker if there is a broker.

        Lend the API, and the process that runs the handlers.
        """
        env = self.env | environment(settings)
        with contextlib.ExitStack() as stack:
            api = servers.orders(self.folder, env)
            stack.enter_context(servers.running(api))
            worker = api
            if settings.rabbitmq_url:
                worker = servers.worker(self.folder, env)
                stack.enter_context(servers.running(worker))
            yield api, worker


@pytest.fixture(
    params=["embedded", pytest.param("production", marks=pytest.mark.long)]
)
def mode(request):
    """Return settings of either mode."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def copy(tmp_path, embedded):
    """Return a fresh copy of the package."""
    (tmp_path / "copy").mkdir()
    return Copy(tmp_path / "copy", embedded)


@pytest.fixture
def ada(mode):
    """Return a user with an order from before the exercise."""
    with TestClient(create_app(mode)) as client:
        ada = User(client, "ada@example.com")
        ada.order_id = ada.order()
        ada.change(ada.order_id, "PAID")
    return ada


def shown_and_printed(exercise, api, ada):
    """Return what a console of the page shows, and what it prints here."""
    (block,) = re.findall(
        "```console\n(.*?)```", EXERCISES[exercise], re.DOTALL
    )
    script, shown = typed_and_printed(block)
    printed = run_console(
        script,
        api.port,
        API=f"http://127.0.0.1:{api.port}",
        JSON="Content-Type: application/json",
        ME=f"Authorization: {ada.headers['Authorization']}",
        ORDER=ada.order_id,
    )
    return settled(shown), settled(printed)


def test_a_status_is_two_edits_and_a_migration(copy, mode, ada, http):
    """The state machine knows it, and the database takes it."""
    copy.do("A status")
    edits = copy.edits()

    with copy.serve(mode) as (api, _):
        ada.client = http(api)
        ada.change(ada.order_id, "SHIPPED")
        shown, printed = shown_and_printed("A status", api, ada)
        kept = ada.get(ada.order_id).json()["status"]
        page = ada.call("GET", f"/orders/user/{ada.id}?status=RETURNED")
        refused = ada.change(ada.order_id, "PAID")

    assert edits == [("models.py", 0, 1), ("models.py", 1, 2)]
    assert printed == shown
    assert kept == "RETURNED"
    assert [order["id"] for order in page.json()] == [ada.order_id]
    assert refused.status_code == 409
    assert refused.json()["allowed"] == []
    assert f"Order {ada.order_id} became RETURNED" in api.text()


def test_a_field_is_one_line_and_a_migration(copy, mode, ada, http):
    """It is checked, kept, shown, cached, compared and documented."""
    copy.do("A field")
    edits = copy.edits()

    with copy.serve(mode) as (api, worker):
        ada.client = http(api)
        shown, printed = shown_and_printed("A field", api, ada)
        before = ada.get(ada.order_id).json()["note"]

        def create(note, **headers):
            body = {"items": ITEMS, "note": note}
            return ada.call("POST", "/orders/", json=body, headers=headers)

        key = {"Idempotency-Key": "cart-7"}
        created = create("ring twice", **key)
        order_id = created.json()["id"]
        reads = [ada.get(order_id)]
        # Not always the second one: a busy machine may end the trust.
        while reads[-1].headers["x-cache"] != "hit" and len(reads) < 50:
            reads.append(ada.get(order_id))
        newest = ada.call("GET", f"/orders/user/{ada.id}").json()[0]
        replayed = create("ring twice", **key)
        other = create("ring once", **key)
        refused = [create(note).status_code for note in ("x" * 201, "\0", 7)]
        schemas = ada.client.get("/openapi.json").json()["components"]
        line = f"Order {order_id} processed"
        servers.wait_until(lambda: line in worker.text(), 20)

    assert edits == [("models.py", 0, 1)]
    assert printed == shown
    assert before == ""
    notes = [answer.json()["note"] for answer in (created, *reads, replayed)]
    assert {*notes, newest["note"]} == {"ring twice"}
    assert reads[-1].headers["x-cache"] == "hit"
    assert replayed.headers["idempotency-replayed"] == "true"
    assert other.status_code == 422
    assert refused == [422] * 3
    for name in ("OrderCreate", "OrderPublic"):
        assert (
            schemas["schemas"][name]["properties"]["note"]["maxLength"] == 200
        )
    assert worker.text().count(line) == 1


def test_an_event_with_its_task_is_three_edits(copy, mode, ada, http):
    """The handler runs once, where handlers run, and has a task."""
    exercise = "An event with its task"
    copy.do(exercise)
    edits = copy.edits()
    (line,) = re.findall(r"`(Order [^`{]+ way)`", EXERCISES[exercise])

    def is_processed(order_id):
        events = ada.call("GET", f"/orders/{order_id}/events").json()
        return [
            event["processed_at"]
            for event in events
            if event["kind"] == "order_shipped"
        ] not in ([], [None])

    with copy.serve(mode) as (api, worker):
        ada.client = http(api)
        # An order of the page's own, then one whose log is looked at.
        shown, printed = shown_and_printed(exercise, api, ada)
        shipped = ada.change(
            ada.order_id, "SHIPPED", headers={"X-Request-ID": "cart-7"}
        )
        servers.wait_until(lambda: is_processed(ada.order_id), 20)
        wanted = settled(f"[cart-7] {line}")
        servers.wait_until(lambda: wanted in settled(worker.text()), 5)

    assert printed == shown
    assert shipped.status_code == 200
    files = [file for file, removed, _ in edits if removed == 0]
    assert files == ["handlers.py", "models.py", "service.py"]
    assert len(edits) == 3
    assert settled(worker.text()).count(wanted) == 1
    if worker is not api:
        assert wanted not in settled(api.text())
        assert "orders.send_shipping_mail" in worker.text()  # its task


@pytest.mark.long
def test_the_code_of_the_exercises_keeps_the_rules(copy):
    """All three, one after the other: format, lint, types, and size."""
    for exercise in EXERCISES:
        copy.do(exercise)
        copy.run("alembic upgrade head")  # as `uv run orders` does
    if (ROOT / ".mypy_cache").exists():  # or mypy would read all libraries
        shutil.copytree(ROOT / ".mypy_cache", copy.folder / ".mypy_cache")
    rules = f"pytest -n 0 -p no:cacheprovider {ROOT}/tests/test_house.py"

    copy.run("ruff format . && ruff check . && ruff format --check .")
    copy.run("mypy")
    copy.run("alembic check")
    copy.run(f"{rules} -k 'reading or short or downward or says_what'")
