"""The client of Postrider: publish events and verify webhooks, without anything of the server.

It brings the stubs `postrider.v1`, which the server's wheel holds as well: one environment has one
of the two, or both of one version, and the import refuses anything else.
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
from postrider_client.webhooks import Webhook, verify_webhook

__version__ = "0.1.0"

__all__ = [
    "CallPolicy",
    "EventRejected",
    "PostriderClient",
    "PostriderClientError",
    "PublishFailed",
    "Published",
    "Publisher",
    "PublisherClosed",
    "Token",
    "TokenSource",
    "TokenUnavailable",
    "Webhook",
    "WebhookRefused",
    "WrongEventLoop",
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
