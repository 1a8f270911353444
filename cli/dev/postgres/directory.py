"""The data directory: where it is, whose it is, and that one server at most works on it."""

import fcntl
import hashlib
import os
import pwd
import re
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from cli.dev.postgres.binaries import ELSEWHERE
from core.errors import ConfigurationError

LEAVE_SECONDS = 30.0


def default_data_dir(directory: Path) -> Path:
    """`postgres` in the directory, or for root a place that the server's account can get to."""
    directory = directory.resolve()
    inside = directory / "postgres"
    if os.geteuid() != 0 or reachable(inside, *server_account(inside)):
        return inside
    key = hashlib.sha256(os.fsencode(directory)).hexdigest()[:8]
    return Path("/var/lib/postrider") / f"{directory.parent.name}-{key}" / "postgres"


def server_account(data_dir: Path) -> tuple[int, int]:
    """The server's uid and gid: ours, or for root, whom PostgreSQL refuses, an ordinary one."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    if data_dir.exists() and (owner := data_dir.stat()).st_uid != 0:
        return owner.st_uid, owner.st_gid
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)[2:4]
    raise ConfigurationError(f"PostgreSQL refuses root: run as an ordinary user, {ELSEWHERE}")


def reachable(path: Path, uid: int, gid: int) -> bool:
    """Whether the account may pass through, or execute, what exists of the path."""
    for status in (part.stat() for part in (path, *path.parents) if part.exists()):
        shift = 6 if status.st_uid == uid else 3 if status.st_gid == gid else 0
        if not status.st_mode >> shift & 1:
            return False
    return True


def lock_directory(data_dir: Path, cleanup: ExitStack) -> int:
    """Takes the directory for us; the server of an owner that was killed gets time to leave."""
    path = data_dir.with_name(f"{data_dir.name}.lock")
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    cleanup.callback(os.close, lock)
    deadline = time.monotonic() + LEAVE_SECONDS
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        owner = os.pread(lock, 20, 0).decode()
        # A zombie has no `exe` any more, so only an owner at work is refused at once.
        if os.path.exists(f"/proc/{owner}/exe") or time.monotonic() > deadline:
            message = f"another Postrider is running here (pid {owner}, data in {data_dir})"
            raise ConfigurationError(f"{message}; stop it, {ELSEWHERE}")
        time.sleep(0.02)
    cleanup.callback(os.ftruncate, lock, 0)
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def clear_stale_locks(data_dir: Path) -> None:
    """Removes PostgreSQL's lock files, unless a server that somebody started by hand is at work.

    The pid in them proves nothing: it may be a zombie's, or belong to another process by now.
    PostgreSQL's processes stay in their data directory, and a zombie has no `cwd`.
    """
    pid_file = data_dir / "postmaster.pid"
    recorded = pid_file.read_text().partition("\n")[0] if pid_file.exists() else ""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            try:
                at_work = (process / "cwd").readlink() == data_dir
            except PermissionError:  # Root in a container may not look; then the name must do.
                named = re.match(r"\d+ \(postgres\) [^ZX]", (process / "stat").read_text())
                at_work = process.name == recorded and named is not None
            if at_work:
                message = f"a server is at work in {data_dir} (pid {process.name})"
                raise ConfigurationError(f"{message}; stop it, {ELSEWHERE}")
    for stale in (pid_file, *data_dir.glob(".s.PGSQL.*")):
        stale.unlink(missing_ok=True)
