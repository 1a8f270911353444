"""The current call: its method, id, caller and trace.

gRPC looks up the handler of a call and runs it in one task per call. So a context variable holds
the call for the handler and its wrappers. Metadata that Postrider does not read is not kept.
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
    """One call. A value is None until it is known."""

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
        #: All values of that metadata key.
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
        #: The server's span, or the caller's without one.
        self.trace_parent: TraceParent | None = sole_trace_parent(trace_parents)
        self.span: Span | None = None
        #: Not yet verified.
        self.token: str | None = None
        self.caller: Principal | None = None
        #: The reason why the handler does not run.
        self.refusal: Exception | None = None
        #: The context of gRPC, once the handler runs.
        self.context: Any = None
        #: The request, if a wrapper no longer has it.
        self.message: object = None


_current: ContextVar[RpcCall] = ContextVar("current_call")


def begin_call(method: str, metadata: Iterable[tuple[str, str | bytes]]) -> RpcCall:
    """Make this the current call until its task ends."""
    call = RpcCall(method, metadata)
    _current.set(call)
    return call


def current_call() -> RpcCall:
    """Return the current call. Raises LookupError outside of calls."""
    return _current.get()


@dataclass(frozen=True, slots=True)
class Origin:
    """The address of the peer, and the user agent of its library."""

    address: str
    user_agent: str


def origin(call: RpcCall) -> Origin:
    """Return the origin of a call whose handler runs. Behind a gateway it is the gateway."""
    metadata = call.context.invocation_metadata() or ()
    agent = next((value for key, value in metadata if key == "user-agent"), "")
    return Origin(
        # As in `ipv4:10.0.0.1:4711` and `ipv6:%5B::1%5D:4711`.
        printable(unquote(call.context.peer()).removeprefix("ipv4:").removeprefix("ipv6:")),
        printable(agent if isinstance(agent, str) else ""),
    )


def printable(text: str) -> str:
    """Return a caller's text as one limited line of printable characters."""
    shown = text[:_TEXT_MAX]
    return shown if shown.isprintable() else ascii(shown)[1:-1][:_TEXT_MAX]


_WELL_FORMED = re.compile(r"[A-Za-z0-9_-]{8,64}")


def request_id_of(given: Sequence[str | bytes]) -> str:
    """Return the caller's first well-formed id, or a new one.

    It is in the log line, the audit entry and the errors of the call.
    """
    for value in given:
        if isinstance(value, str) and _WELL_FORMED.fullmatch(value):
            return value
    # It is not a secret.
    return f"{getrandbits(64):016x}"
