"""Who runs a command of ours that changes something, and the audit entry of it.

There is no token: who can run a command with the database's URL is known to the machine alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from core.ids import new_id

#: In the transaction of the change, with the arguments of `command_entry`.
RECORD_COMMAND = """
INSERT INTO audit_entries (id, actor, action, resource, result, changed_fields, request_id, comment,
    caller_address, user_agent)
VALUES ($1, $2, $3, $4, 'OK', $5, '', $6, $7, $8)
"""


@dataclass(frozen=True, slots=True)
class Operator:
    """A person at a machine: `actor` such as cli:ann, the machine's name, and our version."""

    actor: str
    host: str
    agent: str


def command_entry(
    operator: Operator,
    *,
    action: str,
    resource: str,
    changed_fields: Iterable[str] = (),
    comment: str = "",
) -> tuple[Any, ...]:
    """The arguments of RECORD_COMMAND."""
    return (
        new_id(),
        operator.actor,
        action,
        resource,
        sorted(changed_fields),
        comment,
        operator.host,
        operator.agent,
    )
