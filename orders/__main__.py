"""Run the service: `uv run orders`.

The first run on an empty machine writes `.env` with a secret of its own. Every
run migrates the database and serves; what has no URL runs in the process.
"""

import secrets
from contextlib import suppress
from pathlib import Path

import uvicorn
from alembic import command
from alembic.config import Config

from orders.logs import configure_logging
from orders.settings import ENV_FILE, Settings, load_settings, refuse_to_start

ALEMBIC_INI = Path(__file__).parent.parent / "alembic.ini"
MAX_CONNECTIONS = 900  # more are answered 503; a process may open 1024 files


def main() -> None:
    """Set up what is missing, migrate, and serve until interrupted."""
    if not load_settings(secret=False).jwt_secret_key:
        write_env_file()
    settings = load_settings()
    configure_logging(settings.log_format)
    command.upgrade(Config(ALEMBIC_INI), "head")
    if settings.log_format == "text":
        print(banner(settings), flush=True)
    uvicorn.run(
        "orders.api:app",
        host=settings.app_host,
        port=settings.app_port,
        workers=settings.web_concurrency,
        log_config=None,  # ours: here, and in `orders.api` in each process
        forwarded_allow_ips=settings.forwarded_allow_ips,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=5,  # seconds that calls get to finish
    )


def write_env_file() -> None:
    """Write `.env`, for this user's eyes only; an existing one is kept."""
    text = (
        "# Written by the first `uv run orders`; .env.example explains every"
        f" variable.\nJWT_SECRET_KEY={secrets.token_hex(32)}\n"
    )
    try:
        with suppress(FileExistsError):
            ENV_FILE.touch(0o600, exist_ok=False)
            ENV_FILE.write_text(text)
    except OSError as error:
        refuse_to_start(f"{error}: set JWT_SECRET_KEY, or a folder to write")


def banner(settings: Settings) -> str:
    """Return what a person wants to know first."""
    host = settings.app_host.replace("0.0.0.0", "127.0.0.1")  # noqa: S104
    url = f"http://{host}:{settings.app_port}"
    limit = settings.rate_limit or "none"
    return f"""
  orders    {url}
  docs      {url}/docs
  database  {settings.database_url.split(":")[0]}
  cache     {"redis" if settings.redis_url else "in process"}
  events    {"rabbitmq, to Celery" if settings.rabbitmq_url else "in process"}
  limit     {limit}; `RATE_LIMIT= uv run orders` lifts it
"""


if __name__ == "__main__":
    main()
