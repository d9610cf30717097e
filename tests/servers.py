"""Start private servers and the service's own processes, on free ports.

Each server runs from the machine's installed binaries, in a folder of its
own, and ends with the test that asked for it. `missing` says what to install.
"""

import contextlib
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
from preloaded import COVERAGE, Program
from preloaded import without_coverage as without_coverage

START_TIMEOUT = 60  # seconds
BROKER_PASSWORD = "never-to-be-logged"
RABBITMQ = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
# The PATH of a user who is not root lacks the second folder.
PGBOUNCER = shutil.which("pgbouncer") or shutil.which(
    "pgbouncer", path="/usr/sbin"
)
PYTHON = Path(sys.executable).parent
PORTS = range(12_000, 32_000)  # below those that a system gives away by itself
MEMORY = "/dev/shm"
MIN_MEMORY = 6 * 1024**3  # bytes; the environments of readers are the most


def use_memory() -> None:
    """Keep all files of the tests in memory, if there is room for them.

    Most tests in production have a database of their own. To make it takes
    twelve times as long on a disk, even without waiting for the disk.
    """
    with contextlib.suppress(OSError):
        stat = os.statvfs(MEMORY)
        is_roomy = stat.f_bavail * stat.f_frsize > MIN_MEMORY
        if is_roomy and not stat.f_flag & os.ST_NOEXEC:
            os.environ["TMPDIR"] = tempfile.tempdir = MEMORY


def postgres_binaries() -> Path | None:
    """Return the folder of the newest PostgreSQL installed, if any."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    plain = shutil.which("initdb")
    return Path(plain).parent if plain else None


def missing() -> list[str]:
    """Return the packages that the production tests lack here."""
    return [
        package
        for package, there in {
            "postgresql": postgres_binaries(),
            "redis-server": shutil.which("redis-server"),
            "rabbitmq-server": RABBITMQ.exists(),
        }.items()
        if not there
    ]


def free_port() -> int:
    """Return a port that nobody listens on, and give it to nobody else.

    A UDP socket of that number claims it until this process ends, so that
    test runs beside each other draw different ones. The system itself draws
    from higher ones for connections, and for who asks for port 0.
    """
    while True:
        port = random.SystemRandom().choice(PORTS)
        claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            claim.bind(("127.0.0.1", port))
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            claim.close()
        else:
            claim.detach()  # it stays open
            return port


def accepts(port: int) -> bool:
    """Return whether somebody accepts connections on a port."""
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), 1).close()
        return True
    return False


def wait_until(
    condition: Callable[[], object], timeout: float = START_TIMEOUT
) -> None:
    """Return once the condition holds; fail when it does not in time.

    The longer it takes, the less often the condition is looked at.
    """
    deadline, pause = time.monotonic() + timeout, 0.02
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {condition}"
        time.sleep(pause)
        pause = min(1.2 * pause, 0.2)


def family(pid: int) -> list[int]:
    """Return a process and its descendants, the eldest first."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for each in found:  # grows as it goes
        found += children.get(each, [])
    return found


def runs(pid: int) -> bool:
    """Return whether a thread of the process is not stopped."""
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state = stat.read_text().rpartition(")")[2].split()[0]
            if state not in "TtZX":  # stopped, traced, or dead
                return True
    return False


class Server:
    """A process with a port and a log, which can be killed and restarted."""

    def __init__(
        self,
        command: list[object],
        *,
        port: int,
        folder: Path,
        env: dict[str, str] | None = None,
        user: str | None = None,
        ready: Callable[[], object] | None = None,
        ours: bool = False,
        preloaded: bool = False,
        data: Path | None = None,
    ) -> None:
        """Remember how to start it, whether it is ours, what it leaves.

        `preloaded`: start it with its libraries imported, unless `env` tells
        the interpreter something.
        """
        self.ours = ours
        tells = any(name.startswith("PYTHON") for name in env or {})
        self.preloaded = preloaded and not tells
        self.data = data
        self.command = [str(part) for part in command]
        self.port = port
        self.folder = folder
        self.log = folder / f"{Path(self.command[0]).name}-{port}.log"
        self.env = {**os.environ, **(env or {})}
        self.user = user
        self.ready = ready or self.listens
        self.process: subprocess.Popen[bytes] | Program | None = None
        self.starts_at = 0  # bytes of the log that earlier starts wrote

    def listens(self) -> bool:
        """Return whether somebody accepts connections on the port."""
        return accepts(self.port)

    def start(self) -> "Server":
        """Start the process and wait until it is ready."""
        with self.log.open("ab") as log:
            self.starts_at = log.tell()
            if self.preloaded:
                self.process = Program(
                    self.command, self.folder, self.env, self.log, self.log
                )
            else:
                self.process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self.folder,
                    env=self.env,
                    user=self.user,
                    start_new_session=True,
                )
        wait_until(self._is_ready)
        return self

    def _is_ready(self) -> object:
        """Return whether the process is ready; fail if it has ended."""
        assert self.process is not None
        assert self.process.poll() is None, self.text()
        return self.ready()

    def text(self) -> str:
        """Return what the process printed so far."""
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and all its descendants.

        PostgreSQL's backends and Erlang's helpers leave the process group.
        Return when a SIGSTOP has stopped all their threads.
        """
        assert self.process is not None
        if self.process.poll() is not None:
            return  # its number may be another process's by now
        pids = family(self.process.pid)
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if number == signal.SIGSTOP:
            wait_until(lambda: not any(runs(pid) for pid in pids), 5)

    def kill(self) -> None:
        """End the process the hard way."""
        self.signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def stop(self, timeout: float = 20) -> int:
        """End the process the polite way; return its exit status."""
        assert self.process is not None
        self.signal(signal.SIGCONT)
        self.process.terminate()
        try:
            return self.process.wait(timeout)
        finally:
            self.kill()


@contextlib.contextmanager
def running(server: Server) -> Iterator[Server]:
    """Run a server for the time of the block."""
    try:
        yield server.start()
    finally:
        if server.process is not None:
            # What it covered is saved at a polite end only.
            if server.ours and server.env.get(COVERAGE):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.stop()
            server.kill()
        if server.data is not None:
            shutil.rmtree(server.data)


def postgres(folder: Path, files: Path | None = None) -> Server:
    """Return a private PostgreSQL with a copy of some files, or new ones."""
    binaries = postgres_binaries()
    assert binaries is not None
    user = "postgres" if os.geteuid() == 0 else None
    port = free_port()
    # Not in pytest's folders, which are private: PostgreSQL has its own user.
    data = Path(tempfile.mkdtemp(prefix="orders-postgres-"))
    if user:
        shutil.chown(data, user)
    make = ["cp", "-a", f"{files}/.", data]
    if files is None:
        make = [binaries / "initdb", "--no-sync", "-A", "trust"]
        make += ["-U", "postgres", "-D", data]
    subprocess.run(make, check=True, capture_output=True, user=user, cwd=data)

    def ready() -> bool:
        url = f"postgresql://postgres@127.0.0.1:{port}/postgres"
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(url, connect_timeout=2).close()
            return True
        return False

    return Server(
        [
            binaries / "postgres",
            *("-D", data, "-p", port, "-k", data, "-h", "127.0.0.1"),
            *("-c", "max_connections=200"),
            # Only a crash of the machine could lose data, no killed process.
            *("-c", "fsync=off", "-c", "full_page_writes=off"),
            # Autovacuum would visit the hundreds of databases of the tests.
            *("-c", "autovacuum=off"),
            # Shared memory is then files of the folder, gone with it.
            *("-c", "dynamic_shared_memory_type=mmap"),
        ],
        port=port,
        folder=folder,
        user=user,
        ready=ready,
        data=data,
    )


def pgbouncer(folder: Path, target: Server, *lines: str) -> Server:
    """Return a pooler in front of a PostgreSQL.

    Beyond where it is, and who may come, it has its default settings, and
    those in `lines`.
    """
    port = free_port()
    user = "postgres" if os.geteuid() == 0 else None
    data = Path(tempfile.mkdtemp(prefix="orders-pgbouncer-"))
    configuration = [
        "[databases]",
        f"* = host=127.0.0.1 port={target.port}",
        "[pgbouncer]",
        f"listen_port = {port}",
        "listen_addr = 127.0.0.1",
        "unix_socket_dir =",  # its default is the folder of all of them
        "auth_type = trust",
        f"auth_file = {data}/users",
        "admin_users = postgres",
        *lines,
    ]
    (data / "ini").write_text("\n".join(configuration))
    (data / "users").write_text('"postgres" ""\n')
    if user:
        for path in (data, *data.iterdir()):
            shutil.chown(path, user)
    return Server(
        [PGBOUNCER, data / "ini"],
        port=port,
        folder=folder,
        user=user,
        data=data,
    )


def redis(folder: Path) -> Server:
    """Return a private Redis that keeps nothing on disk."""
    port = free_port()
    return Server(
        ["redis-server", "--port", port, "--save", "", "--appendonly", "no"],
        port=port,
        folder=folder,
    )


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a key, and a certificate of `localhost`; return their files."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"),
            *("-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    return key, certificate


def rabbitmq_with_tls(folder: Path, tls_port: int) -> Server:
    """Return a private RabbitMQ with a certificate for another port."""
    key, certificate = make_certificate(folder)
    server = rabbitmq(folder)
    configuration = folder / "tls.conf"
    configuration.write_text(
        f"""
        listeners.ssl.default = 127.0.0.1:{tls_port}
        ssl_options.cacertfile = {certificate}
        ssl_options.certfile = {certificate}
        ssl_options.keyfile = {key}
        ssl_options.verify = verify_none
        """
    )
    server.env["RABBITMQ_CONFIG_FILE"] = str(configuration)
    server.ready = lambda: accepts(server.port) and accepts(tls_port)
    return server


def rabbitmq(folder: Path) -> Server:
    """Return a private RabbitMQ, its data in `folder`."""
    port, name = free_port(), f"orders{free_port()}"
    return Server(
        [RABBITMQ],
        port=port,
        folder=folder,
        env={
            "HOME": str(folder),
            # Not the machine's own configuration.
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
            "RABBITMQ_CONFIG_FILE": str(folder / "none"),
            "RABBITMQ_DEFAULT_PASS": BROKER_PASSWORD,
            "RABBITMQ_NODENAME": f"{name}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "rabbitmq-log"),
            "RABBITMQ_PID_FILE": str(folder / "rabbitmq.pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
        },
    )


def rabbitmq_url(server: Server) -> str:
    """Return where a private RabbitMQ is."""
    return f"amqp://guest:{BROKER_PASSWORD}@127.0.0.1:{server.port}/"


def rabbitmqctl(server: Server, *arguments: str) -> None:
    """Tell a private RabbitMQ something."""
    subprocess.run(
        [RABBITMQ.with_name("rabbitmqctl"), *arguments],
        env=server.env,
        check=True,
        capture_output=True,
    )


def api(folder: Path, env: dict[str, str]) -> Server:
    """Return `uvicorn orders.api:app` as a process."""
    port = free_port()
    return Server(
        [PYTHON / "uvicorn", "orders.api:app", "--port", port],
        port=port,
        folder=folder,
        env=env,
        ready=lambda: healthy(port),
        ours=True,
        preloaded=True,
    )


def orders(folder: Path, env: dict[str, str] | None = None) -> Server:
    """Return `uv run orders` as a process."""
    port = free_port()
    return Server(
        [PYTHON / "orders"],
        port=port,
        folder=folder,
        env={
            "JWT_SECRET_KEY": "",
            "APP_PORT": str(port),
            "RATE_LIMIT": "",
            **(env or {}),
        },
        ready=lambda: healthy(port),
        ours=True,
        preloaded=True,
    )


def worker(folder: Path, env: dict[str, str]) -> Server:
    """Return a Celery worker as a process."""
    server = Server(
        [
            PYTHON / "celery",
            *("-A", "orders.tasks", "worker", "--loglevel=info"),
        ],
        port=0,
        folder=folder,
        env=env,
        ours=True,
        preloaded=True,
    )
    server.ready = lambda: (
        b"ready." in server.log.read_bytes()[server.starts_at :]
    )
    return server


def healthy(port: object) -> bool:
    """Return whether an API answers there.

    Asked often, hence without a client of a library, which takes 30 ms.
    """
    connection = http.client.HTTPConnection(f"127.0.0.1:{port}", timeout=2)
    with (
        contextlib.suppress(OSError, http.client.HTTPException),
        contextlib.closing(connection),
    ):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False
