"""How far a process holds itself back for the sake of others, by how late its event loop is (pure).

Where cores are short, what is done for one who floods us is in the way of all others, at every
step on their path. The loop notices it first: its timers come late, whether it had to wait for a
core or was at something long itself. So what may wait is done less and less while timers are late,
and a little more with every one that is not: as much as fits, on whatever machine, beside whomever.
"""

#: A timer that comes later than this is late: on machines with cores to spare hardly one does.
_LATE_SECONDS = 0.0025
#: What a late timer leaves, and what a timely one adds. Both in proportion: they are in balance
#: when about one timer in fifty is late, however much is being done then.
_LATE, _TIMELY = 0.8, 1.004


class Restraint:
    """A level from `least`, where it begins and nobody is stopped altogether, up to `most`."""

    def __init__(self, least: float, most: float):
        self._least = least
        self._most = most
        self.level = least

    def felt(self, late_seconds: float) -> None:
        """A timer of the loop came so late."""
        if late_seconds > _LATE_SECONDS:
            self.level = max(self.level * _LATE, self._least)
        else:
            self.level = min(self.level * _TIMELY, self._most)
