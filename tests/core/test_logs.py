"""Log lines of our code and of libraries."""

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from core.logs import configure_logs
from core.settings import LogSettings


@pytest.fixture(autouse=True)
def _restore_logs() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def lines(stream: io.BytesIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_entry_is_one_json_line_with_time_and_level() -> None:
    stream = io.BytesIO()
    configure_logs(LogSettings(log_format="json"), stream)

    structlog.get_logger().info("attempt", attempt=1, text="two\nlines")

    [entry] = lines(stream)
    assert entry["event"] == "attempt"
    assert entry["level"] == "info"
    assert entry["text"] == "two\nlines"
    assert str(entry["timestamp"]).endswith("Z")


def test_forged_line_stays_inside_its_entry() -> None:
    stream = io.BytesIO()
    configure_logs(LogSettings(log_format="json"), stream)

    structlog.get_logger().info("attempt", detail='\n{"event": "forged"}\x1b[31m')

    assert len(stream.getvalue().splitlines()) == 1


def test_lower_levels_are_omitted() -> None:
    stream = io.BytesIO()
    configure_logs(LogSettings(log_level="warning", log_format="json"), stream)

    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")

    assert [entry["event"] for entry in lines(stream)] == ["loud"]


def test_warning_of_a_library_joins_the_stream() -> None:
    stream = io.BytesIO()
    configure_logs(LogSettings(log_format="json"), stream)

    logging.getLogger("asyncio").warning("slow %s", "callback")

    [entry] = lines(stream)
    assert (entry["library"], entry["message"]) == ("asyncio", "slow callback")


def test_text_format_is_readable_text() -> None:
    stream = io.BytesIO()
    configure_logs(LogSettings(log_format="text"), stream)

    structlog.get_logger().info("serving", port=1)

    assert b"serving" in stream.getvalue()
    assert not stream.getvalue().startswith(b"{")
