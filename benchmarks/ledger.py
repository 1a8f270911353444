"""The receipts of the receiver, in a file that the benchmark reads while it grows.

A record is 24 bytes: the number of the webhook config (its URL ends in it), the publisher's
sequence number, when it was published and when it was received, by the clock of this machine.
"""

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_HEAD = struct.Struct("<Q")
_RECORD = struct.Struct("<IIdd")


class Receipt(NamedTuple):
    """A received webhook. Times are in seconds since 1970."""

    webhook: int
    sequence: int
    sent_at: float
    received_at: float

    @property
    def latency_ms(self) -> float:
        return (self.received_at - self.sent_at) * 1000


class Ledger:
    """An append-only file. One process writes, others read."""

    def __init__(self, path: Path):
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    @classmethod
    def create(cls, path: Path, capacity: int) -> "Ledger":
        with path.open("wb") as file:
            file.truncate(_HEAD.size + capacity * _RECORD.size)
        return cls(path)

    def __len__(self) -> int:
        count: int = _HEAD.unpack_from(self._map)[0]
        return count

    def append(self, webhook: int, sequence: int, sent_at: float, received_at: float) -> None:
        count = len(self)
        offset = _HEAD.size + count * _RECORD.size
        _RECORD.pack_into(self._map, offset, webhook, sequence, sent_at, received_at)
        # Last, so that readers never see an incomplete record.
        _HEAD.pack_into(self._map, 0, count + 1)

    def since(self, start: int = 0) -> list[Receipt]:
        """Return the records from this position on."""
        view = memoryview(self._map)[
            _HEAD.size + start * _RECORD.size : _HEAD.size + len(self) * _RECORD.size
        ]
        return [Receipt._make(record) for record in _RECORD.iter_unpack(view)]


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that this share of values does not exceed. 0.5 is the median."""
    if not values:
        raise RuntimeError("nothing was received in the time that was to be measured")
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]
