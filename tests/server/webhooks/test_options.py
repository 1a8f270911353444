"""The options of a webhook config, how they are set, shown and refused; rotation of its secret."""

from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
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


async def get(platform: Platform, webhook_id: str) -> WebhookConfig:
    got = await platform.webhooks.GetWebhookConfig(
        pb.GetWebhookConfigRequest(id=webhook_id), metadata=platform.merchant()
    )
    return got.webhook_config


async def update(platform: Platform, webhook_id: str, *paths: str, **fields: Any) -> WebhookConfig:
    updated = await platform.webhooks.UpdateWebhookConfig(
        pb.UpdateWebhookConfigRequest(
            webhook_config=WebhookConfig(id=webhook_id, **fields),
            update_mask=FieldMask(paths=paths or list(fields)),
        ),
        metadata=platform.merchant(),
    )
    return updated.webhook_config


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


# Options.


async def test_options_given_at_creation_are_shown_by_every_read(
    platform: Platform, receiver: Receiver
) -> None:
    created = (await platform.register(receiver.url, **OPTIONS)).webhook_config
    listed = await platform.webhooks.ListWebhookConfigs(
        pb.ListWebhookConfigsRequest(), metadata=platform.merchant()
    )
    for config in (created, await get(platform, created.id), *listed.webhook_configs):
        assert options_of(config) == OPTIONS


async def test_options_are_off_by_default(platform: Platform, receiver: Receiver) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    assert not config.headers
    assert not config.HasField("timeout")
    assert (config.rate_limit, config.max_in_flight) == (0, 0)
    assert (config.ordered, config.header_prefix) == (False, "")
    assert not config.HasField("previous_secret_expire_time")


async def test_each_option_changes_by_itself_and_the_audit_log_names_it(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    before = await get(platform, webhook_id)
    expected = options_of(before)
    for name, value in OPTIONS.items():
        changed = await update(platform, webhook_id, **{name: value})
        expected[name] = value
        assert options_of(changed) == expected
        assert changed.etag != before.etag
        fields = "SELECT changed_fields FROM audit_entries ORDER BY id DESC LIMIT 1"
        assert await pool.fetchval(fields) == [name]
        before = changed


async def test_a_mask_that_names_an_option_without_a_value_turns_it_off(
    platform: Platform, receiver: Receiver
) -> None:
    webhook_id = (await platform.register(receiver.url, **OPTIONS)).webhook_config.id
    config = await update(platform, webhook_id, *OPTIONS)
    assert not config.headers
    assert not config.HasField("timeout")
    assert (config.rate_limit, config.max_in_flight) == (0, 0)
    assert (config.ordered, config.header_prefix) == (False, "")


@pytest.mark.parametrize("name", INVALID)
async def test_a_wrong_option_is_refused_at_creation_and_at_update(
    platform: Platform, receiver: Receiver, name: str
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    value, violations = INVALID[name]
    fields: dict[str, Any] = {name: value}
    async with refused(StatusCode.INVALID_ARGUMENT, next(iter(violations.values()))) as error:
        await platform.register(receiver.url, **fields)
    assert error.violations == violations
    async with refused(StatusCode.INVALID_ARGUMENT, next(iter(violations.values()))) as error:
        await update(platform, webhook_id, **{name: value})
    assert error.violations == violations


async def test_a_wrong_option_that_the_mask_leaves_out_is_ignored(
    platform: Platform, receiver: Receiver
) -> None:
    webhook_id = (await platform.register(receiver.url, **OPTIONS)).webhook_config.id
    wrong = {name: value for name, (value, _) in INVALID.items()}
    config = await update(platform, webhook_id, "description", description="x", **wrong)
    assert options_of(config) == OPTIONS


async def test_a_prefix_and_the_headers_of_a_config_never_make_one_name_twice(
    platform: Platform, receiver: Receiver
) -> None:
    with_header = (await platform.register(receiver.url, headers={"Acme-Id": "x"})).webhook_config
    with_prefix = (await platform.register(receiver.url, header_prefix="acme")).webhook_config
    for change in (
        update(platform, with_header.id, header_prefix="acme"),
        update(platform, with_prefix.id, headers={"ACME-Signature": "x"}),
        platform.register(receiver.url, headers={"acme-timestamp": "1"}, header_prefix="acme"),
    ):
        async with refused(StatusCode.INVALID_ARGUMENT, "HEADER_PREFIX_INVALID") as error:
            await change
        assert list(error.violations) == ["webhook_config.header_prefix"]
    both = await update(platform, with_header.id, headers={"X-A": "x"}, header_prefix="acme")
    assert (dict(both.headers), both.header_prefix) == ({"X-A": "x"}, "acme")


# Event types.


async def test_a_prefix_subscribes_to_types_that_are_registered_later(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    config = (await platform.register(receiver.url, events=("novel.*",))).webhook_config
    assert list(config.events) == ["novel.*"]
    await pool.execute("INSERT INTO event_types (name) VALUES ('novel.thing'), ('novelty.thing')")

    assert (await platform.publish(type="novel.thing")).event.delivery_count == 1
    assert (await platform.publish(type="novelty.thing")).event.delivery_count == 0


async def test_a_deprecated_type_takes_no_new_subscriptions_and_keeps_the_old_ones(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    old = (await platform.register(receiver.url)).webhook_config
    other = (await platform.register(receiver.url, events=("refund.created",))).webhook_config
    await pool.execute("UPDATE event_types SET deprecated = true WHERE name = 'payment.succeeded'")

    async with refused(StatusCode.INVALID_ARGUMENT, "EVENT_TYPE_DEPRECATED"):
        await platform.register(receiver.url)
    async with refused(StatusCode.INVALID_ARGUMENT, "EVENT_TYPE_DEPRECATED") as error:
        await update(platform, other.id, events=["refund.created", "payment.succeeded"])
    assert list(error.violations) == ["webhook_config.events[1]"]
    kept = await update(platform, old.id, events=["payment.succeeded", "refund.created"])
    assert list(kept.events) == ["payment.succeeded", "refund.created"]


# Rotation.


async def test_a_new_secret_is_shown_once_and_the_old_one_is_kept_for_a_day_encrypted(
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
    assert config == await get(platform, before.id)
    assert rotated.secret not in str(config)
    until = config.previous_secret_expire_time.ToDatetime(UTC) - datetime.now(UTC)
    assert 86_390 < until.total_seconds() <= 86_400
    row = await pool.fetchrow("SELECT * FROM webhook_configs")
    previous = (row["previous_secret_key_id"], row["previous_secret_ciphertext"], row["id"])
    assert keyring.decrypt(*previous) == created.secret
    present = (row["secret_key_id"], row["secret_ciphertext"], row["id"])
    assert keyring.decrypt(*present) == rotated.secret


async def test_a_rotation_is_in_the_audit_log_without_a_secret(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    rotated = await rotate(platform, webhook_id)
    entry = await pool.fetchrow("SELECT * FROM audit_entries ORDER BY id DESC LIMIT 1")
    assert (entry["action"], entry["resource"]) == ("RotateSecret", webhook_id)
    assert (entry["merchant_id"], entry["changed_fields"]) == ("m_1", ["secret"])
    assert rotated.secret not in str(dict(entry))


async def test_a_rotation_during_an_overlap_keeps_only_the_secret_just_retired(
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


async def test_a_rotation_without_overlap_forgets_every_older_secret(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    await rotate(platform, webhook_id, seconds=3600)
    rotated = await rotate(platform, webhook_id, seconds=0)
    assert not rotated.webhook_config.HasField("previous_secret_expire_time")
    row = await pool.fetchrow("SELECT * FROM webhook_configs")
    assert row["previous_secret_ciphertext"] is None


async def test_an_overlap_that_has_ended_is_not_shown(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    await rotate(platform, webhook_id)
    await pool.execute("UPDATE webhook_configs SET previous_secret_expires_at = now()")
    assert not (await get(platform, webhook_id)).HasField("previous_secret_expire_time")


async def test_deleting_a_config_forgets_both_of_its_secrets(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    await rotate(platform, webhook_id)
    await platform.webhooks.DeleteWebhookConfig(
        pb.DeleteWebhookConfigRequest(id=webhook_id), metadata=platform.merchant()
    )
    row = await pool.fetchrow("SELECT * FROM webhook_configs")
    assert (row["secret_ciphertext"], row["previous_secret_ciphertext"]) == (b"", None)


@pytest.mark.parametrize("seconds", [-1, 604_801])
async def test_an_overlap_is_at_most_a_week(
    platform: Platform, receiver: Receiver, seconds: int
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    async with refused(StatusCode.INVALID_ARGUMENT, "OVERLAP_INVALID") as error:
        await rotate(platform, webhook_id, seconds=seconds)
    assert error.violations == {"overlap": "OVERLAP_INVALID"}


async def test_another_merchants_secret_cannot_be_rotated_nor_any_without_the_scope(
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


# Signature schemes.


async def test_the_private_half_of_a_key_pair_is_shown_by_nothing_and_the_public_one_by_all(
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
    listed = await platform.webhooks.ListWebhookConfigs(
        pb.ListWebhookConfigsRequest(), metadata=platform.merchant()
    )
    assert [await get(platform, config.id), *listed.webhook_configs] == [config, config]
    # The ping was signed by it already.
    [ping] = receiver.requests
    assert ping.headers["webhook-signature"].startswith("v1a,")


async def test_without_a_choice_a_config_signs_by_hmac_and_has_no_public_key(
    platform: Platform, receiver: Receiver
) -> None:
    for scheme in (None, HMAC):
        created = await platform.register(receiver.url, signature_scheme=scheme)
        assert len(created.secret) == 64
        assert created.webhook_config.signature_scheme == HMAC
        assert created.webhook_config.public_key == ""


async def test_a_rotation_keeps_the_scheme_or_changes_it_and_shows_both_public_keys(
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
    assert (await get(platform, webhook_id)).previous_public_key == ""
    at_once = (await rotate(platform, webhook_id, scheme=ED25519, seconds=0)).webhook_config
    assert at_once.previous_public_key == ""


async def test_the_scheme_is_not_changed_by_an_update_nor_to_one_there_is_not(
    platform: Platform, receiver: Receiver
) -> None:
    before = (await platform.register(receiver.url)).webhook_config
    async with refused(StatusCode.INVALID_ARGUMENT, "MASK_FIELD_UNKNOWN"):
        await update(platform, before.id, signature_scheme=ED25519)
    async with refused(StatusCode.INVALID_ARGUMENT, "SIGNATURE_SCHEME_INVALID") as error:
        await rotate(platform, before.id, scheme=7)
    assert error.violations == {"signature_scheme": "SIGNATURE_SCHEME_INVALID"}
    async with refused(StatusCode.INVALID_ARGUMENT, "SIGNATURE_SCHEME_INVALID") as error:
        await platform.register(receiver.url, signature_scheme=7)
    assert list(error.violations) == ["webhook_config.signature_scheme"]
    assert await get(platform, before.id) == before
