"""Whether one `X-Webhook-Signature` is genuine, as the service's own receivers decide it."""

from core.verification import TOLERANCE_SECONDS, verify, verifying_key


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
    keys = [verifying_key(secret)]
    return verify(keys, headers, body, now=now, tolerance_seconds=tolerance_seconds).valid
