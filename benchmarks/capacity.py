"""Calculates the processes and cores for higher rates from the measured cost of one webhook."""

from typing import Any

_RATES = (1_000, 10_000, 100_000)
#: The planned share of a core. The rest is for busy minutes.
_PLANNED = 0.7
_RECEIVER_SECONDS = 0.2
_PLACES = 500
_MICROSECONDS = 1_000_000


def table(end: dict[str, Any]) -> str:
    """Return processes and cores by rate, from the figures of `endtoend`."""
    cost = end["cpu_us"]["batch"]
    needs = [_needs(rate, cost, end["wal_bytes_per_webhook"]) for rate in _RATES]
    head = " | ".join(f"{rate:,}/s" for rate in _RATES)
    lines = [f"| what | {head} |", "|---" * (1 + len(_RATES)) + "|"]
    lines += [f"| {what} | {' | '.join(need[what] for need in needs)} |" for what in needs[0]]
    return "\n".join(lines) + "\n"


def _needs(rate: int, cost: dict[str, float], wal_bytes: float) -> dict[str, str]:
    engines = _cores(rate, cost["engine"])
    places = rate * _RECEIVER_SECONDS / _PLACES
    return {
        "server processes, a core each (batches)": _whole(_cores(rate, cost["server"])),
        "engine processes, a core each": _whole(max(engines, places)),
        "… by CPU alone": f"{engines:.1f}",
        "… by places alone": f"{places:.1f}",
        "cores of PostgreSQL": f"{_cores(rate, cost['postgres']):.1f}",
        "WAL": f"{rate * wal_bytes / 1e6:,.0f} MB/s",
        "rows of history a day (delivery and attempt)": f"{2 * rate * 86_400 / 1e6:,.0f} million",
    }


def _cores(rate: int, cpu_us: float) -> float:
    return rate * cpu_us / _MICROSECONDS / _PLANNED


def _whole(number: float) -> str:
    return f"{max(-(-number // 1), 1):.0f}"
