"""Starts the server, and ends it together with the process that started it."""

import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGKILL, SIGQUIT
from urllib.parse import quote

from cli.dev.postgres.binaries import ELSEWHERE, copy_binaries, find_binaries
from cli.dev.postgres.directory import (
    LEAVE_SECONDS,
    clear_stale_locks,
    lock_directory,
    reachable,
    server_account,
)
from core.errors import ConfigurationError

PORT = 5432  # Part of the socket's name. The server does not listen on TCP.
START_SECONDS = 300.0  # Crash recovery may replay gigabytes.

# Runs between fork and exec. A separate program, because `preexec_fn` may deadlock beside threads.
# Privileges are dropped first, because the kernel clears the death signal when the uid changes. The
# parent is checked, because it may have died before prctl().
_GUARD = """
import ctypes, os, sys
owner, uid, gid = map(int, sys.argv[1:4])
libc = ctypes.CDLL(None)
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(gid); os.setuid(uid)
if sys.platform == "linux":
    libc.prctl(1, 2)  # PR_SET_PDEATHSIG, SIGINT: a fast shutdown
if os.getppid() == owner:
    os.execv(sys.argv[4], sys.argv[4:])
"""


@dataclass(frozen=True)
class EmbeddedPostgres:
    """A server that accepts connections until `stop()` or the end of its context."""

    data_dir: Path
    socket_dir: Path
    port: int
    process: subprocess.Popen[bytes]

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@/{quote(database)}?host={self.socket_dir}&port={self.port}"

    def stop(self) -> None:
        """End all sessions, then the server. Committed rows survive even a kill."""
        for request, seconds in ((SIGINT, LEAVE_SECONDS), (SIGQUIT, 10.0), (SIGKILL, None)):
            if self.process.poll() is None:
                self.process.send_signal(request)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)


@contextmanager
def embedded_postgres(
    data_dir: Path,
    *,
    bin_dir: Path | None = None,
    options: Mapping[str, str] = {},
    announce: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Iterator[EmbeddedPostgres]:
    """Run PostgreSQL on `data_dir` while the context is open. Creates the directory if needed."""
    if threading.current_thread() is not threading.main_thread():
        # The death signal is sent when the starting *thread* ends.
        raise RuntimeError("the embedded PostgreSQL must be started from the main thread")
    with ExitStack() as cleanup:
        try:
            launch = _Launch.prepare(data_dir.resolve(), find_binaries(bin_dir), cleanup)
            server = launch.start(options, announce)
        except OSError as error:
            message = f"cannot use {data_dir} for a database ({error}); use another directory"
            raise ConfigurationError(f"{message}, {ELSEWHERE}") from error
        yield server


@dataclass(frozen=True)
class _Launch:
    """The directory, account, programs and lock of one start."""

    data_dir: Path
    bin_dir: Path
    uid: int
    gid: int
    lock: int
    log: Path
    cleanup: ExitStack

    @classmethod
    def prepare(cls, data_dir: Path, bin_dir: Path, cleanup: ExitStack) -> "_Launch":
        uid, gid = server_account(data_dir)
        if os.geteuid() == 0 and not reachable(data_dir, uid, gid):
            raise ConfigurationError(
                f"PostgreSQL refuses root, and uid {uid} cannot enter {data_dir}: use a "
                f"directory that it can enter, run as an ordinary user, {ELSEWHERE}"
            )
        for parent in reversed(data_dir.parents):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                if os.geteuid() == 0:
                    parent.chmod(0o755)  # Independent of the umask, for the server's account.
        lock = lock_directory(data_dir, cleanup)
        log = data_dir.with_name(f"{data_dir.name}.log")
        if log.exists():
            log.replace(f"{log}.1")
        if os.geteuid() == 0 and not reachable(bin_dir / "postgres", uid, gid):
            bin_dir = copy_binaries(bin_dir, data_dir.with_name(f"{data_dir.name}.binaries"))
        return cls(data_dir, bin_dir, uid, gid, lock, log, cleanup)

    def start(
        self, options: Mapping[str, str], announce: Callable[[str], None]
    ) -> EmbeddedPostgres:
        if not (self.data_dir / "PG_VERSION").exists():
            announce(
                f"creating a PostgreSQL data directory in {self.data_dir} (once, about a second)"
            )
            self._create()
        clear_stale_locks(self.data_dir)
        sockets = self._socket_dir()
        where = ["-D", str(self.data_dir), "-k", str(sockets), "-h", "", "-p", str(PORT)]
        process = self._spawn("postgres", *where, *(f"-c{k}={v}" for k, v in options.items()))
        server = EmbeddedPostgres(self.data_dir, sockets, PORT, process)
        self.cleanup.callback(server.stop)
        self._await_ready(process, announce)
        return server

    def _create(self) -> None:
        """Create the directory under another name, and rename it when it is complete."""
        try:
            pwd.getpwuid(self.uid)
        except KeyError:
            message = f"PostgreSQL's initdb needs a name for uid {self.uid}: add it to /etc/passwd"
            raise ConfigurationError(
                f"{message}, run as a user listed there, {ELSEWHERE}"
            ) from None
        if self.data_dir.exists():
            self.data_dir.rmdir()  # Raises OSError if it contains files.
        new = self.data_dir.with_name(f"{self.data_dir.name}.new")
        if new.exists():
            shutil.rmtree(new)
        new.mkdir(0o700)
        os.chown(new, self.uid, self.gid)
        auth = ["--username=postgres", "--auth-local=trust", "--auth-host=reject"]
        text = ["--encoding=UTF8", "--no-locale", "--no-instructions"]
        if self._spawn("initdb", "-D", str(new), *auth, *text).wait() != 0:
            raise self._failure("initdb failed")
        new.rename(self.data_dir)

    def _spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        guard = [sys.executable, "-I", "-S", "-c", _GUARD]
        account = [str(os.getpid()), str(self.uid), str(self.gid)]
        # The server needs neither PG* settings of this shell nor our secrets.
        hidden = ("PG", "LC_", "WEBHOOK_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        try:
            return subprocess.Popen(  # noqa: S603
                [*guard, *account, str(self.bin_dir / program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env=env | {"LC_ALL": "C", "TZ": "UTC"},
                pass_fds=(self.lock,),
                start_new_session=True,  # Ctrl-C is for its clients, which end before it.
            )
        finally:
            os.close(output)

    def _socket_dir(self) -> Path:
        # The path of a socket has at most 107 bytes, and drivers split `host` at commas and colons.
        if re.fullmatch(r"[\w./-]{1,90}", str(self.data_dir), re.ASCII):
            return self.data_dir
        short = self.cleanup.enter_context(tempfile.TemporaryDirectory(prefix="postrider-"))
        os.chown(short, self.uid, self.gid)
        return Path(short)

    def _await_ready(
        self, process: subprocess.Popen[bytes], announce: Callable[[str], None]
    ) -> None:
        started = announced = time.monotonic()
        ready = "ready   "  # PostgreSQL pads it.
        while process.poll() is None and time.monotonic() < started + START_SECONDS:
            with suppress(FileNotFoundError):
                status = (self.data_dir / "postmaster.pid").read_text().split("\n")
                if status[0] == str(process.pid) and status[7:8] == [ready]:
                    return
            if time.monotonic() > announced + 5:
                announced = time.monotonic()
                announce(
                    f"PostgreSQL is starting, {announced - started:.0f} s so far; see {self.log}"
                )
            time.sleep(0.01)
        raise self._failure("PostgreSQL did not start")

    def _failure(self, problem: str) -> ConfigurationError:
        last_lines = self.log.read_text(errors="replace").splitlines()[-8:]
        advice = f"fix that, move {self.data_dir} away to start with an empty database, {ELSEWHERE}"
        return ConfigurationError(
            "\n  ".join([f"{problem}; {self.log} ends:", *last_lines, advice])
        )
