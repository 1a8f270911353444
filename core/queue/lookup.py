"""Conditions on the queue that are met by one index, whatever the planner thinks of the table.

Where a vacuum found the queue empty, as at any quiet moment, the planner takes it for empty however
many pages it has by then, and what it has planned it keeps. Then every way to read all of an index
looks cheap: with 200,000 deliveries due, a claim of 200 took 3.3 s.
"""

from core.lookup import equal


def by_id(delivery_id: str) -> str:
    """That `q`, a row of delivery_queue, has this id: a look-up in the primary key."""
    return equal("q.id", delivery_id)


def of_webhook(webhook_id: str) -> str:
    """That `q` is of this config, by an index that begins with it."""
    return equal("q.webhook_id", webhook_id)


def is_in(state: str) -> str:
    """That a row found by its id is in this state, which is no reason to read the index of it."""
    return f"state || '' = '{state}'"
