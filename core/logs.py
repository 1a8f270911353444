"""Log setup of all processes: one JSON object per line on stderr, or text on a terminal."""

import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial, partialmethod
from types import MappingProxyType
from typing import Any, BinaryIO

import orjson
import structlog

from core.settings import LogSettings

_LIBRARY_LEVEL = logging.WARNING
_SAMPLE_SPACE = 2**32

# Hides local variables, because they can hold secrets and payloads.
_render_exception = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)


def configure_logs(settings: LogSettings, stream: BinaryIO | None = None) -> None:
    """Send all further logs, including those of libraries, to `stream` (default: stderr)."""
    target = stream or sys.stderr.buffer
    as_text = settings.log_format == "text" or (settings.log_format == "auto" and target.isatty())
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    processors: list[structlog.typing.Processor]
    if as_text:
        processors = [
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer(
                exception_formatter=structlog.dev.plain_traceback,
            ),
            lambda _logger, _name, line: str(line).encode(),
        ]
    else:
        processors = [_to_json]
    structlog.configure(
        processors=processors,
        wrapper_class=partial(_Logger, level),  # type: ignore[arg-type]
        logger_factory=lambda *_: target,
        # Only tests pass a stream, and they configure logs again.
        cache_logger_on_first_use=stream is None,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=_LIBRARY_LEVEL, force=True)


class _Logger:
    """Passes an event and its fields through the processors.

    structlog's own logger also copies bound fields. We bind none and log a line for each call and
    each attempt: 3.8 us with this logger, 6.7 us with structlog's.
    """

    def __init__(
        self,
        level: int,
        stream: BinaryIO,
        processors: Sequence[structlog.typing.Processor],
        context: object,  # noqa: ARG002 - structlog passes it
    ):
        self._level = level
        self._stream = stream
        self._processors = processors

    def info(self, event: str, **fields: Any) -> None:
        if self._level <= logging.INFO:
            self._log("info", event, fields)

    def log(self, level: int, event: str, **fields: Any) -> None:
        if self._level <= level:
            self._log(logging.getLevelName(level).lower(), event, fields)

    debug = partialmethod(log, logging.DEBUG)
    warning = partialmethod(log, logging.WARNING)
    error = partialmethod(log, logging.ERROR)
    exception = partialmethod(log, logging.ERROR, exc_info=True)

    def _log(self, level: str, event: str, fields: dict[str, Any]) -> None:
        entry: Any = fields
        entry["event"] = event
        try:
            for process in self._processors:
                entry = process(None, level, entry)
        except structlog.DropEvent:
            # structlog.testing drops the lines that it captures.
            return
        # One write per line, so that lines of threads do not mix.
        self._stream.write(entry + b"\n")
        self._stream.flush()


class SuccessSampling:
    """Selects the log lines of calls and attempts that succeeded at once."""

    def __init__(self, settings: LogSettings):
        self.slow_seconds = settings.log_slow_seconds
        self._rate = settings.log_success_sample_rate
        self._selected_below = round(self._rate * _SAMPLE_SPACE)
        #: Fields of a selected line: the sample rate, unless all lines are written.
        self.log_fields: Mapping[str, float] = (
            {} if self._rate == 1 else MappingProxyType({"sample_rate": self._rate})
        )

    def selects(self, number: int) -> bool:
        """Decide by the lowest 32 bits, so that all processes select the same things."""
        return number % _SAMPLE_SPACE < self._selected_below


class _ToStructlog(logging.Handler):
    """Sends logs of libraries to the same stream in the same format."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger()
        log.log(
            record.levelno,
            "library",
            library=record.name,
            message=record.getMessage(),
            exc_info=record.exc_info,
        )


def _to_json(_logger: Any, level: str, entry: structlog.typing.EventDict) -> bytes:
    if "exc_info" in entry:
        entry = _render_exception(_logger, level, entry)
    entry["level"] = level
    entry["timestamp"] = datetime.now(UTC)
    return orjson.dumps(entry, default=str, option=orjson.OPT_UTC_Z)
