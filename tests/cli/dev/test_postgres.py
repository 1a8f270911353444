"""The launcher with real processes: what is killed here is a PostgreSQL, not a model of one."""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from cli.dev.postgres import (
    EmbeddedPostgres,
    default_data_dir,
    embedded_postgres,
    find_binaries,
)
from core.errors import ConfigurationError
from tests.support.paths import ROOT

OWNER = """
import sys
from pathlib import Path
from cli.dev.postgres import embedded_postgres
with embedded_postgres(Path(sys.argv[1]), announce=lambda line: None) as server:
    print(server.process.pid, flush=True)
    sys.stdin.read()
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root must lend its server a uid")


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Like tmp_path, but open to the account that root's PostgreSQL runs as."""
    with tempfile.TemporaryDirectory(prefix="postrider-test-") as made:
        Path(made).chmod(0o755)
        yield Path(made).resolve()


@pytest.fixture(scope="module")
def data_dir(place: Path) -> Path:
    """One directory for most tests: each leaves it such that the next can start."""
    return place / "postgres"


async def sql(server: EmbeddedPostgres, *statements: str) -> object:
    connection = await asyncpg.connect(server.url())
    try:
        return [await connection.fetchval(statement) for statement in statements][-1]
    finally:
        # A server that is about to be killed must not wait for a farewell.
        connection.terminate()


async def commit_one_row(server: EmbeddedPostgres) -> None:
    await sql(server, "drop table if exists kept", "create table kept as select 1 as row")


async def kept_rows(server: EmbeddedPostgres) -> object:
    return await sql(server, "select count(*) from kept")


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@contextlib.contextmanager
def owner_process(data_dir: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another Postrider; it is killed at the end, if not before."""
    argv = [sys.executable, "-c", OWNER, str(data_dir)]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as owner:
        try:
            yield owner
        finally:
            owner.kill()


def server_pid(owner: "subprocess.Popen[str]") -> int:
    assert owner.stdout is not None
    return int(owner.stdout.readline())


@contextlib.contextmanager
def slow_process_with_the_lock_of(data_dir: Path) -> Iterator["subprocess.Popen[bytes]"]:
    with data_dir.with_name(f"{data_dir.name}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        slow = subprocess.Popen(["sleep", "0.2"], pass_fds=[lock.fileno()])
    with slow:
        yield slow


@contextlib.contextmanager
def unrelated_process_of_the_owner_of(data_dir: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """PostgreSQL takes a live process with its uid and a recorded pid for a server."""
    uid = data_dir.stat().st_uid
    with subprocess.Popen(["sleep", "60"], user=uid, cwd="/") as unrelated:
        try:
            yield unrelated
        finally:
            unrelated.kill()


async def test_committed_rows_are_there_after_a_stop_and_a_start(data_dir: Path) -> None:
    told: list[str] = []
    with embedded_postgres(data_dir, announce=told.append) as server:
        await commit_one_row(server)
    assert server.process.returncode == 0
    with embedded_postgres(data_dir, announce=told.append) as server:
        assert await kept_rows(server) == 1
    assert len(told) == 1
    assert str(data_dir) in told[0]


async def test_committed_rows_survive_a_killed_postmaster(data_dir: Path) -> None:
    with embedded_postgres(data_dir) as server:
        await commit_one_row(server)
        server.process.kill()
        server.process.wait()
    with embedded_postgres(data_dir) as server:
        assert await kept_rows(server) == 1


async def test_killed_owner_leaves_no_server(data_dir: Path) -> None:
    with owner_process(data_dir) as owner:
        pid = server_pid(owner)
        assert is_alive(pid)
        owner.kill()
        until(lambda: not is_alive(pid))
    with embedded_postgres(data_dir) as server:
        assert await sql(server, "select 1") == 1


async def test_server_starts_after_owner_and_postmaster_were_killed(data_dir: Path) -> None:
    with embedded_postgres(data_dir) as server:
        await commit_one_row(server)
    with owner_process(data_dir) as owner:
        pid = server_pid(owner)
        owner.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with embedded_postgres(data_dir) as server:
        assert await kept_rows(server) == 1


async def test_server_starts_with_a_reused_pid_in_the_lock_file(data_dir: Path) -> None:
    with embedded_postgres(data_dir) as server:
        await commit_one_row(server)
        pid_files = [data_dir / "postmaster.pid", data_dir / f".s.PGSQL.{server.port}.lock"]
        assert all(file.exists() for file in pid_files)
        server.process.kill()
        server.process.wait()
    with unrelated_process_of_the_owner_of(data_dir) as unrelated:
        for file in pid_files:
            _, rest = file.read_text().split("\n", 1)
            file.write_text(f"{unrelated.pid}\n{rest}")
        with embedded_postgres(data_dir) as server:
            assert await kept_rows(server) == 1
        assert unrelated.poll() is None


async def test_start_waits_for_a_slow_process_of_a_dead_server(data_dir: Path) -> None:
    with embedded_postgres(data_dir) as server:
        await commit_one_row(server)
    with slow_process_with_the_lock_of(data_dir) as slow, embedded_postgres(data_dir) as server:
        assert slow.poll() is not None
        assert await kept_rows(server) == 1


def test_a_second_start_is_refused_and_names_the_first(data_dir: Path) -> None:
    with owner_process(data_dir) as owner:
        pid = server_pid(owner)
        refusal = rf"another Postrider is running here \(pid {owner.pid},.*WEBHOOK_DATABASE_URL"
        with pytest.raises(ConfigurationError, match=refusal), embedded_postgres(data_dir):
            pytest.fail("two servers on one directory")
        assert is_alive(pid)
    until(lambda: not is_alive(pid))


async def test_second_start_leaves_the_first_server_alone(data_dir: Path) -> None:
    with embedded_postgres(data_dir) as server:
        refusal = rf"pid {os.getpid()},"
        with pytest.raises(ConfigurationError, match=refusal), embedded_postgres(data_dir):
            pytest.fail("two servers on one directory")
        assert await sql(server, "select 1") == 1


async def test_a_server_started_by_hand_is_left_alone(data_dir: Path) -> None:
    with embedded_postgres(data_dir) as server:
        # Whoever works here without our lock is known by the directory alone.
        (data_dir.parent / "postgres.lock").rename(data_dir.parent / "held.lock")
        refusal = r"a server is running in .* \(pid \d+\)"
        with pytest.raises(ConfigurationError, match=refusal), embedded_postgres(data_dir):
            pytest.fail("two servers on one directory")
        assert await sql(server, "select 1") == 1


async def test_an_initdb_killed_in_the_middle_is_made_again(place: Path) -> None:
    data_dir = place / "half made"
    with owner_process(data_dir) as owner:
        until((place / "half made.new" / "PG_VERSION").exists)
        owner.kill()
    assert not data_dir.exists()
    with embedded_postgres(data_dir) as server:
        assert await sql(server, "select 1") == 1
    assert not (place / "half made.new").exists()


def test_directory_with_other_files_is_refused_unchanged(place: Path) -> None:
    data_dir = place / "photos"
    data_dir.mkdir()
    (data_dir / "cat.jpg").touch()
    refusal = "cannot use .*photos for a database"
    with pytest.raises(ConfigurationError, match=refusal), embedded_postgres(data_dir):
        pytest.fail("took over a foreign directory")
    assert [file.name for file in data_dir.iterdir()] == ["cat.jpg"]


async def test_deep_path_gets_a_short_socket(place: Path) -> None:
    data_dir = place / ("deep, with a comma " * 5) / "and deeper" / "postgres"
    with embedded_postgres(data_dir) as server:
        assert server.socket_dir.stat().st_mode & 0o777 == 0o700
        assert await sql(server, "show data_directory") == str(data_dir)
        engine = create_async_engine(server.url().replace("postgresql:", "postgresql+asyncpg:"))
        async with engine.connect() as connection:
            assert await connection.scalar(text("show data_directory")) == str(data_dir)
        await engine.dispose()
    assert not server.socket_dir.exists()


async def test_only_the_owner_can_reach_the_server(data_dir: Path) -> None:
    with embedded_postgres(data_dir) as server:
        assert server.socket_dir.stat().st_mode & 0o077 == 0
        assert await sql(server, "show listen_addresses") == ""


def test_a_failed_start_shows_the_end_of_the_log(data_dir: Path) -> None:
    wrong = {"shared_buffers": "plenty"}
    refusal = r'did not start; .*postgres\.log ends:[^$]*"shared_buffers": "plenty"'
    with (
        pytest.raises(ConfigurationError, match=refusal),
        embedded_postgres(data_dir, options=wrong),
    ):
        pytest.fail("started")


def test_a_thread_that_may_end_first_cannot_start_it(data_dir: Path) -> None:
    refused: list[str] = []

    def start() -> None:
        try:
            with embedded_postgres(data_dir):
                pass
        except RuntimeError as error:
            refused.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert refused == ["the embedded PostgreSQL must be started from the main thread"]


def test_broken_configured_binaries_are_not_replaced(place: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"in {place}.*WEBHOOK_PG_BIN"):
        find_binaries(place)


@as_root
async def test_root_in_a_closed_checkout_runs_a_copy_outside(place: Path) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    assert not default_data_dir(closed / "checkout").is_relative_to(place)
    with (
        pytest.raises(ConfigurationError, match="cannot enter"),
        embedded_postgres(closed / "postgres"),
    ):
        pytest.fail("entered a closed directory")
    bin_dir = find_binaries()
    package = bin_dir.parent.parent
    hidden = closed / package.name / bin_dir.parent.name
    shutil.copytree(bin_dir.parent, hidden)
    shutil.copytree(package.with_name(f"{package.name}.libs"), closed / f"{package.name}.libs")
    with embedded_postgres(place / "open" / "postgres", bin_dir=hidden / "bin") as server:
        assert await sql(server, "select 1") == 1
    assert closed.stat().st_mode & 0o777 == 0o700
