"""Audit entries of operator commands.

Commands need no token: access to the database URL is their authorization.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from core.ids import new_id

#: Takes the arguments of `operator_entry`. Run it in the transaction of the change.
INSERT_OPERATOR_ENTRY = """
INSERT INTO audit_entries (id, actor, action, resource, result, changed_fields, request_id, comment,
    caller_address, user_agent)
VALUES ($1, $2, $3, $4, 'OK', $5, '', $6, $7, $8)
"""


@dataclass(frozen=True, slots=True)
class Operator:
    """Who runs a command: an `actor` such as `cli:ann`, the host name, and `agent`, our version."""

    actor: str
    host: str
    agent: str


def operator_entry(
    operator: Operator,
    *,
    action: str,
    resource: str,
    changed_fields: Iterable[str] = (),
    comment: str = "",
) -> tuple[Any, ...]:
    """Return the arguments of INSERT_OPERATOR_ENTRY."""
    fields = sorted(changed_fields)
    return (
        *(new_id(), operator.actor, action, resource),
        *(fields, comment, operator.host, operator.agent),
    )
