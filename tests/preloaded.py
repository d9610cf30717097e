"""Start programs of the package by a fork, in a fifth of the time.

Most of a program's start is the import of libraries. Here one process, the
*parent*, imports them once. For each program it makes a child, which has the
arguments, the environment, the folder and the outputs of the program, runs
its script, and ends as the program would. The parent imports nothing of
`orders`.

The parent reads requests from its input, a line of JSON each. It answers each
with a number: the id of a new process, or the exit status of one that ended.
"""

import ast
import atexit
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

import coverage

COVERAGE = "COVERAGE_PROCESS_CONFIG"  # set while processes are measured
PACKAGE = Path(__file__).parent.parent / "orders"
# What the programs import besides, when they run.
PROGRAMS = [
    "celery.__main__",
    "celery.apps.worker",
    "celery.bin.celery",
    "celery.concurrency.thread",
    "kombu.transport.pyamqp",
    "pydantic.v1",  # FastAPI looks at its classes
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.sqlite.aiosqlite",
    "uvicorn.lifespan.on",
    "uvicorn.loops.uvloop",
    "uvicorn.main",
]


def without_coverage() -> dict[str, str]:
    """Return the environment for a program that is not ours."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("COVERAGE")
    }


class Program:
    """A program that was started; it has what tests use of a `Popen`."""

    def __init__(
        self,
        command: Iterable[object],
        folder: Path,
        env: dict[str, str],
        output: Path,
        errors: Path,
    ) -> None:
        """Start a Python script, whose path is the first of `command`."""
        self.args = [str(part) for part in command]
        self.returncode: int | None = None
        self.pid = parent.ask(
            {
                "command": self.args,
                "folder": str(folder),
                "env": env,
                "output": str(output),
                "errors": str(errors),
            }
        )
        self._end = os.pidfd_open(self.pid)  # readable when it has ended

    def poll(self) -> int | None:
        """Return the exit status, or None while the program runs."""
        self._look(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status; `timeout` is in seconds."""
        self._look(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the program has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask the program to end."""
        self.send_signal(signal.SIGTERM)

    def _look(self, timeout: float | None) -> None:
        """Wait for the end, and learn the exit status."""
        if self.returncode is not None:
            return
        end = select.poll()
        end.register(self._end, select.POLLIN)
        if end.poll(None if timeout is None else timeout * 1000):
            self.returncode = parent.ask({"ended": self.pid})
            os.close(self._end)


class Parent:
    """The process that has imported the libraries; started when needed."""

    def __init__(self) -> None:
        """Start nothing yet."""
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def ask(self, request: dict[str, object]) -> int:
        """Send a request, and return the answer."""
        with self._lock:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=without_coverage(),
                    start_new_session=True,
                )
                atexit.register(self._process.communicate)
            assert self._process.stdin
            assert self._process.stdout
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())


parent = Parent()


def library_imports(*excluded: str) -> str:
    """Return the statements by which the package imports libraries.

    Leave out the files of these names.
    """
    statements = [
        ast.unparse(node)
        for path in sorted(PACKAGE.glob("*.py"))
        if path.name not in excluded
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    return "\n".join(
        statement
        for statement in statements
        if not statement.split()[1].startswith("orders")
    )


def serve() -> None:
    """Answer requests until the input ends; in a child, run its program."""
    for name in PROGRAMS:
        importlib.import_module(name)
    exec(library_imports(), {})
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            _, status = os.waitpid(request["ended"], 0)
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                become(**request)
                return
        print(answer, flush=True)


def become(
    command: list[str],
    folder: str,
    env: dict[str, str],
    output: str,
    errors: str,
) -> None:
    """Run a script as a process of its own would."""
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    append = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, output, append),
        (2, errors, append),
    ):
        file = os.open(path, flags)
        os.dup2(file, number)
        os.close(file)
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    if env.get(COVERAGE):
        coverage.process_startup()
    runpy.run_path(command[0], run_name="__main__")


if __name__ == "__main__":
    serve()
