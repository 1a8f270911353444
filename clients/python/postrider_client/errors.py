"""The errors of the client. Calls also raise `grpc.aio.AioRpcError` unchanged."""


class PostriderClientError(Exception):
    """Base class of the errors of this package."""


class TokenUnavailable(PostriderClientError):
    """The token source failed or timed out. Its error is the cause."""


class EventRejected(PostriderClientError):
    """The server rejected an event. Publishing it again unchanged fails again."""

    def __init__(self, reason: str, message: str):
        super().__init__(f"{reason}: {message}")
        #: For programs: a reason of the server's ErrorInfo.
        self.reason = reason
        self.message = message


class PublishFailed(PostriderClientError):
    """No result for an event in time, or the server rejected its whole batch.

    The event may have been accepted: publish it again with this `idempotency_key`. The cause is the
    last error.
    """

    def __init__(self, message: str, idempotency_key: str):
        super().__init__(message)
        self.idempotency_key = idempotency_key


class WrongEventLoop(PostriderClientError):
    """A client or publisher was used on another event loop. Nothing was sent."""


class PublisherClosed(PostriderClientError):
    """The publisher was closed before the event was sent."""


class WebhookRefused(PostriderClientError):
    """An invalid webhook. The message is for your logs, not for the sender."""
