"""The measured parts: a real PostgreSQL with its defaults, and separate processes."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import asyncpg
import trustme
from pydantic import SecretStr

from cli.dev.postgres import EmbeddedPostgres, embedded_postgres
from cli.dev.signing_key import DevelopmentKey, ensure_development_key, mint_token
from cli.ops.migrate import migrate
from core.encryption import KeyRing
from core.settings import DatabaseSettings

ENCRYPTION_KEY = bytes(range(32))
ISSUER = "benchmark"
_LAST_WORDS_MAX = 4000
# Terminated by the benchmark, or ended without an error.
_AS_TOLD = {0, -signal.SIGTERM, -signal.SIGKILL}
_TICKS = os.sysconf("SC_CLK_TCK")
_WAL_SEGMENTS = 96


@dataclass
class Stack:
    """The shared parts of every benchmark, and the environment of the processes."""

    directory: Path
    postgres: EmbeddedPostgres
    key: DevelopmentKey
    ca_file: Path
    authority: trustme.CA
    environment: dict[str, str] = field(default_factory=dict)
    keyring: KeyRing = field(default_factory=lambda: KeyRing({"k1": ENCRYPTION_KEY}))

    @property
    def database_url(self) -> str:
        return self.postgres.url()

    def token(self, *scopes: str, merchant_id: str | None = None) -> str:
        return mint_token(
            self.key.private_key_file,
            issuer=ISSUER,
            audience="postrider",
            subject="benchmark",
            scopes=scopes,
            merchant_id=merchant_id,
            lifetime=timedelta(hours=1),
        )

    @contextmanager
    def process(self, *arguments: str, **settings: str) -> Iterator["subprocess.Popen[bytes]"]:
        """Run a command of Postrider, or a module of this package.

        Its log goes to a file, which is shown if it fails.
        """
        if arguments[0].startswith("benchmarks."):
            command: Sequence[str] = (sys.executable, "-m", *arguments)
        else:
            command = (str(Path(sys.executable).with_name("postrider")), *arguments)
        log = self.directory / f"{arguments[0]}.log"
        with log.open("ab") as stderr:
            process = subprocess.Popen(
                command, env=self.environment | settings, stdout=subprocess.PIPE, stderr=stderr
            )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
            if process.stdout:
                process.stdout.close()
            if process.returncode not in _AS_TOLD:
                print(log.read_text()[-_LAST_WORDS_MAX:], file=sys.stderr)

    async def output(self, process: "subprocess.Popen[bytes]") -> bytes:
        """Return the next line of a process. Raises RuntimeError if it ended."""
        if process.stdout is None or not (line := await asyncio.to_thread(process.stdout.readline)):
            raise RuntimeError(f"{process.args!r} ended early; what it said is above")
        return line


@contextmanager
def running_stack() -> Iterator[Stack]:
    """Run a migrated PostgreSQL with its durable defaults, in a temporary directory.

    It has WAL segments to reuse, as after some time of use.
    """
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="postrider-bench-"))
        )
        directory.chmod(0o711)
        postgres = stack.enter_context(
            embedded_postgres(
                directory / "data",
                # pg_stat_statements is optional, because some builds lack it.
                options={
                    "shared_buffers": "256MB",
                    "max_wal_size": "4GB",
                    "min_wal_size": f"{_WAL_SEGMENTS * 16}MB",
                },
                announce=lambda _: None,
            )
        )
        migrate(DatabaseSettings(database_url=SecretStr(postgres.url())))
        asyncio.run(_make_wal_segments(postgres.url()))
        authority = trustme.CA()
        ca_file = directory / "ca.pem"
        authority.cert_pem.write_to_path(str(ca_file))
        key = ensure_development_key(directory / "keys")
        environment = {
            "PATH": os.environ["PATH"],
            "WEBHOOK_DATABASE_URL": postgres.url(),
            "WEBHOOK_ENCRYPTION_KEYS": "k1:AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
            "WEBHOOK_ALLOWED_CIDRS": "127.0.0.0/8",
            "WEBHOOK_ALLOWED_PORTS": "1-65535",
            "WEBHOOK_CA_FILE": str(ca_file),
            "WEBHOOK_SERVER_METRICS_ADDRESS": "off",
            "WEBHOOK_DELIVERY_METRICS_ADDRESS": "off",
            "WEBHOOK_JWT_ISSUER": ISSUER,
            "WEBHOOK_JWT_PUBLIC_KEY_FILE": str(key.public_key_file),
        }
        yield Stack(directory, postgres, key, ca_file, authority, environment)


async def _make_wal_segments(url: str) -> None:
    """Create WAL segments to reuse, because a new one is filled with zeros while commits wait."""
    connection = await asyncpg.connect(url)
    try:
        for _ in range(_WAL_SEGMENTS):
            await connection.execute(
                "SELECT pg_logical_emit_message(false, '', ''), pg_switch_wal()"
            )
        await connection.execute("CHECKPOINT")
    finally:
        await connection.close()


def free_port() -> int:
    """Return a free port of loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def receiver_certificate(stack: Stack) -> Path:
    """Return the certificate file of a receiver on loopback."""
    certificate = stack.directory / "receiver.pem"
    certificate.write_bytes(
        stack.authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.bytes()
    )
    return certificate


def cpu_seconds(pid: int) -> float:
    """Return user and system time of one process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def cpu_seconds_of_postgres(postmaster: int) -> float:
    """Return it for the postmaster and all its backends, ended ones included."""
    own = Path(f"/proc/{postmaster}/stat").read_text().rpartition(")")[2].split()
    total = sum(int(own[i]) for i in range(11, 15)) / _TICKS
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == postmaster:
            total += (int(fields[11]) + int(fields[12])) / _TICKS
    return total


def children_of(pid: int) -> list[int]:
    """Return the child processes."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rss_megabytes(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


async def wait_until_listening(port: int, timeout_seconds: float = 20) -> None:
    """Return when a process accepts connections on this port of loopback."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.02)
        else:
            writer.close()
            return


async def insert_webhooks(stack: Stack, url: str, merchants: Sequence[str]) -> None:
    """Insert one active webhook config per merchant. `{}` in `url` is its number."""
    connection = await asyncpg.connect(stack.database_url)
    try:
        for number, merchant_id in enumerate(merchants):
            webhook_id = await connection.fetchval("SELECT new_uuid7()")
            key_id, ciphertext = stack.keyring.encrypt("00" * 32, webhook_id)
            await connection.execute(
                "INSERT INTO webhook_configs (id, merchant_id, url, events, secret_ciphertext,"
                " secret_key_id) VALUES ($1, $2, $3, $4, $5, $6)",
                webhook_id,
                merchant_id,
                url.format(number),
                ["payment.succeeded"],
                ciphertext,
                key_id,
            )
    finally:
        await connection.close()
