"""Signing secrets: rotation, unreadable ones, and log lines without any."""

import dataclasses
from pathlib import Path
from time import time
from typing import Any

import pytest
import svix.webhooks
from google.protobuf.duration_pb2 import Duration
from pydantic import SecretStr
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from core.encryption import load_keyring, new_key
from core.ids import parse_id
from core.settings import EncryptionSettings
from core.signing import standard_secret
from delivery.webhooks import erase_expired_secrets
from postrider.v1 import delivery_pb2
from postrider.v1 import webhook_config_service_pb2 as pb
from postrider.v1.webhook_config_pb2 import SIGNATURE_SCHEME_ED25519
from postrider_client import WebhookRefused, verify_webhook
from tests.support.event_log import EventLog
from tests.support.platform import ENCRYPTION_KEYS, Platform
from tests.support.receiver import Received, Receiver
from tests.support.signatures import is_genuine


async def rotate(
    platform: Platform, webhook_id: str, seconds: float, **fields: Any
) -> pb.RotateSecretResponse:
    overlap = Duration()
    overlap.FromNanoseconds(round(seconds * 1e9))
    return await platform.webhooks.RotateSecret(
        pb.RotateSecretRequest(id=webhook_id, overlap=overlap, **fields),
        metadata=platform.merchant(),
    )


def verifies(secret: str, received: Received) -> bool:
    """Return whether both signature headers are valid. Asserts that they agree."""
    genuine = is_genuine(
        secret,
        received.message_id,
        received.body,
        received.headers["X-Webhook-Signature"],
        now=time(),
    )
    try:
        Webhook(standard_secret(secret)).verify(received.body, received.headers)
    except WebhookVerificationError:
        assert not genuine
        return False
    assert genuine
    return True


async def test_both_secrets_sign_until_overlap_ends(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    # The retry is due after the overlap.
    receiver.script.append(500)
    async with platform.engine(retry_schedule_seconds=(3.0,)):
        rotated = await rotate(platform, created.webhook_config.id, 2.5)
        await platform.publish()
        first, second = await receiver.wait_for(2)

    old, new = created.secret, rotated.secret
    assert [verifies(old, first), verifies(new, first)] == [True, True]
    assert [verifies(old, second), verifies(new, second)] == [False, True]
    assert first.headers["webhook-signature"].count("v1,") == 2
    assert first.headers["X-Webhook-Signature"].count("v1=") == 2
    newest = first.headers["X-Webhook-Signature"].split(",")[1]
    header = f"t={first.headers['webhook-timestamp']},{newest}"
    assert is_genuine(new, first.message_id, first.body, header, now=time())
    assert second.headers["webhook-signature"].count("v1,") == 1

    await erase_expired_secrets(pool)
    assert await pool.fetchval("SELECT previous_secret_ciphertext FROM webhook_configs") is None


async def test_rotation_without_overlap_drops_old_secret(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url)
    async with platform.engine():
        await platform.publish()
        await receiver.wait_for(1)
        rotated = await rotate(platform, created.webhook_config.id, 0)
        await platform.publish()
        first, second = await receiver.wait_for(2)
    assert verifies(created.secret, first)
    assert [verifies(created.secret, second), verifies(rotated.secret, second)] == [False, True]


async def test_only_the_newest_two_secrets_sign(platform: Platform, receiver: Receiver) -> None:
    created = await platform.register(receiver.url)
    rotations = [await rotate(platform, created.webhook_config.id, 3600) for _ in range(2)]
    async with platform.engine():
        await platform.publish()
        [received] = await receiver.wait_for(1)
    secrets = [created.secret, *(rotation.secret for rotation in rotations)]
    assert [verifies(secret, received) for secret in secrets] == [False, True, True]


async def test_rotation_to_ed25519_signs_with_both_during_overlap(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url)
    receiver.script.append(500)
    async with platform.engine(retry_schedule_seconds=(3.0,)):
        rotated = await rotate(
            platform, created.webhook_config.id, 2, signature_scheme=SIGNATURE_SCHEME_ED25519
        )
        await platform.publish()
        first, second = await receiver.wait_for(2)
    key = rotated.webhook_config.public_key
    for received in (first, second):
        assert verify_webhook(key, received.headers, received.body).id == first.message_id
    assert verify_webhook(created.secret, first.headers, first.body)
    assert [verifies(created.secret, received) for received in (first, second)] == [True, False]
    with pytest.raises(WebhookRefused):
        verify_webhook(created.secret, second.headers, second.body)


async def test_header_prefix_works_with_svix_library(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url, header_prefix="svix")
    library = svix.webhooks.Webhook(created.standard_webhooks_secret)
    async with platform.engine():
        await platform.publish()
        await receiver.wait_for(1)
    assert [request.is_ping for request in receiver.requests] == [True, False]
    for request in receiver.requests:
        headers = {k: v for k, v in request.headers.items() if k.startswith("svix-")}
        library.verify(request.body, headers)
        assert verifies(created.secret, request)


async def test_attempt_log_line_has_no_payload_and_no_secret(
    platform: Platform, receiver: Receiver, log: EventLog
) -> None:
    created = await platform.register(receiver.url)
    receiver.script.append(500)
    async with platform.engine(retry_schedule_seconds=(0.02,)):
        published = await platform.publish('{"card": "canary-4711"}')
        await receiver.wait_for(2)
    first, second = log.named("attempt")
    for number, entry, status, outcome, state in (
        (1, first, 500, "http_error", "ready"),
        (2, second, 200, "succeeded", "delivered"),
    ):
        assert entry["webhook_id"] == created.webhook_config.id
        assert entry["event_id"] == published.event.id
        assert entry["event_type"] == "payment.succeeded"
        assert entry["attempt"] == number
        assert (entry["status"], entry["outcome"], entry["state"]) == (status, outcome, state)
        assert 0 < entry["duration_ms"] < 20_000
    logged = repr(log.entries)
    for secret in ("canary-4711", created.secret, created.standard_webhooks_secret, "v1,"):
        assert secret not in logged


@pytest.mark.parametrize("ciphertext", [bytes(92), b""], ids=["altered", "emptied"])
async def test_unreadable_secret_is_internal_error(
    platform: Platform, receiver: Receiver, pool: Any, log: EventLog, ciphertext: bytes
) -> None:
    created = await platform.register(receiver.url)
    await platform.register(receiver.url, "m_2")
    await pool.execute(
        "UPDATE webhook_configs SET secret_ciphertext = $2 WHERE id = $1",
        parse_id("wh", created.webhook_config.id),
        ciphertext,
    )
    async with platform.engine(max_retries=0, max_fault_retries=1, max_consecutive_failures=1):
        await platform.publish()
        await platform.publish(merchant_id="m_2")
        await log.wait_for("attempt", 3)
    assert len(receiver.webhooks) == 1
    [delivery] = await platform.list_deliveries()
    assert delivery.state == delivery_pb2.DELIVERY_STATE_FAILED
    assert [a.outcome for a in delivery.attempts] == [delivery_pb2.OUTCOME_INTERNAL_ERROR] * 2
    assert log.named("secret_unreadable")
    config = await platform.config(created.webhook_config.id)
    assert (config.active, config.consecutive_failures) == (True, 0)


async def test_unreadable_secret_is_read_after_key_reload(
    platform: Platform, receiver: Receiver, pool: Any, log: EventLog, tmp_path: Path
) -> None:
    file = tmp_path / "encryption-keys"
    file.write_text(ENCRYPTION_KEYS)
    platform.settings = dataclasses.replace(
        platform.settings, encryption=EncryptionSettings(encryption_keys_file=file)
    )
    created = await platform.register(receiver.url)
    webhook_id = parse_id("wh", created.webhook_config.id)
    assert webhook_id is not None
    key = new_key()
    keyring = load_keyring(EncryptionSettings(encryption_keys=SecretStr(key)))
    # Internal errors use up none of the retries, so that one is left for this failure.
    receiver.script.append(500)
    async with platform.engine(max_retries=1, retry_schedule_seconds=(0.02,)):
        # A server with the new key encrypted the secret before this engine's file changed.
        await pool.execute(
            "UPDATE webhook_configs SET secret_key_id = $2, secret_ciphertext = $3 WHERE id = $1",
            *(webhook_id, *keyring.encrypt(created.secret, webhook_id)),
        )
        await platform.publish()
        await log.wait_for("secret_unreadable")
        file.write_text(f"{ENCRYPTION_KEYS}\n{key}\n")
        await receiver.wait_for(2)
    assert log.named("secret_file_loaded")
    [delivery] = await platform.list_deliveries()
    assert delivery.state == delivery_pb2.DELIVERY_STATE_DELIVERED
    *internal_errors, failed, delivered = [attempt.outcome for attempt in delivery.attempts]
    assert set(internal_errors) == {delivery_pb2.OUTCOME_INTERNAL_ERROR}
    assert failed == delivery_pb2.OUTCOME_HTTP_ERROR
    assert delivered == delivery_pb2.OUTCOME_SUCCEEDED
