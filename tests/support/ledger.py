"""The ledger compares acknowledged events with verified requests. No event may be lost."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from time import time

from tests.support.receiver import Received
from tests.support.signatures import is_genuine


@dataclass(frozen=True, slots=True)
class Counts:
    """The counts of a run."""

    acknowledged: int
    receipts: int
    #: Acknowledged and never received.
    lost: int
    #: Receipts beyond the first of an event.
    duplicate: int
    #: Events received without an acknowledgement.
    unexpected: int
    #: Requests with an invalid signature. They do not count as received.
    invalid: int

    def __str__(self) -> str:
        return (
            f"acknowledged {self.acknowledged}, receipts {self.receipts}, lost {self.lost}, "
            f"duplicate {self.duplicate}, unexpected {self.unexpected}, invalid {self.invalid}"
        )


def balance(
    acknowledged: Collection[str], received: Iterable[Received], secrets: Mapping[str, str]
) -> Counts:
    """Compare event ids with requests. `secrets` are by the path of the webhook config's URL."""
    requests = list(received)
    receipts = Counter(
        request.message_id for request in requests if _is_genuine(request, secrets[request.path])
    )
    return Counts(
        acknowledged=len(acknowledged),
        receipts=receipts.total(),
        lost=len(set(acknowledged) - receipts.keys()),
        duplicate=receipts.total() - len(receipts),
        unexpected=len(receipts.keys() - set(acknowledged)),
        invalid=len(requests) - receipts.total(),
    )


def _is_genuine(request: Received, secret: str) -> bool:
    signature = request.headers["X-Webhook-Signature"]
    return is_genuine(secret, request.message_id, request.body, signature, now=time())
