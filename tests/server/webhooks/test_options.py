"""Options of a webhook config, rotation of its secret, and its signature scheme."""

from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode

from core.encryption import KeyRing
from core.signing import public_key
from postrider.v1 import webhook_config_service_pb2 as pb
from postrider.v1.webhook_config_pb2 import SIGNATURE_SCHEME_ED25519 as ED25519
from postrider.v1.webhook_config_pb2 import SIGNATURE_SCHEME_HMAC_SHA256 as HMAC
from postrider.v1.webhook_config_pb2 import WebhookConfig
from tests.support.platform import Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused

OPTIONS: dict[str, Any] = {
    "headers": {"Authorization": "Bearer swordfish", "X-Tenant": "a b"},
    "timeout": Duration(seconds=2, nanos=500_000_000),
    "rate_limit": 12.5,
    "max_in_flight": 7,
    "ordered": True,
    "header_prefix": "acme",
}
INVALID: dict[str, tuple[Any, dict[str, str]]] = {
    "headers": ({"Host": "x"}, {"webhook_config.headers['Host']": "HEADER_DENIED"}),
    "timeout": (Duration(seconds=31), {"webhook_config.timeout": "TIMEOUT_INVALID"}),
    "rate_limit": (-1.0, {"webhook_config.rate_limit": "RATE_LIMIT_INVALID"}),
    "max_in_flight": (1001, {"webhook_config.max_in_flight": "MAX_IN_FLIGHT_INVALID"}),
    "header_prefix": ("Acme", {"webhook_config.header_prefix": "HEADER_PREFIX_INVALID"}),
    "events": (["payment*"], {"webhook_config.events[0]": "EVENT_TYPE_UNKNOWN"}),
}


async def rotate(
    platform: Platform,
    webhook_id: str,
    *,
    merchant_id: str = "m_1",
    seconds: int | None = None,
    scheme: Any = None,
) -> pb.RotateSecretResponse:
    request = pb.RotateSecretRequest(id=webhook_id, signature_scheme=scheme)
    if seconds is not None:
        request.overlap.CopyFrom(Duration(seconds=seconds))
    return await platform.webhooks.RotateSecret(request, metadata=platform.merchant(merchant_id))


def options_of(config: WebhookConfig) -> dict[str, Any]:
    return {
        "headers": dict(config.headers),
        "timeout": config.timeout,
        "rate_limit": config.rate_limit,
        "max_in_flight": config.max_in_flight,
        "ordered": config.ordered,
        "header_prefix": config.header_prefix,
    }


async def test_options_set_at_creation_are_in_every_read(
    platform: Platform, receiver: Receiver
) -> None:
    created = (await platform.register(receiver.url, **OPTIONS)).webhook_config
    listed = await platform.as_merchant().ListWebhookConfigs()
    for config in (created, await platform.config(created.id), *listed.webhook_configs):
        assert options_of(config) == OPTIONS


async def test_options_are_off_by_default(platform: Platform, receiver: Receiver) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    assert not config.headers
    assert not config.HasField("timeout")
    assert (config.rate_limit, config.max_in_flight) == (0, 0)
    assert (config.ordered, config.header_prefix) == (False, "")
    assert not config.HasField("previous_secret_expire_time")


async def test_each_option_changes_alone_and_is_audited(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    before = await platform.config(webhook_id)
    expected = options_of(before)
    for name, value in OPTIONS.items():
        changed = await platform.update(webhook_id, **{name: value})
        expected[name] = value
        assert options_of(changed) == expected
        assert changed.etag != before.etag
        fields = "SELECT changed_fields FROM audit_entries ORDER BY id DESC LIMIT 1"
        assert await pool.fetchval(fields) == [name]
        before = changed


async def test_masked_option_without_value_is_reset(platform: Platform, receiver: Receiver) -> None:
    webhook_id = (await platform.register(receiver.url, **OPTIONS)).webhook_config.id
    config = await platform.update(webhook_id, OPTIONS)
    assert not config.headers
    assert not config.HasField("timeout")
    assert (config.rate_limit, config.max_in_flight) == (0, 0)
    assert (config.ordered, config.header_prefix) == (False, "")


@pytest.mark.parametrize("name", INVALID)
async def test_invalid_option_is_refused_by_create_and_update(
    platform: Platform, receiver: Receiver, name: str
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    value, violations = INVALID[name]
    fields: dict[str, Any] = {name: value}
    async with refused(StatusCode.INVALID_ARGUMENT, next(iter(violations.values()))) as error:
        await platform.register(receiver.url, **fields)
    assert error.violations == violations
    async with refused(StatusCode.INVALID_ARGUMENT, next(iter(violations.values()))) as error:
        await platform.update(webhook_id, **{name: value})
    assert error.violations == violations


async def test_invalid_option_outside_the_mask_is_ignored(
    platform: Platform, receiver: Receiver
) -> None:
    webhook_id = (await platform.register(receiver.url, **OPTIONS)).webhook_config.id
    wrong = {name: value for name, (value, _) in INVALID.items()}
    config = await platform.update(webhook_id, ["description"], description="x", **wrong)
    assert options_of(config) == OPTIONS


async def test_prefix_and_headers_of_a_config_cannot_collide(
    platform: Platform, receiver: Receiver
) -> None:
    with_header = (await platform.register(receiver.url, headers={"Acme-Id": "x"})).webhook_config
    with_prefix = (await platform.register(receiver.url, header_prefix="acme")).webhook_config
    for change in (
        platform.update(with_header.id, header_prefix="acme"),
        platform.update(with_prefix.id, headers={"ACME-Signature": "x"}),
        platform.register(receiver.url, headers={"acme-timestamp": "1"}, header_prefix="acme"),
    ):
        async with refused(StatusCode.INVALID_ARGUMENT, "HEADER_PREFIX_INVALID") as error:
            await change
        assert list(error.violations) == ["webhook_config.header_prefix"]
    both = await platform.update(with_header.id, headers={"X-A": "x"}, header_prefix="acme")
    assert (dict(both.headers), both.header_prefix) == ({"X-A": "x"}, "acme")


async def test_event_prefix_matches_types_registered_later(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    config = (await platform.register(receiver.url, events=("novel.*",))).webhook_config
    assert list(config.events) == ["novel.*"]
    await pool.execute("INSERT INTO event_types (name) VALUES ('novel.thing'), ('novelty.thing')")

    assert (await platform.publish(type="novel.thing")).event.delivery_count == 1
    assert (await platform.publish(type="novelty.thing")).event.delivery_count == 0


async def test_rotation_returns_new_secret_and_keeps_old_for_a_day(
    platform: Platform, receiver: Receiver, pool: Any, keyring: KeyRing
) -> None:
    created = await platform.register(receiver.url)
    before = created.webhook_config

    rotated = await rotate(platform, before.id)

    assert len(rotated.secret) == 64
    assert rotated.secret != created.secret
    assert rotated.standard_webhooks_secret.startswith("whsec_")
    config = rotated.webhook_config
    assert config.etag != before.etag
    assert config == await platform.config(before.id)
    assert rotated.secret not in str(config)
    until = config.previous_secret_expire_time.ToDatetime(UTC) - datetime.now(UTC)
    assert 86_390 < until.total_seconds() <= 86_400
    row = await pool.fetchrow("SELECT * FROM webhook_configs")
    previous = (row["previous_secret_key_id"], row["previous_secret_ciphertext"], row["id"])
    assert keyring.decrypt(*previous) == created.secret
    present = (row["secret_key_id"], row["secret_ciphertext"], row["id"])
    assert keyring.decrypt(*present) == rotated.secret


async def test_rotation_is_audited_without_the_secret(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    rotated = await rotate(platform, webhook_id)
    entry = await pool.fetchrow("SELECT * FROM audit_entries ORDER BY id DESC LIMIT 1")
    assert (entry["action"], entry["resource"]) == ("RotateSecret", webhook_id)
    assert (entry["merchant_id"], entry["changed_fields"]) == ("m_1", ["secret"])
    assert rotated.secret not in str(dict(entry))


async def test_rotation_during_overlap_keeps_only_the_last_secret(
    platform: Platform, receiver: Receiver, pool: Any, keyring: KeyRing
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    first = await rotate(platform, webhook_id, seconds=3600)
    second = await rotate(platform, webhook_id, seconds=60)
    row = await pool.fetchrow("SELECT * FROM webhook_configs")
    previous = (row["previous_secret_key_id"], row["previous_secret_ciphertext"], row["id"])
    assert keyring.decrypt(*previous) == first.secret
    until = second.webhook_config.previous_secret_expire_time.ToDatetime(UTC) - datetime.now(UTC)
    assert until.total_seconds() <= 60


async def test_rotation_without_overlap_removes_older_secrets(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    await rotate(platform, webhook_id, seconds=3600)
    rotated = await rotate(platform, webhook_id, seconds=0)
    assert not rotated.webhook_config.HasField("previous_secret_expire_time")
    row = await pool.fetchrow("SELECT * FROM webhook_configs")
    assert row["previous_secret_ciphertext"] is None


async def test_expired_overlap_is_hidden(platform: Platform, receiver: Receiver, pool: Any) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    await rotate(platform, webhook_id)
    await pool.execute("UPDATE webhook_configs SET previous_secret_expires_at = now()")
    assert not (await platform.config(webhook_id)).HasField("previous_secret_expire_time")


async def test_delete_removes_both_secrets(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    await rotate(platform, webhook_id)
    await platform.delete(webhook_id)
    row = await pool.fetchrow("SELECT * FROM webhook_configs")
    assert (row["secret_ciphertext"], row["previous_secret_ciphertext"]) == (b"", None)


@pytest.mark.parametrize("seconds", [-1, 604_801])
async def test_rotation_refuses_overlap_above_a_week(
    platform: Platform, receiver: Receiver, seconds: int
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    async with refused(StatusCode.INVALID_ARGUMENT, "OVERLAP_INVALID") as error:
        await rotate(platform, webhook_id, seconds=seconds)
    assert error.violations == {"overlap": "OVERLAP_INVALID"}


async def test_rotation_requires_own_config_and_scope(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    before = await pool.fetchval("SELECT secret_ciphertext FROM webhook_configs")
    async with refused(StatusCode.NOT_FOUND, "WEBHOOK_CONFIG_NOT_FOUND"):
        await rotate(platform, webhook_id, merchant_id="m_2")
    with pytest.raises(Exception, match="PERMISSION_DENIED"):
        await platform.webhooks.RotateSecret(
            pb.RotateSecretRequest(id=webhook_id),
            metadata=bearer(platform.token("events:publish", merchant_id="m_1")),
        )
    assert await pool.fetchval("SELECT secret_ciphertext FROM webhook_configs") == before


async def test_only_the_public_key_of_a_key_pair_is_returned(
    platform: Platform, receiver: Receiver, pool: Any, keyring: KeyRing
) -> None:
    created = await platform.register(receiver.url, signature_scheme=ED25519)
    config = created.webhook_config
    assert (created.secret, created.standard_webhooks_secret) == ("", "")
    assert config.signature_scheme == ED25519
    row = await pool.fetchrow("SELECT * FROM webhook_configs")
    pair = keyring.decrypt(row["secret_key_id"], row["secret_ciphertext"], row["id"])
    assert pair.startswith("whsk_")
    assert config.public_key == public_key(pair)
    listed = await platform.as_merchant().ListWebhookConfigs()
    assert [await platform.config(config.id), *listed.webhook_configs] == [config, config]
    # The new key pair signed the first ping.
    [ping] = receiver.requests
    assert ping.headers["webhook-signature"].startswith("v1a,")


async def test_default_scheme_is_hmac_without_public_key(
    platform: Platform, receiver: Receiver
) -> None:
    for scheme in (None, HMAC):
        created = await platform.register(receiver.url, signature_scheme=scheme)
        assert len(created.secret) == 64
        assert created.webhook_config.signature_scheme == HMAC
        assert created.webhook_config.public_key == ""


async def test_rotation_can_change_the_scheme_and_shows_public_keys(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    changed = await rotate(platform, webhook_id, scheme=ED25519)
    assert changed.secret == ""
    first = changed.webhook_config
    assert (first.signature_scheme, first.previous_public_key) == (ED25519, "")
    fields = "SELECT changed_fields FROM audit_entries ORDER BY id DESC LIMIT 1"
    assert await pool.fetchval(fields) == ["secret", "signature_scheme"]

    second = (await rotate(platform, webhook_id)).webhook_config
    assert second.signature_scheme == ED25519
    assert second.previous_public_key == first.public_key != second.public_key
    assert await pool.fetchval(fields) == ["secret"]

    back = await rotate(platform, webhook_id, scheme=HMAC)
    assert len(back.secret) == 64
    assert back.webhook_config.public_key == ""
    assert back.webhook_config.previous_public_key == second.public_key
    await pool.execute("UPDATE webhook_configs SET previous_secret_expires_at = now()")
    assert (await platform.config(webhook_id)).previous_public_key == ""
    at_once = (await rotate(platform, webhook_id, scheme=ED25519, seconds=0)).webhook_config
    assert at_once.previous_public_key == ""


async def test_update_and_unknown_values_cannot_change_the_scheme(
    platform: Platform, receiver: Receiver
) -> None:
    before = (await platform.register(receiver.url)).webhook_config
    async with refused(StatusCode.INVALID_ARGUMENT, "MASK_FIELD_UNKNOWN"):
        await platform.update(before.id, signature_scheme=ED25519)
    async with refused(StatusCode.INVALID_ARGUMENT, "SIGNATURE_SCHEME_INVALID") as error:
        await rotate(platform, before.id, scheme=7)
    assert error.violations == {"signature_scheme": "SIGNATURE_SCHEME_INVALID"}
    async with refused(StatusCode.INVALID_ARGUMENT, "SIGNATURE_SCHEME_INVALID") as error:
        await platform.register(receiver.url, signature_scheme=7)
    assert list(error.violations) == ["webhook_config.signature_scheme"]
    assert await platform.config(before.id) == before
