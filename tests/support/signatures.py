"""Whether one `X-Webhook-Signature` is genuine, as the service's own receivers decide it."""

from postrider_client.verification_keys import VerificationKey
from postrider_client.webhooks import TOLERANCE_SECONDS, inspect_webhook


def is_genuine(
    secret: str,
    message_id: str,
    body: bytes,
    signature: str,
    *,
    now: float,
    tolerance_seconds: float = TOLERANCE_SECONDS,
) -> bool:
    headers = {"webhook-id": message_id, "X-Webhook-Signature": signature}
    keys = [VerificationKey.parse(secret)]
    return inspect_webhook(keys, headers, body, now=now, tolerance=tolerance_seconds).valid
