"""Log one readable line an event, the same in every process and mode.

The API, the worker, uvicorn and Celery all write
`time level logger [request id] message` to standard output. The request id
follows a request through the process, and its order's event into the worker.
"""

import logging.config
from contextvars import ContextVar

request_id: ContextVar[str] = ContextVar("request_id", default="-")

# Who says less than the rest: what would repeat our own lines, come at each
# try to connect, or warn of a feature of Celery's that is not used here.
LEVELS = {
    "alembic": "WARNING",
    "celery.app.base": "ERROR",
    "celery.app.trace": "WARNING",
    "celery.worker.strategy": "WARNING",
    "kombu.transport.native_delayed_delivery": "ERROR",
    "pika": "CRITICAL",
    "psycopg": "ERROR",
}


class _RequestIdFilter(logging.Filter):
    """Give every record the id of the request it was logged for."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.request_id = request_id.get()
        return True


CONFIG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "line": {
            "format": "%(asctime)s %(levelname)-7s %(name)s"
            " [%(request_id)s] %(message)s"
        }
    },
    "filters": {"request_id": {"()": _RequestIdFilter}},
    "handlers": {
        "stdout": {
            "class": "logging.StreamHandler",
            "stream": "ext://sys.stdout",
            "formatter": "line",
            "filters": ["request_id"],
        }
    },
    "root": {"level": "INFO", "handlers": ["stdout"]},
    "loggers": {
        # uvicorn's own handlers go, so its lines reach ours.
        "uvicorn": {"handlers": [], "level": "INFO", "propagate": True},
        "uvicorn.access": {"handlers": [], "propagate": True},
        **{name: {"level": level} for name, level in LEVELS.items()},
    },
}


def configure_logging() -> None:
    """Send every logger's lines to standard output in the one format."""
    access = logging.getLogger("uvicorn.access")
    switched_off = not (access.handlers or access.propagate)
    logging.config.dictConfig(CONFIG)
    access.propagate = not switched_off  # --no-access-log came first
