"""Run the service: `uv run orders`.

The first run on an empty machine writes `.env` with a secret of its own. Every
run migrates the database and serves; what has no URL runs in the process.
"""

import os
import secrets
from pathlib import Path

import uvicorn
from alembic import command
from alembic.config import Config
from sqlalchemy.exc import SQLAlchemyError

from orders.logs import CONFIG, configure_logging
from orders.settings import (
    ENV_FILE,
    STARTUP_FAILURE,
    Settings,
    load_settings,
    read_environment,
)

ALEMBIC_INI = Path(__file__).parent.parent / "alembic.ini"
SHUTDOWN_TIMEOUT = 5  # seconds that calls in progress get to finish


def main() -> None:
    """Set up what is missing, migrate, and serve until interrupted."""
    if not read_environment().get("JWT_SECRET_KEY"):
        write_env_file()
    settings = load_settings()
    configure_logging()
    migrate()
    print(banner(settings), flush=True)
    uvicorn.run(
        "orders.api:app",
        host=settings.app_host,
        port=settings.app_port,
        log_config=CONFIG,
        forwarded_allow_ips=settings.forwarded_allow_ips,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
    )


def write_env_file() -> None:
    """Write `.env`, for this user's eyes only; an existing one is kept."""
    try:
        handle = os.open(ENV_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(handle, "w") as file:
        file.write(
            "# Written by the first `uv run orders`; .env.example explains"
            " every variable.\n"
            f"JWT_SECRET_KEY={secrets.token_hex(32)}\n"
        )


def migrate() -> None:
    """Bring the database to the newest revision, or end with one line."""
    try:
        command.upgrade(Config(ALEMBIC_INI), "head")
    except SQLAlchemyError as error:
        reason = str(error).splitlines()[0]
        print(f"orders cannot start: DATABASE_URL: {reason}", flush=True)
        raise SystemExit(STARTUP_FAILURE) from None


def banner(settings: Settings) -> str:
    """Return what a person wants to know first."""
    host = settings.app_host.replace("0.0.0.0", "127.0.0.1")
    url = f"http://{host}:{settings.app_port}"
    backend = settings.database_url.split(":")[0].split("+")[0]
    return "\n".join(
        (
            "",
            f"  orders    {url}",
            f"  docs      {url}/docs",
            f"  database  {backend}",
            f"  cache     {'redis' if settings.redis_url else 'in process'}",
            "  events    "
            + (
                "rabbitmq, to a Celery worker"
                if settings.rabbitmq_url
                else "in process"
            ),
            "",
        )
    )


if __name__ == "__main__":
    main()
