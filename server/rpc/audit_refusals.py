"""Writes refused calls of known callers to the audit log.

Refused changes are recorded, and all calls without permission. The entry is written in a separate
transaction before the caller gets the refusal. Unknown callers write no entries, and the entries of
each known caller are limited, so that no caller can fill the table. The log line of a call always
has its refusal.
"""

import asyncio
from collections.abc import Callable
from time import monotonic

import structlog

from core.errors import ConfigurationError, PermissionDenied, PostriderError, Unavailable
from core.ids import new_id
from core.models import AuditEntry
from server.auth.principal import Principal
from server.auth.rate_limits import Rate
from server.database import Sessions
from server.rpc.call import RpcCall, origin, printable

#: RPCs that change data.
CHANGES = frozenset(
    {
        "CreateEventType",
        "CreateWebhookConfig",
        "DeactivateWebhookConfig",
        "DeleteWebhookConfig",
        "EraseMerchant",
        "ReactivateWebhookConfig",
        "RedeliverDeliveries",
        "RedeliverDelivery",
        "RotateSecret",
        "UpdateEventType",
        "UpdateWebhookConfig",
    }
)
#: Entries of one caller: the burst, and the rate after it.
BURST = 60
PER_SECOND = 0.1
#: How long a refusal waits for its entry.
WRITE_SECONDS = 2.0

#: Paths of the resource in a request. The first one that is set counts.
_RESOURCES = (
    ("id",),
    ("webhook_config", "id"),
    ("event_type", "name"),
    ("webhook_id",),
    ("merchant_id",),
    ("event", "merchant_id"),
)

log = structlog.get_logger()


class RefusalAudit:
    """Writes the entries. `clock` is monotonic, in seconds."""

    def __init__(self, sessions: Sessions, clock: Callable[[], float] = monotonic):
        self._sessions = sessions
        self._rate = Rate(PER_SECOND, BURST, clock)
        self._writing: set[asyncio.Task[None]] = set()

    async def record(self, error: PostriderError, call: RpcCall, request: object) -> None:
        """Record the refusal of a call, if it belongs in the log. A lost entry raises no error."""
        caller = call.caller
        action = call.method.rpartition("/")[2]
        if caller is None or not _is_recorded(error, action):
            return
        if self._rate.spend(f"{caller.subject} {caller.merchant_id}"):
            return
        entry = _entry(call, caller, action, error, request)
        writing = asyncio.create_task(self._write(entry), name="audit-refusal")
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)
        # The write continues if the caller cancels the call, and if the database is slow.
        await asyncio.wait({writing}, timeout=WRITE_SECONDS)

    async def _write(self, entry: AuditEntry) -> None:
        fields = {
            name: getattr(entry, name) for name in ("actor", "action", "resource", "request_id")
        }
        try:
            async with self._sessions.begin() as session:
                session.add(entry)
        # The caller must get the refusal in any case.
        except Exception as fault:
            log.error("audit_refusal_lost", error=repr(fault), **fields)


def _is_recorded(error: PostriderError, action: str) -> bool:
    if isinstance(error, Unavailable | ConfigurationError):
        # Not an answer to the request.
        return False
    return isinstance(error, PermissionDenied) or action in CHANGES


def _entry(
    call: RpcCall, caller: Principal, action: str, error: PostriderError, request: object
) -> AuditEntry:
    source = origin(call)
    return AuditEntry(
        id=new_id(),
        actor=caller.subject,
        merchant_id=caller.merchant_id,
        action=action,
        resource=_resource(request) or _resource(call.message),
        result=error.reason,
        changed_fields=[],
        request_id=call.request_id,
        caller_address=source.address,
        user_agent=source.user_agent,
    )


def _resource(request: object) -> str:
    for path in _RESOURCES:
        found = request
        for name in path:
            found = getattr(found, name, None)
        if found and isinstance(found, str):
            return printable(found)
    return ""
