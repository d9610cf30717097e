"""Log one readable line an event, the same in every process and mode.

The API, the worker, uvicorn and Celery all write
`time level logger [request id] message` to standard output, or a JSON object
of the same parts. The request id follows a request through the process, and
its order's event into the worker.
"""

import logging
import sys
import time
from asyncio import CancelledError
from contextvars import ContextVar
from typing import Any

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

REPORT_INTERVAL = 10  # seconds without a failure before the next is news
PROBES = ("/health", "/ready")  # asked every few seconds, and not logged
FORMS: dict[str, logging.Formatter] = {
    "text": logging.Formatter(
        "%(asctime)s %(levelname)-7s %(name)s [%(request_id)s] %(message)s"
    ),
    "json": JsonFormatter(
        ["levelname", "name", "message", "request_id"],
        rename_fields={"levelname": "level", "name": "logger"},
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # of uvicorn
        timestamp="time",
    ),
}
# What would repeat our own lines, or come at each try to connect.
LEVELS = {"alembic": "WARNING", "pika": "CRITICAL", "psycopg": "ERROR"}

request_id: ContextVar[str] = ContextVar("request_id", default="-")


def _is_shown(record: logging.LogRecord) -> bool:
    """Add the request's id; leave out probes, and calls cut at the stop."""
    record.request_id = request_id.get()
    if record.exc_info and record.exc_info[0] is CancelledError:
        return False  # uvicorn has said how many calls it ends
    arguments: Any = record.args
    return record.name != "uvicorn.access" or arguments[2] not in PROBES


def configure_logging(form: str) -> None:
    """Send all lines to standard output in one form, `text` or `json`."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(FORMS[form])
    handler.addFilter(_is_shown)
    logging.basicConfig(level="INFO", handlers=[handler], force=True)
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for name in ("uvicorn", "uvicorn.access"):
        theirs = logging.getLogger(name)
        if theirs.handlers:  # else there are none, or --no-access-log
            theirs.handlers.clear()
            theirs.propagate = True


class Outage:
    """Say once that something is away, and once that it works again."""

    def __init__(self, module: str, what: str) -> None:
        """Start with all well; `what` begins the lines of the module."""
        self._logger, self._what = logging.getLogger(module), what
        self._failing = False
        self._report_at = 0.0  # of time.monotonic

    def report(self, error: BaseException, *, fault: bool = False) -> None:
        """Log a failure unless the last was a moment ago."""
        news = time.monotonic() >= self._report_at
        self._report_at = time.monotonic() + REPORT_INTERVAL
        self._failing = True
        if news:
            reason = str(error).split("\n")[0] or type(error).__name__
            # A fault of ours, which is no outage, comes with its traceback.
            line = "%s failed: %s" if fault else "%s is away: %s"
            self._logger.warning(line, self._what, reason, exc_info=fault)

    def end(self) -> None:
        """Log that it works, if it did not."""
        if self._failing:
            self._failing = False
            self._logger.info("%s works again", self._what)
