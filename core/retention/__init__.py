"""Retention: days made ahead and dropped behind, and what outlives them removed row by row.

The rule: a delivery is kept so many days after its end, by how it ended, and its attempts with it;
an event is kept for as long as any delivery of it is open or kept, and at least as long as a
delivered one. So what is open can always be sent, and what can be seen can be delivered again.
docs/retention.md tells it in full.
"""

from core.retention.partitions import days_ahead
from core.retention.schedule import Done, last_completed, look, retain, run

__all__ = ["Done", "days_ahead", "last_completed", "look", "retain", "run"]
