"""Log in single readable lines, alike in every process and mode.

The API, the worker, uvicorn and Celery all write
`time level logger [request id] message` to standard output, or a JSON object
with the same parts. The id of a request follows the request through the
process, and the event of its order into the worker.
"""

import logging
import sys
import time
from asyncio import CancelledError
from contextvars import ContextVar

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

REPORT_INTERVAL = 10  # seconds between two lines about one outage
PROBES = ("/health", "/ready")  # asked every few seconds, and not logged
FORMS: dict[str, logging.Formatter] = {
    "text": logging.Formatter(
        "%(asctime)s %(levelname)-7s %(name)s [%(request_id)s] %(message)s"
    ),
    "json": JsonFormatter(
        ["levelname", "name", "message", "request_id"],
        rename_fields={"levelname": "level", "name": "logger"},
        # uvicorn adds a copy of the message with colours.
        reserved_attrs=[*RESERVED_ATTRS, "color_message"],
        timestamp="time",
    ),
}
# Below these levels the libraries repeat our own lines, or write one for each
# attempt to connect.
LEVELS = {"alembic": "WARNING", "pika": "CRITICAL", "psycopg": "ERROR"}

request_id: ContextVar[str] = ContextVar("request_id", default="-")


def _is_shown(record: logging.LogRecord) -> bool:
    """Return whether to write a record, and give it the request's id."""
    record.request_id = request_id.get()
    # When uvicorn stops it cancels the calls that last too long, and logs how
    # many: a traceback for each call would say nothing new.
    if record.exc_info and record.exc_info[0] is CancelledError:
        return False
    if record.name == "uvicorn.access" and isinstance(record.args, tuple):
        _client, _method, path, *_ = record.args
        # Under `--root-path` the path begins with that of the whole app.
        return not str(path).partition("?")[0].endswith(PROBES)
    return True


def configure_logging(form: str) -> None:
    """Send all lines to standard output in one form, `text` or `json`."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(FORMS[form])
    handler.addFilter(_is_shown)
    logging.basicConfig(level="INFO", handlers=[handler], force=True)
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)
    for name in ("uvicorn", "uvicorn.access"):
        logger = logging.getLogger(name)
        # Under `--no-access-log` the logger has no handler, and its lines
        # must not reach ours.
        if logger.handlers:
            logger.handlers.clear()
            logger.propagate = True


class Outage:
    """Logs once that something is away, and once that it works again.

    What comes and goes is logged no more often than REPORT_INTERVAL allows.
    """

    def __init__(self, module: str, what: str) -> None:
        """Log as `module`; each line begins with `what`."""
        self._logger = logging.getLogger(module)
        self._what = what
        self._logged = ""  # what the last line says; empty: that all is well
        self._next_at = 0.0  # of time.monotonic, when a failure may be logged

    def report(self, error: BaseException, *, fault: bool = False) -> None:
        """Log a failure, unless the last line says the same.

        A `fault` is an error of ours: its line has a traceback.
        """
        line = "%s failed: %s" if fault else "%s is away: %s"
        if line != self._logged and time.monotonic() >= self._next_at:
            self._logged = line
            self._next_at = time.monotonic() + REPORT_INTERVAL
            reason = str(error).split("\n")[0] or type(error).__name__
            self._logger.warning(line, self._what, reason, exc_info=fault)

    def end(self) -> None:
        """Log that it works again, if a line says that it failed."""
        if self._logged:
            self._logged = ""
            self._logger.info("%s works again", self._what)
