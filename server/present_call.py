"""The call under way: where it came from, and its request where a wrapper no longer has it.

gRPC gives the context to handlers alone, and what records a change stands far below them.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import grpc

_TEXT_MAX = 256

# As with the caller: one task a call, so no other call sees it.
current_context: ContextVar[grpc.aio.ServicerContext[Any, Any]] = ContextVar("current_context")
current_message: ContextVar[object] = ContextVar("current_message", default=None)


@dataclass(frozen=True, slots=True)
class Origin:
    """Host and port that connected to us, and what its library calls itself."""

    address: str
    user_agent: str


def origin() -> Origin:
    """Of the present call; behind a gateway the address is the gateway's."""
    context = current_context.get(None)
    if context is None:
        return Origin("", "")
    metadata = context.invocation_metadata() or ()
    agent = next((value for key, value in metadata if key == "user-agent"), "")
    return Origin(
        # As in `ipv4:10.0.0.1:4711` and `ipv6:%5B::1%5D:4711`.
        printable(unquote(context.peer()).removeprefix("ipv4:").removeprefix("ipv6:")),
        printable(agent if isinstance(agent, str) else ""),
    )


def printable(text: str) -> str:
    """Text of a caller's choice as one bounded line, which PostgreSQL takes and no log mistakes."""
    shown = text[:_TEXT_MAX]
    return shown if shown.isprintable() else ascii(shown)[1:-1][:_TEXT_MAX]
