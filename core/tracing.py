"""Traces: what says to which trace a thing belongs, and the port to whatever keeps the spans.

The text form is the `traceparent` of W3C Trace Context, level 2. It is read and stored with events
whether spans are kept or not, so that log lines lead to the producer's trace.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

TRACEPARENT_KEY = "traceparent"

# A version of more than two parts after the ids has another length, and no such one exists yet.
_WELL_FORMED = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})"
)
_SAMPLED = 0x01


@dataclass(frozen=True, slots=True)
class TraceParent:
    """A span as others refer to it; the ids are lower-case hex of 32 and 16 digits."""

    trace_id: str
    span_id: str
    sampled: bool

    def __str__(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


class SpanKind(Enum):
    """Whether a span answers somebody else's request, or makes one."""

    SERVER = auto()
    CLIENT = auto()


class Span(Protocol):
    """One that has begun; `end` is called once."""

    @property
    def trace_parent(self) -> TraceParent:
        """What refers to it."""

    def end(self, attributes: Mapping[str, str | int | float], fault: str | None = None) -> None:
        """Keep it, as one that failed where there is a `fault`. Attributes hold no secrets."""


class Tracer(Protocol):
    """Begins spans, and never raises; whether one is kept is decided there and then."""

    def begin(
        self,
        name: str,
        kind: SpanKind,
        *,
        parent: TraceParent | None = None,
        link: TraceParent | None = None,
        trace_id: int | None = None,
    ) -> Span:
        """A span of the parent's trace, or without one of a new trace, which `link` led to.

        `trace_id`, of 128 bits that look random, is the new trace's where it is to be a known one.
        """


def parse_trace_parent(text: object) -> TraceParent | None:
    """None for everything that is not one, as the standard has it: it is then as if not sent."""
    if not isinstance(text, str) or (match := _WELL_FORMED.fullmatch(text)) is None:
        return None
    trace_id, span_id, flags = match.groups()
    return TraceParent(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


def sole_trace_parent(given: Sequence[object]) -> TraceParent | None:
    """Of what a call was given as such; of several none counts."""
    return parse_trace_parent(given[0]) if len(given) == 1 else None
