"""Webhook configs: none of their messages has a field for the secret."""

import base64
import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime

from core.errors import InvalidArgument
from core.ids import format_id
from core.lifecycle import AttemptResult, DeactivationReason
from core.models import WebhookConfig
from core.signing import SignatureScheme
from postrider.v1 import webhook_config_pb2, webhook_config_service_pb2
from server.rpc.times import duration_of, seconds_of, timestamp
from server.webhooks.reachability import is_reachable
from server.webhooks.rules import WebhookDraft

_SCHEMES: Mapping[int, SignatureScheme | None] = {
    webhook_config_pb2.SIGNATURE_SCHEME_UNSPECIFIED: None,
    webhook_config_pb2.SIGNATURE_SCHEME_HMAC_SHA256: SignatureScheme.HMAC_SHA256,
    webhook_config_pb2.SIGNATURE_SCHEME_ED25519: SignatureScheme.ED25519,
}


def webhook_draft(message: webhook_config_pb2.WebhookConfig) -> WebhookDraft:
    return WebhookDraft(
        url=message.url,
        events=list(message.events),
        description=message.description,
        active=message.active if message.HasField("active") else True,
        retry_schedule_seconds=[seconds_of(duration) for duration in message.retry_schedule],
        headers=dict(message.headers),
        timeout_seconds=seconds_of(message.timeout) if message.HasField("timeout") else None,
        rate_limit=message.rate_limit,
        max_in_flight=message.max_in_flight,
        ordered=message.ordered,
        header_prefix=message.header_prefix,
    )


def signature_scheme(value: int, field: str) -> SignatureScheme | None:
    """The scheme that is asked for; None when none is, InvalidArgument when there is no such."""
    if value not in _SCHEMES:
        raise InvalidArgument.of(
            field,
            "is none of SIGNATURE_SCHEME_HMAC_SHA256 and SIGNATURE_SCHEME_ED25519",
            reason="SIGNATURE_SCHEME_INVALID",
        )
    return _SCHEMES[value]


def overlap_seconds(request: webhook_config_service_pb2.RotateSecretRequest) -> float:
    """How long the present secret keeps signing; a day when the caller does not say."""
    return seconds_of(request.overlap) if request.HasField("overlap") else 86_400.0


def webhook_config_message(row: WebhookConfig) -> webhook_config_pb2.WebhookConfig:
    timeout, expires_at = row.timeout_seconds, row.previous_secret_expires_at
    # The row keeps the secret before for a moment longer than it signs.
    overlaps = expires_at is not None and expires_at > datetime.now(UTC)
    reason = f"DEACTIVATION_REASON_{(row.deactivation_reason or 'unspecified').upper()}"
    return webhook_config_pb2.WebhookConfig(
        id=format_id("wh", row.id),
        merchant_id=row.merchant_id,
        url=row.url,
        events=row.events,
        description=row.description,
        active=row.active,
        deactivation_reason=webhook_config_pb2.DeactivationReason.Value(reason),
        consecutive_failures=row.consecutive_failures,
        retry_schedule=[duration_of(seconds) for seconds in row.retry_schedule_seconds],
        etag=etag_of(row),
        create_time=timestamp(row.created_at),
        update_time=timestamp(row.updated_at),
        headers=row.headers,
        timeout=None if timeout is None else duration_of(timeout),
        rate_limit=row.rate_limit,
        max_in_flight=row.max_in_flight,
        ordered=row.ordered,
        previous_secret_expire_time=timestamp(expires_at) if overlaps else None,
        signature_scheme=webhook_config_pb2.SIGNATURE_SCHEME_ED25519
        if row.public_key
        else webhook_config_pb2.SIGNATURE_SCHEME_HMAC_SHA256,
        public_key=row.public_key or "",
        previous_public_key=(row.previous_public_key or "") if overlaps else "",
        header_prefix=row.header_prefix,
    )


def etag_of(row: WebhookConfig) -> str:
    """Of this version of this config alone: another config's etag, or one made up, is stale."""
    digest = hashlib.sha256(b"%b %d" % (row.id.bytes, row.version)).digest()
    return base64.urlsafe_b64encode(digest[:12]).decode()


def ping_message(result: AttemptResult) -> webhook_config_service_pb2.PingWebhookConfigResponse:
    return webhook_config_service_pb2.PingWebhookConfigResponse(
        reachable=is_reachable(result),
        status_code=result.status_code or 0,
        detail=result.detail,
        duration=duration_of(result.duration_us / 1e6),
    )


def deactivation_reason_filter(
    value: webhook_config_pb2.DeactivationReason.ValueType,
) -> DeactivationReason | None:
    """The reason to filter by; None for all."""
    if value == webhook_config_pb2.DEACTIVATION_REASON_UNSPECIFIED:
        return None
    try:
        name = webhook_config_pb2.DeactivationReason.Name(value)
    except ValueError:
        raise InvalidArgument.of(
            "deactivation_reason",
            "is not a reason this server knows",
            reason="DEACTIVATION_REASON_UNKNOWN",
        ) from None
    return DeactivationReason(name.removeprefix("DEACTIVATION_REASON_").lower())
