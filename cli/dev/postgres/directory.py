"""The data directory: its place, its owner, and the lock that admits one server."""

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
    """Return `postgres` in the directory, or for root a place that the server can enter."""
    directory = directory.resolve()
    inside = directory / "postgres"
    if os.geteuid() != 0 or reachable(inside, *server_account(inside)):
        return inside
    key = hashlib.sha256(os.fsencode(directory)).hexdigest()[:8]
    return Path("/var/lib/postrider") / f"{directory.parent.name}-{key}" / "postgres"


def server_account(data_dir: Path) -> tuple[int, int]:
    """Return the server's uid and gid: this user's, or an ordinary one, because it refuses root."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    if data_dir.exists() and (owner := data_dir.stat()).st_uid != 0:
        return owner.st_uid, owner.st_gid
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)[2:4]
    raise ConfigurationError(f"PostgreSQL refuses root: run as an ordinary user, {ELSEWHERE}")


def reachable(path: Path, uid: int, gid: int) -> bool:
    """Return whether the account may enter, or execute, the existing parts of the path."""
    for status in (part.stat() for part in (path, *path.parents) if part.exists()):
        shift = 6 if status.st_uid == uid else 3 if status.st_gid == gid else 0
        if not status.st_mode >> shift & 1:
            return False
    return True


def lock_directory(data_dir: Path, cleanup: ExitStack) -> int:
    """Lock the directory. Waits for the server of an owner that was killed."""
    path = data_dir.with_name(f"{data_dir.name}.lock")
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    cleanup.callback(os.close, lock)
    deadline = time.monotonic() + LEAVE_SECONDS
    while True:
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        owner = os.pread(lock, 20, 0).decode()
        # A zombie has no `exe`, so only a running owner is an error at once.
        if os.path.exists(f"/proc/{owner}/exe") or time.monotonic() > deadline:
            message = f"another Postrider is running here (pid {owner}, data in {data_dir})"
            raise ConfigurationError(f"{message}; stop it, {ELSEWHERE}")
        time.sleep(0.02)
    cleanup.callback(os.ftruncate, lock, 0)
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    return lock


def clear_stale_locks(data_dir: Path) -> None:
    """Remove PostgreSQL's lock files, unless a server that was started by hand is running.

    Their pid proves nothing, because it may be a zombie's or reused by now. PostgreSQL's processes
    keep their data directory as `cwd`, and a zombie has none.
    """
    pid_file = data_dir / "postmaster.pid"
    recorded = pid_file.read_text().partition("\n")[0] if pid_file.exists() else ""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):
            try:
                is_running = (process / "cwd").readlink() == data_dir
            except (
                PermissionError
            ):  # In some containers even root may not read it. Then check the name.
                named = re.match(r"\d+ \(postgres\) [^ZX]", (process / "stat").read_text())
                is_running = process.name == recorded and named is not None
            if is_running:
                message = f"a server is running in {data_dir} (pid {process.name})"
                raise ConfigurationError(f"{message}; stop it, {ELSEWHERE}")
    for stale in (pid_file, *data_dir.glob(".s.PGSQL.*")):
        stale.unlink(missing_ok=True)
