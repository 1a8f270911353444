"""A PostgreSQL of a test module's own, for the tests that take it away."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cli.embedded_postgres import EmbeddedPostgres, embedded_postgres


class OwnPostgres:
    """A PostgreSQL that a test may stop, start and freeze."""

    def __init__(self, data_dir: Path):
        self._data_dir = data_dir
        self._running = ExitStack()
        self.server: EmbeddedPostgres | None = None

    def start(self) -> str:
        self.server = self._running.enter_context(
            embedded_postgres(self._data_dir, announce=lambda _: None)
        )
        return self.server.url()

    def stop(self) -> None:
        self._running.close()

    def crash(self) -> None:
        """An immediate shutdown: nothing is written out, and the next start recovers."""
        assert self.server is not None
        self.server.process.send_signal(signal.SIGQUIT)
        self.server.process.wait()
        self.stop()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Alive for the kernel, and silent: as behind a network that drops packets."""
        assert self.server is not None
        main = self.server.process.pid
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        pids = [main, *map(int, children)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
