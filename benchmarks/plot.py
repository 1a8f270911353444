"""Writes the table and the plots of docs/design/performance.md from the JSON files beside it.

`python -m benchmarks.plot`; `python -m benchmarks all` measures first and then does the same.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import capacity
from benchmarks.chart import Row, chart
from benchmarks.promises import PROMISES, Promise

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/design/performance.md"
RESULTS = ROOT / "docs" / "design" / "performance"

type Figures = dict[str, Any]


def main(page: Path = PAGE, into: Path = RESULTS) -> None:
    """Update the tables of `page` and the plots in `into` from the JSON files there."""
    results = {path.stem: json.loads(path.read_text()) for path in into.glob("*.json")}
    text = _between(page.read_text(), "figures", table(results))
    if end := results.get("endtoend"):
        text = _between(text, "capacity", capacity.table(end))
    page.write_text(text)
    for name, drawing in plots(results):
        (into / f"{name}.svg").write_text(drawing)


def _between(text: str, marker: str, content: str) -> str:
    """Return the text with new content between the two comments of a marker."""
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content}{end}{after}"


def table(results: dict[str, Figures]) -> str:
    lines = [
        "| what | promise | measured | kept | beside, in the same run | measured on |",
        "|---|---|---|---|---|---|",
        *(_line(p, results[p.benchmark]) for p in PROMISES if p.benchmark in results),
    ]
    return "\n".join(lines) + "\n"


def _line(promise: Promise, figures: Figures) -> str:
    value = figures[promise.figure]
    cells = (
        promise.what,
        promise.limit or "none",
        f"{value:,g}{promise.unit}",
        ("yes" if promise.kept(value) else "**no**") if promise.limit else "",
        promise.beside.format_map(figures),
        f"{figures['date']}, {figures['cores']} cores",
    )
    return f"| {' | '.join(cells)} |"


def plots(results: dict[str, Figures]) -> Iterator[tuple[str, str]]:
    if (end := results.get("endtoend")) and (deliver := results.get("deliver")):
        yield "cpu", chart("CPU of one webhook, by process", "µs", _cpu(end, deliver))
    if end and (near := results.get("neighbours")):
        rows = _latency(end, near)
        yield "latency", chart("From publish to receipt", "ms", rows, logarithmic=True)
    if backlog := results.get("backlog"):
        rows = [
            Row(f"{int(size):,} open", {"claim": backlog["claim_ms"][size], "settle": settle})
            for size, settle in backlog["settle_ms"].items()
        ]
        yield "backlog", chart("Claiming and settling 200 deliveries", "ms", rows)
    if processes := results.get("processes"):
        rows = [
            Row(f"{number} engine{'s' if number != '1' else ''}", {"rate": rate})
            for number, rate in processes["rate"].items()
        ]
        yield "processes", chart("Deliveries a second, by engine processes", "1/s", rows)


def _cpu(end: Figures, deliver: Figures) -> list[Row]:
    ours = ("server", "engine", "postgres")
    return [
        Row("bare POST loop", {"bare": deliver["bare_cpu_us"]}),
        Row(
            "deliver: prefilled queue",
            {"engine": deliver["engine_cpu_us"], "postgres": deliver["postgres_cpu_us"]},
        ),
        Row(
            "end to end, batches of 100",
            {n: end["cpu_us"]["batch"][n] for n in ours},
            promise=2 * end["bare_cpu_us"],
        ),
        Row("end to end, one by one", {n: end["cpu_us"]["unary"][n] for n in ours}),
    ]


def _latency(end: Figures, near: Figures) -> list[Row]:
    return [
        Row("100/s, median", {"ms": end["p50_ms"]}, promise=15),
        Row("100/s, 99th percentile", {"ms": end["p99_ms"]}, promise=50),
        Row("100/s, 99.9th percentile", {"ms": end["p999_ms"]}),
        Row(f"{end['load70_rate']:,}/s (70 %), median", {"ms": end["load70_p50_ms"]}),
        Row(f"{end['load70_rate']:,}/s, 99th percentile", {"ms": end["load70_p99_ms"]}),
        Row("healthy, no neighbours, 99th", {"ms": near["p99_ms"]}),
        Row("healthy beside dead ones, 99th", {"ms": near["dead_p99_ms"]}, 1.5 * near["p99_ms"]),
        Row("others beside a flood, 99th", {"ms": near["flood_p99_ms"]}, 1.5 * near["p99_ms"]),
    ]


if __name__ == "__main__":
    main()
