"""Runs a database, a server and an engine on one machine, with development settings.

Settings of the environment are used. Missing keys are created and kept in the data directory.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from cli.dev.postgres import default_data_dir, embedded_postgres
from cli.dev.signing_key import DevelopmentKey, ensure_development_key, mint_token
from cli.ops.migrate import migrate
from cli.process.app import ServerProcessSettings
from cli.process.delivery import EngineProcessSettings, deliver
from cli.process.server import serve
from cli.settings import LocalSettings, is_set, load
from core.encryption import new_key
from core.errors import ConfigurationError
from core.settings import (
    DatabaseSettings,
    EgressSettings,
    EncryptionSettings,
    LogSettings,
    RetentionSettings,
    TraceSettings,
)
from delivery.settings import DeliverySettings
from server.settings import AuthSettings, ServerSettings

DEVELOPMENT_ISSUER = "postrider-development"
#: Ports of receivers on this machine, such as those of `postrider listen` and `canary`.
DEVELOPMENT_PORTS = (8000, 8999)

type Announce = Callable[[str], None]


@dataclass(frozen=True)
class LocalPlatform:
    """A running server and engine, and the key that signs tokens for them."""

    port: int
    key: DevelopmentKey
    auth: AuthSettings
    #: Server and engine. A task that ends while the platform runs has failed.
    processes: tuple[asyncio.Task[None], ...]

    def token(self, *scopes: str, merchant_id: str | None = None, hours: float = 24) -> str:
        return mint_token(
            self.key.private_key_file,
            issuer=self.auth.jwt_issuer,
            audience=self.auth.jwt_audience,
            subject="developer",
            scopes=scopes,
            merchant_id=merchant_id,
            lifetime=timedelta(hours=hours),
        )


@contextmanager
def local_database(
    directory: Path, pg_bin: Path | None, announce: Announce
) -> Iterator[DatabaseSettings]:
    """Yield WEBHOOK_DATABASE_URL if it is set, else an embedded PostgreSQL. Migrates either."""
    if is_set("database_url"):
        settings = load(DatabaseSettings)
        migrate(settings, announce=announce)
        yield settings
        return
    data_dir = default_data_dir(directory)
    with embedded_postgres(data_dir, bin_dir=pg_bin, announce=announce) as server:
        settings = load(DatabaseSettings, database_url=SecretStr(server.url()))
        migrate(settings, announce=announce)
        yield settings


@asynccontextmanager
async def running_platform(
    database: DatabaseSettings,
    directory: Path,
    *,
    listen_address: str,
    receiver_port: int,
    ca_file: Path,
    operator_listeners: bool = True,
    retention: RetentionSettings | None = None,
) -> AsyncIterator[LocalPlatform]:
    """Run server and engine. Without `retention` no data is removed."""
    key = ensure_development_key(directory / "keys")
    encryption = load(EncryptionSettings, encryption_keys=_encryption_keys(directory))
    egress = _egress_to(receiver_port, ca_file)
    auth = load(
        AuthSettings, jwt_issuer=DEVELOPMENT_ISSUER, jwt_public_key_file=key.public_key_file
    )
    server = load(ServerSettings, reflection=True).model_copy(
        update={"listen_address": listen_address}
        | ({} if operator_listeners else {"admin_address": None, "server_metrics_address": None})
    )
    delivery = load(DeliverySettings).model_copy(
        update={} if operator_listeners else {"delivery_metrics_address": None}
    )
    logs, traces = load(LogSettings), load(TraceSettings)
    stop_serving, stop_delivering = asyncio.Event(), asyncio.Event()
    listening: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    serving = asyncio.create_task(
        serve(
            ServerProcessSettings(database, encryption, egress, server, auth, logs, traces),
            stop_serving,
            listening.set_result,
        )
    )
    delivering = asyncio.create_task(
        deliver(
            EngineProcessSettings(database, encryption, egress, delivery, logs, traces, retention),
            stop_delivering,
        )
    )
    processes = (serving, delivering)
    try:
        beginnings: set[asyncio.Future[Any]] = {*processes, listening}
        await asyncio.wait(beginnings, return_when=asyncio.FIRST_COMPLETED)
        for process in processes:
            if process.done():
                process.result()
        yield LocalPlatform(await listening, key, auth, processes)
    finally:
        # The server first, so that the engine can deliver the last accepted events.
        stop_serving.set()
        await asyncio.wait({serving})
        stop_delivering.set()
        await asyncio.wait({delivering})
    for process in processes:
        process.result()


def _egress_to(receiver_port: int, ca_file: Path) -> EgressSettings:
    """Return the egress settings, plus receivers on this machine and the local authority."""
    settings = load(EgressSettings)
    if settings.ca_file is not None:
        both = ca_file.with_name("trusted-cas.pem")
        both.write_bytes(ca_file.read_bytes() + settings.ca_file.read_bytes())
        ca_file = both
    return settings.model_copy(
        update={
            "allowed_cidrs": (*settings.allowed_cidrs, ip_network("127.0.0.0/8")),
            "allowed_ports": (
                *settings.allowed_ports,
                (receiver_port, receiver_port),
                DEVELOPMENT_PORTS,
            ),
            "ca_file": ca_file,
        }
    )


def _encryption_keys(directory: Path) -> SecretStr | None:
    """Return the encryption key of this data directory. Creates it once."""
    if is_set("encryption_keys"):
        return None
    path = directory / "encryption-key"
    try:
        path.touch(mode=0o600, exist_ok=True)
        if not path.read_text().strip():
            path.write_text(new_key() + "\n")
        return SecretStr(path.read_text().strip())
    except OSError as error:
        raise ConfigurationError(
            f"cannot write an encryption key to {path} ({error.strerror}): set WEBHOOK_DATA_DIR "
            "to a writable directory"
        ) from error


def make_directory(settings: LocalSettings) -> Path:
    """Create the data directory if needed, and return it. Raises ConfigurationError."""
    directory = settings.data_dir.resolve()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"cannot create the data directory {directory} ({error.strerror}): set WEBHOOK_DATA_DIR"
        ) from error
    return directory
