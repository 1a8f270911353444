"""Log set-up for every process: one JSON object a line on stderr, readable text on a terminal."""

import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from types import MappingProxyType
from typing import Any, BinaryIO

import orjson
import structlog

from core.settings import LogSettings

_LIBRARY_LEVEL = logging.WARNING
_DRAWS = 2**32

# Without the variables of each frame: secrets and payloads are among them.
_render_exception = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)


def configure_logs(settings: LogSettings, stream: BinaryIO | None = None) -> None:
    """Send everything logged from here on, also by libraries, to `stream` (default: stderr)."""
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
        # For the life of the process, where nobody will want another stream.
        cache_logger_on_first_use=stream is None,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=_LIBRARY_LEVEL, force=True)


class _Logger:
    """Takes an event and its fields through the processors, and no more.

    structlog's own also keeps fields that are bound to it, and copies them for each line. Nothing
    here binds any, and there is a line for each call and each attempt: this costs half as much.
    """

    def __init__(
        self,
        least: int,
        stream: BinaryIO,
        processors: Sequence[structlog.typing.Processor],
        context: object,  # noqa: ARG002 - structlog's way to call it
    ):
        self._least = least
        self._stream = stream
        self._processors = processors

    def debug(self, event: str, **fields: Any) -> None:
        self.log(logging.DEBUG, event, **fields)

    def info(self, event: str, **fields: Any) -> None:
        if self._least <= logging.INFO:
            self._log("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self.log(logging.WARNING, event, **fields)

    def error(self, event: str, **fields: Any) -> None:
        self.log(logging.ERROR, event, **fields)

    def exception(self, event: str, **fields: Any) -> None:
        self.log(logging.ERROR, event, **{"exc_info": True, **fields})

    def log(self, level: int, event: str, **fields: Any) -> None:
        if self._least <= level:
            self._log(logging.getLevelName(level).lower(), event, fields)

    def _log(self, level: str, event: str, fields: dict[str, Any]) -> None:
        entry: Any = fields
        entry["event"] = event
        try:
            for process in self._processors:
                entry = process(None, level, entry)
        except structlog.DropEvent:
            # How structlog's own tests keep what they capture from being written.
            return
        # A line at once, so that none is torn by another thread's.
        self._stream.write(entry + b"\n")
        self._stream.flush()


class SuccessSampling:
    """Which of the lines of what went well at once are written."""

    def __init__(self, settings: LogSettings):
        self.slow_seconds = settings.log_slow_seconds
        self._rate = settings.log_success_sample_rate
        self._drawn = round(self._rate * _DRAWS)
        #: What a line that was drawn says of it; nothing where all are.
        self.log_fields: Mapping[str, float] = (
            {} if self._rate == 1 else MappingProxyType({"sample_rate": self._rate})
        )

    def selects(self, number: int) -> bool:
        """Decided by the lowest 32 bits, so that the same thing is drawn wherever it is logged."""
        return number % _DRAWS < self._drawn


class _ToStructlog(logging.Handler):
    """Carries what libraries log to the same stream and format."""

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
