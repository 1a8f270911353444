"""Parsing of traceparent headers."""

import pytest

from core.tracing import TraceParent, parse_trace_parent, sole_trace_parent

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"


@pytest.mark.parametrize(("flags", "sampled"), [("01", True), ("00", False), ("03", True)])
def test_trace_parent_is_parsed(flags: str, sampled: bool) -> None:
    parsed = parse_trace_parent(f"00-{TRACE}-{SPAN}-{flags}")

    assert parsed == TraceParent(TRACE, SPAN, sampled)
    assert parse_trace_parent(str(parsed)) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-",
        f"00-{TRACE}-{SPAN}-01\n",
        f"00-{TRACE}-{SPAN}-01" * 1000,
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0x",
        f"00-{TRACE[:-1]}é-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01".encode(),
        None,
    ],
)
def test_invalid_trace_parent_is_none(text: object) -> None:
    assert parse_trace_parent(text) is None


def test_several_trace_parents_count_as_none() -> None:
    one = f"00-{TRACE}-{SPAN}-01"

    assert sole_trace_parent([one]) is not None
    assert sole_trace_parent([one, one]) is None
    assert sole_trace_parent([]) is None
