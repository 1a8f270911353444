"""The shell blocks of "Rotate keys" in docs/operate/runbook.md, while deliveries go on."""

import asyncio
import itertools
import os
import re
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from time import time
from typing import Any

import asyncpg
import pytest
from cryptography import x509

from cli.dev.signing_key import ensure_development_key
from core.encryption import new_key
from postrider.v1 import webhook_config_service_pb2 as pb
from tests.support.certificates import Authority
from tests.support.paths import ROOT
from tests.support.platform import ENCRYPTION_KEYS
from tests.support.processes import POSTRIDER, Process
from tests.support.receiver import Received
from tests.support.restartable_postgres import RestartablePostgres
from tests.support.signatures import is_genuine
from tests.support.system_under_load import BRISK, Conclude, SystemUnderLoad

PAGE = (ROOT / "docs/operate/runbook.md").read_text()
SECTION = re.split(r"^## ", PAGE.partition("\n## Rotate keys\n")[2], flags=re.MULTILINE)[0]
LINES = re.findall(r"^```sh\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
(
    ADD_KEY,
    PUT_IT_FIRST,
    ROTATE,
    STATUS,
    TAKE_THE_OTHERS_OUT,
    ADD_ISSUER,
    TAKE_THE_OLD_ISSUER_OUT,
    CHANGE_CERTIFICATE,
    SHOW_CERTIFICATE,
    CHANGE_PASSWORD,
    TELL_PASSWORD,
    ROTATE_SECRET,
) = LINES

ROLE = "by_password"
NEEDED = ("psql", "openssl", "grpcurl")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, NEEDED)), reason=f"needs {', '.join(NEEDED)}"),
]


class Operator:
    """Types the lines, with these files and the settings of the processes in the environment."""

    def __init__(self, directory: Path, **files: str | bytes) -> None:
        self._directory = directory
        self.environment: dict[str, str] = {}
        directory.mkdir()
        for name, content in files.items():
            self.write(name, content)

    def path(self, name: str) -> Path:
        return self._directory / name

    def write(self, name: str, content: str | bytes) -> None:
        fresh = self._directory / "fresh"
        fresh.touch(mode=0o640)
        fresh.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(fresh, self.path(name))

    async def types(self, line: str) -> str:
        shell = await asyncio.create_subprocess_exec(
            *("sh", "-euc", line),
            env=self.environment,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await shell.communicate()
        assert shell.returncode == 0, f"{line}\n{output.decode()}"
        return output.decode()


@asynccontextmanager
async def asking_for_a_password(restartable_postgres: RestartablePostgres) -> AsyncIterator[Any]:
    """A role whom the server asks for its password, which is "first"."""
    assert restartable_postgres.server is not None
    rules = restartable_postgres.server.data_dir / "pg_hba.conf"
    rules.write_text(f"local all {ROLE} scram-sha-256\n{rules.read_text()}")
    admin = await asyncpg.connect(restartable_postgres.server.url())
    await admin.execute(f"CREATE ROLE {ROLE} SUPERUSER LOGIN PASSWORD 'first'")
    await admin.execute("SELECT pg_reload_conf()")
    yield admin
    await admin.close()


async def test_all_secrets_rotate_under_load(
    start_system: Callable[..., AbstractAsyncContextManager[SystemUnderLoad]],
    conclude: Conclude,
    database_url: str,
    restartable_postgres: RestartablePostgres,
    tmp_path: Path,
) -> None:
    assert restartable_postgres.server is not None
    issuers = [ensure_development_key(tmp_path / name) for name in ("keys", "next")]
    certificates = [Authority().issue(ips=("127.0.0.1",)) for _ in range(2)]
    operator = Operator(
        tmp_path / "secrets",
        KEYS=ENCRYPTION_KEYS + "\n",
        ISSUER_PEM=issuers[0].public_key_file.read_bytes(),
        NEXT_PEM=issuers[1].public_key_file.read_bytes(),
        TLS_CERTIFICATE=certificates[0].certificate,
        TLS_KEY=certificates[0].private_key,
        NEXT_CERTIFICATE=certificates[1].certificate,
        NEXT_KEY=certificates[1].private_key,
        PASSWORD_FILE="first\n",
        NEXT_PASSWORD='it\'s the "second"\n',
    )
    settings = {
        "database_url": database_url.replace("postgres@", f"{ROLE}@"),
        "database_password_file": operator.path("PASSWORD_FILE"),
        "encryption_keys": None,
        "encryption_keys_file": operator.path("KEYS"),
        "jwt_public_key_file": operator.path("ISSUER_PEM"),
    }
    tls = {
        "tls_certificate_file": operator.path("TLS_CERTIFICATE"),
        "tls_private_key_file": operator.path("TLS_KEY"),
    }
    async with (
        asking_for_a_password(restartable_postgres) as admin,
        start_system(**settings) as system,
    ):
        engines = await system.processes.start(
            "delivery", "--processes=2", **(BRISK | {"lease_seconds": 8} | settings)
        )
        await engines.wait_for("delivering", 2)
        system.engines.append(engines)
        server, tls_address = await system.processes.server(**settings, **tls)
        platform = system.platform
        operator.environment = {
            "PATH": f"{POSTRIDER.parent}:{os.environ['PATH']}",
            **system.processes.environment,
            **{f"WEBHOOK_{name.upper()}": str(value) for name, value in settings.items() if value},
            **{path.name: str(path) for path in operator.path(".").iterdir()},
            "TLS_ADDRESS": tls_address,
            "ADDRESS": platform.address,
            "DATABASE_ADMIN_URL": restartable_postgres.server.url(),
            "DATABASE_ROLE": ROLE,
        }
        del operator.environment["WEBHOOK_ENCRYPTION_KEYS"]
        async with system.load.running() as load:
            await load.arrived_more(100)
            await change_the_encryption_key(system, operator, server, engines)
            await load.arrived_more(100)

            await operator.types(CHANGE_PASSWORD)
            in_flight = await system.leased()
            await admin.execute(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'"  # noqa: S608
            )
            async with load.pressing_on():
                await load.repeated_more(1)
            await operator.types(TELL_PASSWORD)
            await load.arrived_more(100)

            await operator.types(ADD_ISSUER)
            platform.key = issuers[1]
            platform.tokens.clear()
            await load.arrived_more(100)
            await operator.types(TAKE_THE_OLD_ISSUER_OUT)
            platform.tokens.clear()
            await load.arrived_more(100)

            await change_a_signing_secret(system, operator)
            await load.arrived_more(100)
        shown = [await operator.types(SHOW_CERTIFICATE)]
        await operator.types(CHANGE_CERTIFICATE)
        shown.append(await operator.types(SHOW_CERTIFICATE))
        for issued, text in zip(certificates, shown, strict=True):
            serial = x509.load_pem_x509_certificate(issued.certificate).serial_number
            assert f"serial={serial:X}" in text.replace("serial=0", "serial=")
        await conclude(system, "every secret changed", in_flight)
        assert server.lives
        assert engines.named("engine_ended") == []
        for process in (server, engines):
            assert process.named("secret_file_readable_by_all") == []


async def change_the_encryption_key(
    system: SystemUnderLoad, operator: Operator, server: Process, engines: Process
) -> None:
    changes = itertools.count(1)

    async def everybody_has_it() -> None:
        change = next(changes)
        await server.wait_for("secret_file_loaded", change)
        await engines.wait_for("secret_file_loaded", 2 * change)

    await operator.types(ADD_KEY)
    await everybody_has_it()
    await operator.types(PUT_IT_FIRST)
    await everybody_has_it()
    new_id, old_id = server.named("secret_file_loaded")[-1]["holds"]
    await register_and_receive(system, "m_registered_with_the_new_key")
    found = await system.pool.fetchval(
        "SELECT secret_key_id FROM webhook_configs WHERE merchant_id LIKE 'm_registered_%'"
    )
    assert found == new_id
    await operator.types(ROTATE)
    assert f"{old_id}: 0 records (not needed)" in await operator.types(STATUS)
    await operator.types(TAKE_THE_OTHERS_OUT)
    await everybody_has_it()
    left = await system.pool.fetch("SELECT DISTINCT secret_key_id FROM webhook_configs")
    assert [row["secret_key_id"] for row in left] == [new_id]

    good = operator.path("KEYS").read_text()
    operator.write("KEYS", new_key()[:-9])
    await server.wait_for("secret_file_unusable")
    await engines.wait_for("secret_file_unusable", 2)
    await register_and_receive(system, "m_while_the_file_is_broken")
    operator.write("KEYS", good)
    await everybody_has_it()


async def change_a_signing_secret(system: SystemUnderLoad, operator: Operator) -> None:
    """The old secret, which the ledger goes on with, signs beside the new for the overlap."""
    platform, merchant_id = system.platform, "m_1"
    [config] = (
        await platform.webhooks.ListWebhookConfigs(
            pb.ListWebhookConfigsRequest(), metadata=platform.merchant(merchant_id)
        )
    ).webhook_configs
    operator.environment |= {
        "MERCHANT_TOKEN": platform.token("webhooks:manage", merchant_id=merchant_id),
        "WEBHOOK": config.id,
    }
    schema = "-protoset deploy/envoy/postrider.binpb "
    answer = await operator.types(ROTATE_SECRET.replace("-plaintext ", f"-plaintext {schema}"))
    [new] = re.findall(r'"secret": "([0-9a-f]{64})"', answer)
    received = await receive_one(system, merchant_id)
    signature = received.headers["X-Webhook-Signature"]
    for secret in (new, system.secrets[f"/hook/{merchant_id}"]):
        assert is_genuine(secret, received.message_id, received.body, signature, now=time())


async def register_and_receive(system: SystemUnderLoad, merchant_id: str) -> None:
    await system.register(merchant_id)
    await receive_one(system, merchant_id)


async def receive_one(system: SystemUnderLoad, merchant_id: str) -> Received:
    event = (await system.platform.publish(merchant_id=merchant_id)).event
    system.load.acknowledged.append(event.id)
    await system.load.has_arrived(event.id)
    return next(r for r in system.receiver.webhooks if r.message_id == event.id)
