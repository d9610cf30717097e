"""Log one readable line an event, the same in every process and mode.

The API, the worker, uvicorn and Celery all write
`time level logger [request id] message` to standard output, or a JSON object
of the same parts. The request id follows a request through the process, and
its order's event into the worker.
"""

import json
import logging.config
import threading
import time
from asyncio import CancelledError
from contextvars import ContextVar
from datetime import UTC, datetime

REPORT_INTERVAL = 10  # seconds without a failure before the next is news
PROBES = ("/health", "/ready")  # asked every few seconds, and not logged
TEXT = "%(asctime)s %(levelname)-7s %(name)s [%(request_id)s] %(message)s"
# Who says less than the rest: what would repeat our own lines, or come at
# each try to connect.
LEVELS = {
    "alembic": "WARNING",
    "celery.app.base": "ERROR",
    "celery.app.trace": "WARNING",
    "celery.worker.strategy": "WARNING",
    "pika": "CRITICAL",
    "psycopg": "ERROR",
}

request_id: ContextVar[str] = ContextVar("request_id", default="-")


def _is_shown(record: logging.LogRecord) -> bool:
    """Add the request's id; leave out probes, and calls cut at the stop."""
    record.request_id = request_id.get()
    if record.exc_info and record.exc_info[0] is CancelledError:
        return False  # uvicorn has said how many calls it ends
    arguments = record.args if isinstance(record.args, tuple) else ()
    return record.name != "uvicorn.access" or arguments[2] not in PROBES


class JsonFormatter(logging.Formatter):
    """Write a record as one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object, with the traceback inside its message."""
        moment = datetime.fromtimestamp(record.created, UTC)
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        parts = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": message,
            "request_id": request_id.get(),
        }
        return json.dumps(parts)


def configure_logging(form: str) -> None:
    """Send all lines to standard output in one form, `text` or `json`."""
    access = logging.getLogger("uvicorn.access")
    switched_off = not (access.handlers or access.propagate)
    stdout = {
        "class": "logging.StreamHandler",
        "stream": "ext://sys.stdout",
        "formatter": form,
        "filters": [_is_shown],
    }
    ours = {"handlers": [], "propagate": True}  # not uvicorn's own handlers
    text = {"format": TEXT}
    levels = {name: {"level": level} for name, level in LEVELS.items()}
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"text": text, "json": {"()": JsonFormatter}},
            "handlers": {"stdout": stdout},
            "root": {"level": "INFO", "handlers": ["stdout"]},
            "loggers": {"uvicorn": ours, "uvicorn.access": ours, **levels},
        }
    )
    access.propagate = not switched_off  # --no-access-log came first


class Outage:
    """Say once that something is away, and once that it works again."""

    def __init__(self, logger: logging.Logger, what: str) -> None:
        """Start with all well; `what` begins the log's lines."""
        self._logger, self._what = logger, what
        self._failing = False
        self._lock = threading.Lock()
        self._report_at = 0.0  # of time.monotonic

    def report(self, error: object, *, fault: bool = False) -> None:
        """Log a failure unless the last was a moment ago."""
        # A fault of ours, which is no outage, is logged with its traceback.
        with self._lock:  # threads share it: the relay's, the event loop's
            news = time.monotonic() >= self._report_at
            self._report_at = time.monotonic() + REPORT_INTERVAL
        self._failing = True
        if news:
            reason = str(error).split("\n")[0] or type(error).__name__
            trace = error if fault and isinstance(error, Exception) else None
            line = "%s failed: %s" if fault else "%s is away: %s"
            self._logger.warning(line, self._what, reason, exc_info=trace)

    def end(self) -> None:
        """Log that it works, if it did not."""
        if self._failing:
            self._failing = False
            self._logger.info("%s works again", self._what)
