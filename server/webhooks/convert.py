"""Protobuf messages of pings and secrets. The config's own message is in `rules`."""

from collections.abc import Mapping

from core.errors import InvalidArgument
from core.lifecycle import AttemptResult
from core.models import WebhookConfig
from core.signing import SignatureScheme, standard_secret
from postrider.v1 import webhook_config_pb2, webhook_config_service_pb2
from server.rpc.times import duration_of, seconds_of
from server.webhooks.reachability import is_reachable

_OVERLAP_SECONDS_MAX = 7 * 86_400
_DEFAULT_OVERLAP_SECONDS = 86_400.0

_SCHEMES: Mapping[int, SignatureScheme | None] = {
    webhook_config_pb2.SIGNATURE_SCHEME_UNSPECIFIED: None,
    webhook_config_pb2.SIGNATURE_SCHEME_HMAC_SHA256: SignatureScheme.HMAC_SHA256,
    webhook_config_pb2.SIGNATURE_SCHEME_ED25519: SignatureScheme.ED25519,
}


def signature_scheme(value: int, field: str) -> SignatureScheme | None:
    """Return the requested scheme, or None if unspecified. Raises InvalidArgument."""
    if value not in _SCHEMES:
        raise InvalidArgument.of(
            field,
            "must be SIGNATURE_SCHEME_HMAC_SHA256 or SIGNATURE_SCHEME_ED25519",
            reason="SIGNATURE_SCHEME_INVALID",
        )
    return _SCHEMES[value]


def overlap_seconds(request: webhook_config_service_pb2.RotateSecretRequest) -> float:
    """Return how long the retired secret still signs. Raises InvalidArgument."""
    if not request.HasField("overlap"):
        return _DEFAULT_OVERLAP_SECONDS
    seconds = seconds_of(request.overlap)
    if not 0 <= seconds <= _OVERLAP_SECONDS_MAX:
        raise InvalidArgument.of(
            "overlap", f"must be 0 to {_OVERLAP_SECONDS_MAX} seconds", reason="OVERLAP_INVALID"
        )
    return seconds


def secret_fields(row: WebhookConfig, secret: str) -> dict[str, str]:
    """Return the secret in both formats; nothing for a key pair, whose private key stays here."""
    if row.public_key:
        return {}
    return {"secret": secret, "standard_webhooks_secret": standard_secret(secret)}


def ping_message(result: AttemptResult) -> webhook_config_service_pb2.PingWebhookConfigResponse:
    return webhook_config_service_pb2.PingWebhookConfigResponse(
        reachable=is_reachable(result),
        status_code=result.status_code or 0,
        detail=result.detail,
        duration=duration_of(result.duration_us / 1e6),
    )
