"""Log set-up for every process: one JSON object a line on stderr, readable text on a terminal."""

import logging
import sys
from datetime import UTC, datetime
from typing import Any, BinaryIO

import orjson
import structlog

from core.config import LogSettings

_LIBRARY_LEVEL = logging.WARNING


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
        processors = [
            # Without the variables of each frame: secrets and payloads are among them.
            structlog.processors.ExceptionRenderer(
                structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
            ),
            _to_json,
        ]
    # One for all: what structlog makes for each line by itself costs more than the line.
    logger = structlog.BytesLogger(target)
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: logger,
        cache_logger_on_first_use=False,
    )
    logging.basicConfig(handlers=[_ToStructlog()], level=_LIBRARY_LEVEL, force=True)


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
    entry["level"] = level
    entry["timestamp"] = datetime.now(UTC)
    return orjson.dumps(entry, default=str, option=orjson.OPT_UTC_Z)
