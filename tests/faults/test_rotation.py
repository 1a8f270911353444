"""Every secret is changed in its file, as docs/runbook.md says, while deliveries go on."""

import itertools
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from time import time
from typing import Any

import asyncpg
import pytest

from cli.development_key import ensure_development_key
from core.keyring import new_key
from core.signing import verify
from postrider.v1 import webhook_config_service_pb2 as pb
from tests.fakes.receiver import Received
from tests.own_postgres import OwnPostgres
from tests.platform import ENCRYPTION_KEYS
from tests.processes import Process
from tests.scene import BRISK, Conclude, Scene

pytestmark = pytest.mark.slow
ROLE = "by_password"


class Mount:
    """Files as Kubernetes mounts secrets: links through `..data`, which leads to a version."""

    def __init__(self, directory: Path, **files: str) -> None:
        self._directory = directory
        self._files: dict[str, str] = {}
        self._version = 0
        directory.mkdir()
        self.put(**files)

    def path(self, name: str) -> Path:
        return self._directory / name

    def put(self, **files: str) -> None:
        self._files |= files
        self._version += 1
        version = self._directory / f"..{self._version}"
        version.mkdir()
        for name, text in self._files.items():
            (version / name).touch(mode=0o640)
            (version / name).write_text(text)
            if not self.path(name).is_symlink():
                self.path(name).symlink_to(Path("..data", name))
        (self._directory / "..new").symlink_to(version.name)
        os.replace(self._directory / "..new", self._directory / "..data")


@asynccontextmanager
async def asking_for_a_password(own_postgres: OwnPostgres) -> AsyncIterator[Any]:
    """A role whom the server asks for its password, which is "first"."""
    assert own_postgres.server is not None
    rules = own_postgres.server.data_dir / "pg_hba.conf"
    rules.write_text(f"local all {ROLE} scram-sha-256\n{rules.read_text()}")
    admin = await asyncpg.connect(own_postgres.server.url())
    await admin.execute(f"CREATE ROLE {ROLE} SUPERUSER LOGIN PASSWORD 'first'")
    await admin.execute("SELECT pg_reload_conf()")
    yield admin
    await admin.close()


async def test_every_secret_is_changed_by_files_alone_while_deliveries_go_on(
    start_scene: Callable[..., AbstractAsyncContextManager[Scene]],
    conclude: Conclude,
    database_url: str,
    own_postgres: OwnPostgres,
    tmp_path: Path,
) -> None:
    issuers = [ensure_development_key(tmp_path / name) for name in ("keys", "next")]
    pems = [issuer.public_key_file.read_text() for issuer in issuers]
    mount = Mount(tmp_path / "mount", keys=ENCRYPTION_KEYS, password="first\n", issuer=pems[0])
    settings = {
        "database_url": database_url.replace("postgres@", f"{ROLE}@"),
        "database_password_file": mount.path("password"),
        "encryption_keys": None,
        "encryption_keys_file": mount.path("keys"),
        "jwt_public_key_file": mount.path("issuer"),
    }
    async with asking_for_a_password(own_postgres) as admin, start_scene(**settings) as scene:
        server = scene.processes._started[0]
        engines = await scene.processes.start(
            "delivery", "--processes=2", **(BRISK | {"lease_seconds": 8} | settings)
        )
        await engines.wait_for("delivering", 2)
        scene.engines.append(engines)
        async with scene.load.running() as load:
            await load.arrived_more(100)
            await change_the_encryption_key(scene, mount, server, engines, settings)
            await load.arrived_more(100)

            await admin.execute(f"ALTER ROLE {ROLE} PASSWORD 'second'")
            mount.put(password="second\n")
            in_flight = await scene.leased()
            await admin.execute(
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}'"  # noqa: S608
            )
            await load.arrived_more(100)

            mount.put(issuer="".join(pems))
            scene.platform.key = issuers[1]
            scene.platform.tokens.clear()
            await load.arrived_more(100)
            old = {**scene.platform.tokens}
            mount.put(issuer=pems[1])
            await load.arrived_more(100)
            assert old == {name: scene.platform.tokens[name] for name in old}

            await change_a_signing_secret(scene)
            await load.arrived_more(100)
        await conclude(scene, "every secret changed", in_flight)
        for process in (server, engines):
            assert process.lives
            assert len(process.named("secret_file_readable_by_all")) == 0
            assert process.named("database_away") == []


async def change_the_encryption_key(
    scene: Scene, mount: Mount, server: Process, engines: Process, settings: dict[str, Any]
) -> None:
    old, new = ENCRYPTION_KEYS, new_key()
    new_id = new.partition(":")[0]

    changes = itertools.count(1)

    async def everybody_has(*pairs: str) -> None:
        mount.put(keys="\n".join(pairs) + "\n")
        change = next(changes)
        await server.wait_for("secret_file_loaded", change)
        await engines.wait_for("secret_file_loaded", 2 * change)

    await everybody_has(old, new)
    await everybody_has(new, old)
    await register_and_receive(scene, "m_registered_with_the_new_key")
    found = await scene.pool.fetchval(
        "SELECT secret_key_id FROM webhook_configs WHERE merchant_id LIKE 'm_registered_%'"
    )
    assert found == new_id
    rotating = await scene.processes.start("keys", "rotate", "--to", new_id, **settings)
    assert await rotating.exit_code() == 0, rotating.lines
    await everybody_has(new)
    left = await scene.pool.fetch("SELECT DISTINCT secret_key_id FROM webhook_configs")
    assert [row["secret_key_id"] for row in left] == [new_id]

    mount.put(keys=new[:-9])
    await server.wait_for("secret_file_unusable")
    await engines.wait_for("secret_file_unusable", 2)
    await register_and_receive(scene, "m_while_the_file_is_broken")


async def register_and_receive(scene: Scene, merchant_id: str) -> None:
    await scene.register(merchant_id)
    await receive_one(scene, merchant_id)


async def receive_one(scene: Scene, merchant_id: str) -> Received:
    event = (await scene.platform.publish(merchant_id=merchant_id)).event
    scene.load.acknowledged.append(event.id)
    await scene.load.all_arrived()
    return next(r for r in scene.receiver.webhooks if r.message_id == event.id)


async def change_a_signing_secret(scene: Scene) -> None:
    """The old secret, which the ledger goes on with, signs beside the new for the overlap."""
    platform, merchant_id = scene.platform, "m_1"
    [config] = (
        await platform.webhooks.ListWebhookConfigs(
            pb.ListWebhookConfigsRequest(), metadata=platform.merchant(merchant_id)
        )
    ).webhook_configs
    rotated = await platform.webhooks.RotateSecret(
        pb.RotateSecretRequest(id=config.id), metadata=platform.merchant(merchant_id)
    )
    received = await receive_one(scene, merchant_id)
    signature = received.headers["X-Webhook-Signature"]
    for secret in (rotated.secret, scene.secrets[f"/hook/{merchant_id}"]):
        assert verify(secret, received.message_id, received.body, signature, now=time())
