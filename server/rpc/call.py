"""The call under way, and what is known of it so far.

gRPC asks for the handler of a call, and runs it, in one task that only this call has. What is kept
here is therefore seen by the handler, by what wraps it and by all that they call, and by no other
call. Of what a caller sends along, only what we read is kept.
"""

import re
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from random import getrandbits
from time import perf_counter
from typing import Any
from urllib.parse import unquote

from core.tracing import TRACEPARENT_KEY, Span, TraceParent, sole_trace_parent
from server.auth.principal import Principal

REQUEST_ID = "x-request-id"
_TEXT_MAX = 256


class RpcCall:
    """One call; what is None is not known, or not yet."""

    __slots__ = (
        "authorization",
        "began",
        "caller",
        "context",
        "message",
        "method",
        "refusal",
        "request_id",
        "span",
        "token",
        "trace_parent",
    )

    def __init__(self, method: str, metadata: Iterable[tuple[str, str | bytes]]):
        self.began = perf_counter()
        #: As /package.Service/Method.
        self.method = method
        #: What was given under that name, each time.
        self.authorization: tuple[str | bytes, ...] = ()
        request_ids: tuple[str | bytes, ...] = ()
        trace_parents: tuple[str | bytes, ...] = ()
        for key, value in metadata:
            if key == "authorization":
                self.authorization += (value,)
            elif key == REQUEST_ID:
                request_ids += (value,)
            elif key == TRACEPARENT_KEY:
                trace_parents += (value,)
        self.request_id = request_id_of(request_ids)
        #: Our span in it, or the caller's where we have none.
        self.trace_parent: TraceParent | None = sole_trace_parent(trace_parents)
        self.span: Span | None = None
        #: Not yet verified.
        self.token: str | None = None
        self.caller: Principal | None = None
        #: Why its handler will not be run.
        self.refusal: Exception | None = None
        #: gRPC's, once its handler runs.
        self.context: Any = None
        #: Its request, where a wrapper no longer has it.
        self.message: object = None


_present: ContextVar[RpcCall] = ContextVar("present_call")


def begin_call(method: str, metadata: Iterable[tuple[str, str | bytes]]) -> RpcCall:
    """From here on this is the present call, until its task ends."""
    call = RpcCall(method, metadata)
    _present.set(call)
    return call


def current_call() -> RpcCall:
    """LookupError outside of calls."""
    return _present.get()


@dataclass(frozen=True, slots=True)
class Origin:
    """Host and port that connected to us, and what its library calls itself."""

    address: str
    user_agent: str


def origin(call: RpcCall) -> Origin:
    """Of a call whose handler runs; behind a gateway the address is the gateway's."""
    metadata = call.context.invocation_metadata() or ()
    agent = next((value for key, value in metadata if key == "user-agent"), "")
    return Origin(
        # As in `ipv4:10.0.0.1:4711` and `ipv6:%5B::1%5D:4711`.
        printable(unquote(call.context.peer()).removeprefix("ipv4:").removeprefix("ipv6:")),
        printable(agent if isinstance(agent, str) else ""),
    )


def printable(text: str) -> str:
    """Text of a caller's choice as one bounded line, which PostgreSQL takes and no log mistakes."""
    shown = text[:_TEXT_MAX]
    return shown if shown.isprintable() else ascii(shown)[1:-1][:_TEXT_MAX]


# The id of a call: in its log line, its audit entry, and the errors its caller sees.


_WELL_FORMED = re.compile(r"[A-Za-z0-9_-]{8,64}")


def request_id_of(given: Sequence[str | bytes]) -> str:
    """The caller's own: the first that is well-formed, else one that is made."""
    for value in given:
        if isinstance(value, str) and _WELL_FORMED.fullmatch(value):
            return value
    # It tells calls apart, and is no secret.
    return f"{getrandbits(64):016x}"
