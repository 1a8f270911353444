"""What one server counts of itself, for whoever asks."""

from collections.abc import Mapping

from core.histogram import SHORT, Histogram

#: A batch holds up to 1,000 events, and calls that come together are committed together.
_EVENTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

#: Stands for every method that there is not: callers name what they like.
UNKNOWN = "unknown"


class MethodMeasures:
    """Of one method; `duration` is None for streams, which last as long as somebody listens."""

    __slots__ = ("codes", "duration")

    def __init__(self, *, is_stream: bool):
        self.codes = {"OK": 0}
        self.duration = None if is_stream else Histogram(SHORT)


class ServerMetrics:
    """Counts since the process began; `methods` are the paths there are, and which are streams."""

    def __init__(self, methods: Mapping[str, bool]):
        self._methods = {
            path: MethodMeasures(is_stream=is_stream) for path, is_stream in methods.items()
        }
        self._unknown = MethodMeasures(is_stream=True)
        #: As Service/Method.
        self.methods = {
            path.rpartition(".")[2]: metrics for path, metrics in self._methods.items()
        } | {UNKNOWN: self._unknown}
        self.events_accepted = 0
        self.events_duplicate = 0
        self.events_rejected = 0
        self.commit = Histogram(SHORT)
        self.commit_events = Histogram(_EVENTS)
        self.watchers = 0
        self.database_up = True

    def knows(self, path: str) -> bool:
        """Whether there is such a method."""
        return path in self._methods

    def rpc_ended(self, path: str, code: str, seconds: float) -> None:
        """A call of /package.Service/Method has its status, by us or by gRPC."""
        method = self._methods.get(path, self._unknown)
        method.codes[code] = method.codes.get(code, 0) + 1
        if method.duration is not None:
            method.duration.observe(seconds)
