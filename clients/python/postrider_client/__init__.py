"""The client of Postrider: publish events and verify webhooks. Start with `client` and `webhooks`.

The package and the stubs `postrider.v1` are also part of the server's wheel. Two wheels in one
environment must have the same version, otherwise the import fails.
"""

from importlib import metadata

from postrider_client.calls import CallPolicy
from postrider_client.client import PostriderClient
from postrider_client.errors import (
    EventRejected,
    PostriderClientError,
    PublisherClosed,
    PublishFailed,
    TokenUnavailable,
    WebhookRefused,
    WrongEventLoop,
)
from postrider_client.publisher import Published, Publisher
from postrider_client.tokens import Token, TokenSource
from postrider_client.verification_keys import VerificationKey
from postrider_client.webhooks import Inspection, Webhook, inspect_webhook, verify_webhook

__version__ = "0.1.0"

__all__ = [
    "CallPolicy",
    "EventRejected",
    "Inspection",
    "PostriderClient",
    "PostriderClientError",
    "PublishFailed",
    "Published",
    "Publisher",
    "PublisherClosed",
    "Token",
    "TokenSource",
    "TokenUnavailable",
    "VerificationKey",
    "Webhook",
    "WebhookRefused",
    "WrongEventLoop",
    "inspect_webhook",
    "verify_webhook",
]


def _refuse_foreign_stubs() -> None:
    try:
        server = metadata.version("postrider")
    except metadata.PackageNotFoundError:
        return
    if server != __version__:
        raise ImportError(
            f"postrider {server} and postrider-client {__version__} are installed side by side "
            "and both bring postrider.v1: uninstall postrider, or install the same version of both"
        )


_refuse_foreign_stubs()
