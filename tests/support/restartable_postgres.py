"""A PostgreSQL server for tests that stop it."""

import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from cli.dev.postgres import EmbeddedPostgres, embedded_postgres


class RestartablePostgres:
    """A PostgreSQL that a test may stop, start, kill and freeze."""

    def __init__(self, data_dir: Path, options: Mapping[str, str] = {}):
        self.data_dir = data_dir
        self._options = options
        self._running = ExitStack()
        self.server: EmbeddedPostgres | None = None

    def start(self) -> str:
        self.server = self._running.enter_context(
            embedded_postgres(self.data_dir, options=self._options, announce=lambda _: None)
        )
        return self.server.url()

    def stop(self) -> None:
        self._running.close()

    def crash(self) -> None:
        """Shut down immediately, so that the next start recovers from the WAL."""
        assert self.server is not None
        self.server.process.send_signal(signal.SIGQUIT)
        self.server.process.wait()
        self.stop()

    def kill(self) -> None:
        """Kill all its processes, like a power failure."""
        assert self.server is not None
        for pid in self._stopped():
            os.kill(pid, signal.SIGKILL)
        self.server.process.wait()
        self.stop()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all its processes, like a network that drops packets."""
        pids = self._stopped()
        try:
            yield
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    def _stopped(self) -> list[int]:
        """Stop all its processes, the postmaster first. Returns their ids."""
        assert self.server is not None
        main = self.server.process.pid
        os.kill(main, signal.SIGSTOP)
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        for pid in map(int, children):
            os.kill(pid, signal.SIGSTOP)
        return [main, *map(int, children)]
