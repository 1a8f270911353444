"""What the client raises beside `grpc.aio.AioRpcError`, which calls raise as they are."""


class PostriderClientError(Exception):
    """Base of what this package raises."""


class TokenUnavailable(PostriderClientError):
    """The token source failed, or did not answer in time; its error is the cause."""


class EventRejected(PostriderClientError):
    """The server refused one event; sending it again unchanged is refused again."""

    def __init__(self, reason: str, message: str):
        super().__init__(f"{reason}: {message}")
        #: For programs; the words of the server's ErrorInfo.reason.
        self.reason = reason
        self.message = message


class PublishFailed(PostriderClientError):
    """No answer for an event within the time allowed, or a refusal of the whole batch.

    The event may have been accepted: publish it again under the same key, which this error names.
    The cause is the last error.
    """

    def __init__(self, message: str, idempotency_key: str):
        super().__init__(message)
        self.idempotency_key = idempotency_key


class WrongEventLoop(PostriderClientError):
    """A client or publisher was used where its event loop does not run; nothing was sent."""


class PublisherClosed(PostriderClientError):
    """publish() after close()."""


class WebhookRefused(PostriderClientError):
    """A request that must not be believed. The message is for our logs, not for the sender."""
