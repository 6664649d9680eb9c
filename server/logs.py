"""Configures logging: text lines for people, or JSON for machines."""

import contextlib
import contextvars
import json
import logging
import sys
from typing import TextIO

OWN_LOGGERS = ("server", "uvicorn")

# The id of the request that is being served.
request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": request_id.get(),
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """One line, with the request's id if there is one."""

    def __init__(self) -> None:
        super().__init__("%(levelname)-8s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        return line if request_id.get() == "-" else f"{line} [{request_id.get()}]"


class LogHandler(logging.StreamHandler[TextIO]):
    """Reports once that the log cannot be written, and goes on."""

    has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Called when a line could not be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        if not self.has_failed:
            # To standard output, which may work where standard error does not.
            try_print(f"error: the log cannot be written: {error}")
        self.has_failed = True


def try_print(line: str, file: TextIO | None = None) -> None:
    """Prints to `file` or standard output; ignores a failure to write."""
    with contextlib.suppress(OSError):
        print(line, file=file, flush=True)


def configure_logs(level: str, log_format: str) -> None:
    """level: as in logging, in lower case. log_format: 'text' or 'json'."""
    handler = LogHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    # Other libraries log only warnings: sse-starlette's debug lines contain whole replies.
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(logging.WARNING, number), handlers=[handler])
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(number)
