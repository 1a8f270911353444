"""Attempts that were refused to known callers, in the audit log beside the changes.

Recorded are refused changes, whatever the reason, and whatever else a caller had no permission for.
An entry is written before the refusal is told, in a transaction of its own. A caller nobody knows
writes nothing, and one that is refused again and again soon writes little: neither can fill the
table. Every refusal is in the log line of its call.
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

#: RPCs that change what a caller can see; what they refuse is an attempt at a change.
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
#: Of one caller: so many at once, and then so many a second.
BURST = 60
PER_SECOND = 0.1
#: How long a refusal is held back for its entry.
WRITE_SECONDS = 2.0

#: Where a request names what it is about; the first that is there counts.
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
    """Writes the entries; `clock` is in seconds and only runs forward."""

    def __init__(self, sessions: Sessions, clock: Callable[[], float] = monotonic):
        self._sessions = sessions
        self._rate = Rate(PER_SECOND, BURST, clock)
        self._writing: set[asyncio.Task[None]] = set()

    async def record(self, error: PostriderError, call: RpcCall, request: object) -> None:
        """Record the refusal of a call, if it is one to record; never raises for a lost entry."""
        caller = call.caller
        action = call.method.rpartition("/")[2]
        if caller is None or not _is_on_record(error, action):
            return
        if self._rate.spend(f"{caller.subject} {caller.merchant_id}"):
            return
        entry = _entry(call, caller, action, error, request)
        writing = asyncio.create_task(self._write(entry), name="audit-refusal")
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)
        # Not a plain await: a caller that hangs up now must not take the entry with it, and one
        # that stays is not to wait for a database that is slow. The write goes on in either case.
        await asyncio.wait({writing}, timeout=WRITE_SECONDS)

    async def _write(self, entry: AuditEntry) -> None:
        fields = {
            name: getattr(entry, name) for name in ("actor", "action", "resource", "request_id")
        }
        try:
            async with self._sessions.begin() as session:
                session.add(entry)
        # Whatever keeps it from being written, the caller is still to hear of the refusal.
        except Exception as fault:
            log.error("audit_refusal_lost", error=repr(fault), **fields)


def _is_on_record(error: PostriderError, action: str) -> bool:
    if isinstance(error, Unavailable | ConfigurationError):
        # Ours, and not an answer to what was asked.
        return False
    return isinstance(error, PermissionDenied) or action in CHANGES


def _entry(
    call: RpcCall, caller: Principal, action: str, error: PostriderError, request: object
) -> AuditEntry:
    came_from = origin(call)
    return AuditEntry(
        id=new_id(),
        actor=caller.subject,
        merchant_id=caller.merchant_id,
        action=action,
        resource=_resource(request) or _resource(call.message),
        result=error.reason,
        changed_fields=[],
        request_id=call.request_id,
        caller_address=came_from.address,
        user_agent=came_from.user_agent,
    )


def _resource(request: object) -> str:
    for path in _RESOURCES:
        found = request
        for name in path:
            found = getattr(found, name, None)
        if found and isinstance(found, str):
            return printable(found)
    return ""
