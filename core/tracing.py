"""The `traceparent` of W3C Trace Context (level 2), and the port to the span exporter.

Events store the producer's traceparent even without an exporter, so that log lines name its trace.
`cli/process/spans.py` implements the port with OpenTelemetry.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

TRACEPARENT_KEY = "traceparent"

# All known versions have this length.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
)
_SAMPLED = 0x01


@dataclass(frozen=True, slots=True)
class TraceParent:
    """A reference to a span. The ids are 32 and 16 lower-case hexadecimal digits."""

    trace_id: str
    span_id: str
    sampled: bool

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


class SpanKind(Enum):
    """SERVER: handles a request. CLIENT: makes one."""

    SERVER = auto()
    CLIENT = auto()


class Span(Protocol):
    """A started span. Call `end` once."""

    @property
    def trace_parent(self) -> TraceParent:
        """The reference to this span."""

    def end(self, attributes: Mapping[str, str | int | float], error: str | None = None) -> None:
        """End the span, as failed if there is an `error`. Attributes must hold no secrets."""


class Tracer(Protocol):
    """Starts spans. Never raises. The sampling decision is made at the start."""

    def start(
        self,
        name: str,
        kind: SpanKind,
        *,
        parent: TraceParent | None = None,
        link: TraceParent | None = None,
        trace_id: int | None = None,
    ) -> Span:
        """Start a span in the trace of `parent`, or in a new trace that links to `link`.

        `trace_id` sets the id of the new trace: 128 bits that look random.
        """


def parse_trace_parent(text: object) -> TraceParent | None:
    """Parse a traceparent. Returns None if it is invalid: the standard then ignores the header."""
    if not isinstance(text, str) or (match := _TRACEPARENT.fullmatch(text)) is None:
        return None
    trace_id, span_id, flags = match.groups()
    return TraceParent(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def sole_trace_parent(given: Sequence[object]) -> TraceParent | None:
    """Parse the traceparent headers of a call. Several headers count as none."""
    return parse_trace_parent(given[0]) if len(given) == 1 else None
