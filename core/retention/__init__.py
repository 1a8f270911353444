"""Retention: creates daily partitions ahead, drops old ones, and removes other old rows one by one.

Start at run. The rule: a delivery is kept for a number of days after its end, together with its
attempts. The number depends on its final state. An event is kept while one of its deliveries is
open or kept, and at least as long as a delivered delivery. So an open delivery can be sent and a
visible delivery can be sent again. docs/operate/retention.md has the details.
"""

from core.retention.partitions import days_ahead
from core.retention.run import RunReport, last_completed, preview, run_once
from core.retention.schedule import run_hourly

__all__ = ["RunReport", "days_ahead", "last_completed", "preview", "run_hourly", "run_once"]
