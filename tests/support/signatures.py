"""Verification of one `X-Webhook-Signature` header."""

from postrider_client.verification_keys import VerificationKey
from postrider_client.webhooks import inspect_webhook


def is_genuine(
    secret: str,
    message_id: str,
    body: bytes,
    signature: str,
    *,
    now: float,
) -> bool:
    headers = {"webhook-id": message_id, "X-Webhook-Signature": signature}
    keys = [VerificationKey.parse(secret)]
    return inspect_webhook(keys, headers, body, now=now).valid
